//! CPU path: rows over threads, features in chunks that stay in the first-level cache, four taps at a time.

use crate::generated::feature_gated_conv::{Backward, Dims, Forward};
use crate::simd::{LANES, reduce, vectorised};
use rayon::prelude::*;
use std::cell::RefCell;

/// Features of a chunk.
const CHUNK: usize = 256;
/// Rows that one thread takes at a time at the least.
const ROWS: usize = 4;

thread_local! {
    /// Gradients of the filtered features of one row.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `out[i] += Σ_j w[j]·x[first + i + j]`, x zero outside of its data.
#[inline(always)]
fn accumulate(w: &[f32], x: &[f32], first: isize, out: &mut [f32]) {
    let len = out.len();
    for (group, w) in w.chunks(4).enumerate() {
        let start = first + 4 * group as isize;
        let inside = start >= 0 && start as usize + len + 3 <= x.len();
        if let (&[w0, w1, w2, w3], true) = (w, inside) {
            let x = &x[start as usize..][..len + 3];
            let (x0, x1, x2, x3) = (&x[..len], &x[1..][..len], &x[2..][..len], &x[3..][..len]);
            for i in 0..len {
                let sum = w0.mul_add(x0[i], w1.mul_add(x1[i], out[i]));
                out[i] = w2.mul_add(x2[i], w3.mul_add(x3[i], sum));
            }
            continue;
        }
        for (j, w) in w.iter().enumerate() {
            let at = start + j as isize;
            let out = out.get_mut((-at).max(0) as usize..).unwrap_or_default();
            let x = x.get(at.max(0) as usize..).unwrap_or_default();
            let both = out.len().min(x.len());
            let (out, x) = (&mut out[..both], &x[..both]);
            for i in 0..both {
                out[i] = w.mul_add(x[i], out[i]);
            }
        }
    }
}

/// Features `first..first + out.len()` of one row `[3F]`, filtered.
#[inline(always)]
fn filtered(p: &[f32], weight: &[f32], bias: f32, first: usize, out: &mut [f32]) {
    out.fill(bias);
    accumulate(weight, p, first as isize + 1 - weight.len() as isize, out);
}

/// The three parts of features `first..first + len`, filtered.
#[inline(always)]
fn parts(p: &[f32], weight: &[f32], bias: f32, first: usize, len: usize, out: &mut [[f32; CHUNK]; 3]) {
    let f = p.len() / 3;
    for (part, out) in out.iter_mut().enumerate() {
        filtered(p, weight, bias, part * f + first, &mut out[..len]);
    }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { n, f, k, .. } = a.dims;
    let rows = a.y.par_chunks_mut(f).zip(a.p.par_chunks(3 * f)).enumerate().with_min_len(ROWS);
    rows.for_each(|(row, (y, p))| {
        let (weight, bias) = (&a.weight[row % n * k..][..k], a.bias[row % n]);
        vectorised(
            #[inline(always)]
            || {
                let mut u = [[0.0f32; CHUNK]; 3];
                for (chunk, y) in y.chunks_mut(CHUNK).enumerate() {
                    let len = y.len();
                    parts(p, weight, bias, chunk * CHUNK, len, &mut u);
                    let [q, k, v] = u.each_ref().map(|u| &u[..len]);
                    for i in 0..len {
                        y[i] = q[i] * k[i] * v[i];
                    }
                }
            },
        );
    });
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let Dims { b, n, f, k } = a.dims;
    let mut dp: Vec<Option<&mut [f32]>> = match a.dp {
        Some(dp) => dp.chunks_mut(3 * f).map(Some).collect(),
        None => (0..b * n).map(|_| None).collect(),
    };
    // Per row: taps, then the bias.
    let mut partial = vec![0.0f32; b * n * (k + 1)];
    let rows = dp.par_iter_mut().zip(partial.par_chunks_mut(k + 1)).enumerate().with_min_len(ROWS);
    rows.for_each(|(row, (dp, sums))| {
        let (p, dy) = (&a.p[row * 3 * f..][..3 * f], &a.dy[row * f..][..f]);
        let (weight, bias) = (&a.weight[row % n * k..][..k], a.bias[row % n]);
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.resize(scratch.len().max(3 * f + 2 * k + 3), 0.0);
            let (turned, du) = scratch[..3 * f + 2 * k + 3].split_at_mut(k);
            // Behind the last feature are zeros, so that the transposed filter has no end to look after.
            du[3 * f..].fill(0.0);
            weight.iter().rev().zip(&mut *turned).for_each(|(w, turned)| *turned = *w);
            vectorised(
                #[inline(always)]
                || backward_row(p, dy, (weight, turned, bias), dp.as_deref_mut(), du, sums),
            );
        });
    });
    let sum = |token: usize, j: usize| (0..b).map(|sample| partial[(sample * n + token) * (k + 1) + j]).sum::<f32>();
    for (token, out) in a.dweight.into_iter().flat_map(|out| out.chunks_exact_mut(k)).enumerate() {
        out.iter_mut().enumerate().for_each(|(j, out)| *out = sum(token, j));
    }
    a.dbias.into_iter().flatten().enumerate().for_each(|(token, out)| *out = sum(token, k));
}

