//! CPU path: the product with its epilogue; backward the two products and the sums over rows.

pub(crate) mod epilogue;

use super::product::{Matrix, Output, Product, Values, run};
use crate::Weight;
use crate::generated::gemm::{Backward, Dims, Forward};
use epilogue::{Epilogue, accumulate, pre_gradient};
use rayon::prelude::*;
use std::borrow::Cow;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { b, n, k, f, .. } = a.dims;
    let (w, bf16) = weight(a.w, k, a.params.bf16);
    let product = Product::new([b * n, k, f], Matrix::f32(a.x, [k, 1]), w.transposed(), bf16).of_vectors(n == 1);
    let epilogue =
        Epilogue { dims: a.dims, params: a.params, bias: a.bias, pos: a.pos, gate: a.gate, residual: a.residual };
    run(&product, Output::new(a.y, a.pre, f, [b * n, f]), &|row, from, y, pre| epilogue.row(row, from, y, pre));
}

/// The weight as a matrix, and whether products are bf16: where asked for, and where the weight is stored so.
pub(crate) fn weight(w: Weight<'_, f32>, k: usize, bf16: bool) -> (Matrix<'_>, bool) {
    match w {
        Weight::Native(w) => (Matrix::f32(w, [k, 1]), bf16),
        Weight::Bf16(w) => (Matrix { values: Values::Bf16(w), strides: [k, 1] }, true),
    }
}

/// Backward pass.
pub fn backward(mut a: Backward<'_, f32>) {
    let Dims { b, n, k, f, c } = a.dims;
    let du: Cow<'_, [f32]> = if a.params.act == 0 && a.gate.is_none() {
        a.dy.into()
    } else {
        let mut du = vec![0.0; a.dy.len()];
        du.par_chunks_mut(f).enumerate().with_min_len(16).for_each(|(row, du)| pre_gradient(&a, row, du));
        du.into()
    };
    if let Some(dgate) = a.dgate.take() {
        dgate.fill(0.0);
        if let (Some(_), Some(pre)) = (a.gate, a.pre) {
            dgate.par_chunks_mut(c * f).enumerate().for_each(|(sample, table)| {
                let sum = &mut table[a.params.gate_row * f..][..f];
                for row in sample * n..(sample + 1) * n {
                    accumulate(sum, &a.dy[row * f..][..f], Some(&pre[row * f..][..f]));
                }
            });
        }
    }
    if let Some(dpos) = a.dpos {
        dpos.par_chunks_mut(f).enumerate().with_min_len(4).for_each(|(token, sum)| {
            sum.fill(0.0);
            (0..b).for_each(|sample| accumulate(sum, &du[(sample * n + token) * f..][..f], None));
        });
    }
    if let Some(dbias) = a.dbias {
        // Blocks of rows, then the blocks in order: a split by data, so that threads change no bit.
        let partial = |rows: &[f32]| {
            let mut sum = vec![0.0; f];
            rows.chunks(f).for_each(|du| accumulate(&mut sum, du, None));
            sum
        };
        let partials: Vec<Vec<f32>> = du.par_chunks(256 * f).map(partial).collect();
        dbias.fill(0.0);
        partials.iter().for_each(|sum| accumulate(dbias, sum, None));
    }
    let (w, bf16) = weight(a.w, k, a.params.bf16);
    let du = Matrix::f32(&du, [f, 1]);
    if let Some(dx) = a.dx {
        run(&Product::new([b * n, f, k], du, w, bf16), Output::new(dx, None, k, [b * n, k]), &keep);
    }
    if let Some(dw) = a.dw {
        let x = Matrix::f32(a.x, [k, 1]);
        run(&Product::new([f, b * n, k], du.transposed(), x, bf16), Output::new(dw, None, k, [f, k]), &keep);
    }
}

