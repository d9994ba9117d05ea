//! CPU path: both operands as e4m3 numbers, which bf16 holds exactly, through the bf16 product of `gemm`.

use super::{e4m3, scale};
use crate::Weight;
use crate::gemm::cpu::epilogue::Epilogue;
use crate::gemm::product::{Matrix, Output, Product, run};
use crate::generated::gemm;
use crate::generated::gemm_fp8::{Dims, Forward};
use rayon::prelude::*;

/// Rows that one task rounds at the least.
const ROWS: usize = 16;

/// Rows of `k` as e4m3 numbers, and their scales.
fn rounded(rows: usize, k: usize, at: impl Fn(usize) -> f32 + Sync) -> (Vec<f32>, Vec<f32>) {
    let mut values = vec![0.0; rows * k];
    let mut scales = vec![1.0; rows];
    let pairs = values.par_chunks_mut(k.max(1)).zip(&mut scales).enumerate().with_min_len(ROWS);
    pairs.for_each(|(row, (values, own))| {
        *own = scale((0..k).map(|j| at(row * k + j)));
        values.iter_mut().enumerate().for_each(|(j, v)| *v = e4m3(at(row * k + j) / *own));
    });
    (values, scales)
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { b, n, k, f, c } = a.dims;
    let (x, sx) = rounded(b * n, k, |i| a.x[i]);
    let (w, sw) = match a.w {
        Weight::Native(w) => rounded(f, k, |i| w[i]),
        Weight::Bf16(w) => rounded(f, k, |i| w[i].to_f32()),
    };
    let product = Product::new([b * n, k, f], Matrix::f32(&x, [k, 1]), Matrix::f32(&w, [k, 1]).transposed(), true);
    let epilogue = Epilogue {
        dims: gemm::Dims { b, n, k, f, c },
        params: gemm::Params { act: a.params.act, gate_row: a.params.gate_row, bf16: true },
        bias: a.bias,
        pos: None,
        gate: a.gate,
        residual: a.residual,
    };
    run(&product, Output::new(a.y, None, f, [b * n, f]), &|row, from, y, pre| {
        y.iter_mut().zip(&sw[from..]).for_each(|(y, sw)| *y *= sx[row] * sw);
        epilogue.row(row, from, y, pre);
    });
}