/// Backward pass of one row; `turned` has the taps in the other order, `sums` gets the gradients of taps and bias.
#[inline(always)]
fn backward_row(
    p: &[f32],
    dy: &[f32],
    (weight, turned, bias): (&[f32], &[f32], f32),
    dp: Option<&mut [f32]>,
    du: &mut [f32],
    sums: &mut [f32],
) {
    let (f, k) = (dy.len(), weight.len());
    let mut u = [[0.0f32; CHUNK]; 3];
    let (dq, rest) = du.split_at_mut(f);
    let (dk, dv) = rest.split_at_mut(f);
    for (chunk, dy) in dy.chunks(CHUNK).enumerate() {
        let (first, len) = (chunk * CHUNK, dy.len());
        parts(p, weight, bias, first, len, &mut u);
        let (dq, dk, dv) = (&mut dq[first..][..len], &mut dk[first..][..len], &mut dv[first..][..len]);
        let [q, key, v] = u.each_ref().map(|u| &u[..len]);
        for i in 0..len {
            dq[i] = dy[i] * (key[i] * v[i]);
            dk[i] = dy[i] * q[i] * v[i];
            dv[i] = dy[i] * q[i] * key[i];
        }
    }
    let du = &*du;
    if let Some(dp) = dp {
        for (chunk, dp) in dp.chunks_mut(CHUNK).enumerate() {
            dp.fill(0.0);
            accumulate(turned, du, (chunk * CHUNK) as isize, dp);
        }
    }
    let du = &du[..3 * f];
    for j in 0..k {
        // Features before the first have no source.
        let len = (3 * f).saturating_sub(k - 1 - j);
        sums[j] = dot(&du[3 * f - len..], &p[..len]);
    }
    let (vectors, rest) = du.as_chunks::<LANES>();
    let mut sum = [0.0f32; LANES];
    for du in vectors {
        for i in 0..LANES {
            sum[i] += du[i];
        }
    }
    sums[k] = reduce(sum) + rest.iter().sum::<f32>();
}

/// Σ x·y of equally long slices, in two vectors of partial sums.
#[inline(always)]
fn dot(x: &[f32], y: &[f32]) -> f32 {
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<{ 2 * LANES }>(), y.as_chunks::<{ 2 * LANES }>());
    let mut sum = [0.0f32; 2 * LANES];
    for (x, y) in x.iter().zip(y) {
        for i in 0..2 * LANES {
            sum[i] = x[i].mul_add(y[i], sum[i]);
        }
    }
    let mut half = [0.0f32; LANES];
    (0..LANES).for_each(|i| half[i] = sum[i] + sum[LANES + i]);
    reduce(half) + x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum::<f32>()
}