/// The epilogue of a product that is the result already.
fn keep(_: usize, _: usize, _: &mut [f32], _: Option<&mut [f32]>) {}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use crate::Weight;
    use crate::check::{Fill, Tolerance, compare, draw_f32};
    use crate::generated::gemm::{Backward, CASES, Dims, Forward};
    use crate::{Case, Tier};
    use half::bf16;

    type GemmCase = Case<Dims, crate::generated::gemm::Params>;

    /// The named outputs of a forward and a backward call over the drawn inputs of a case.
    fn run(
        case: &GemmCase,
        forward: impl Fn(Forward<'_, f32>),
        backward: impl Fn(Backward<'_, f32>),
    ) -> Vec<(&'static str, Vec<f32>)> {
        let Dims { b, n, k, f, c } = case.dims;
        let draw = |name: &str, len: usize| draw_f32(case.name, name, len, Fill::Normal);
        let has = |name: &str| !case.absent.contains(&name);
        let optional = |name: &str, len: usize| has(name).then(|| draw(name, len));
        let (x, w, dy) =
            (draw("x", b * n * k), draw_f32(case.name, "w", f * k, Fill::Uniform(-0.25, 0.25)), draw("dy", b * n * f));
        let stored: Vec<bf16> = w.iter().map(|v| bf16::from_f32(*v)).collect();
        let w = if case.bf16.contains(&"w") { Weight::Bf16(&stored) } else { Weight::Native(&w[..]) };
        let (bias, pos) = (optional("bias", f), optional("pos", n * f));
        let (gate, residual) = (optional("gate", b * c * f), optional("residual", b * n * f));
        // NaN marks what a path forgets to write.
        let (mut y, mut pre) = (vec![f32::NAN; b * n * f], has("pre").then(|| vec![f32::NAN; b * n * f]));
        forward(Forward {
            dims: case.dims,
            params: case.params,
            x: &x,
            w,
            bias: bias.as_deref(),
            pos: pos.as_deref(),
            gate: gate.as_deref(),
            residual: residual.as_deref(),
            y: &mut y,
            pre: pre.as_deref_mut(),
        });
        let [mut dx, mut dw, mut dbias, mut dpos, mut dgate] =
            [b * n * k, f * k, f, n * f, b * c * f].map(|len| vec![f32::NAN; len]);
        backward(Backward {
            dims: case.dims,
            params: case.params,
            dy: &dy,
            x: &x,
            w,
            gate: gate.as_deref(),
            pre: pre.as_deref(),
            dx: Some(&mut dx),
            dw: Some(&mut dw),
            dbias: Some(&mut dbias),
            dpos: Some(&mut dpos),
            dgate: Some(&mut dgate),
        });
        let pre = pre.unwrap_or_default();
        vec![("y", y), ("pre", pre), ("dx", dx), ("dw", dw), ("dbias", dbias), ("dpos", dpos), ("dgate", dgate)]
    }

    fn run_cpu(case: &GemmCase) -> Vec<(&'static str, Vec<f32>)> {
        run(case, super::forward, super::backward)
    }

    #[test]
    fn agrees_with_the_oracle() {
        for case in CASES.iter().filter(|case| case.tier == Tier::Tiny) {
            let bf16 = case.params.bf16 || !case.bf16.is_empty();
            let tolerance = if bf16 { Tolerance::BF16 } else { Tolerance::F32 };
            let want = run(case, reference::forward, reference::backward);
            for ((name, got), (_, want)) in run_cpu(case).into_iter().zip(want) {
                let found = compare(&got, &want, tolerance);
                assert!(found.pass, "{}: {name}: {found:?}", case.name);
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads() -> Result<(), rayon::ThreadPoolBuildError> {
        let bits = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let tiny = CASES.iter().filter(|case| case.tier == Tier::Tiny);
            let values = pool.install(|| tiny.flat_map(run_cpu).flat_map(|(_, v)| v).map(f32::to_bits).collect());
            Ok::<Vec<u32>, rayon::ThreadPoolBuildError>(values)
        };
        let one = bits(1)?;
        assert_eq!(one, bits(2)?);
        assert_eq!(one, bits(3)?);
        assert_eq!(one, bits(3)?);
        Ok(())
    }
}
