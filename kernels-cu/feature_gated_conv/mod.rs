//! MLP Hyena-X between its projections: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::generated::feature_gated_conv::{Backward, Dims, Forward};

    /// The feature that tap `j` of feature `i` reads, where there is one.
    fn source(i: usize, j: usize, k: usize) -> Option<usize> {
        (i + j).checked_sub(k - 1)
    }

    /// The filtered features of row `row` of `[B·N]`.
    fn filtered<T: Real>(Dims { n, f, k, .. }: Dims, row: usize, p: &[T], weight: &[T], bias: &[T]) -> Vec<f64> {
        let (p, weight) = (&p[row * 3 * f..], &weight[row % n * k..]);
        let tap = |i: usize, j: usize| source(i, j, k).map_or(0.0, |s| weight[j].f64() * p[s].f64());
        (0..3 * f).map(|i| bias[row % n].f64() + (0..k).map(|j| tap(i, j)).sum::<f64>()).collect()
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, n, f, .. } = a.dims;
        for row in 0..b * n {
            let u = filtered(a.dims, row, a.p, a.weight, a.bias);
            (0..f).for_each(|i| a.y[row * f + i] = T::from_f64(u[i] * u[f + i] * u[2 * f + i]));
        }
    }

    /// Backward pass: du of each part is dy times the other two; the filter's transpose takes it to p.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let Dims { b, n, f, k } = a.dims;
        let (mut dp, mut dw, mut db) = (vec![0.0; b * n * 3 * f], vec![0.0; n * k], vec![0.0; n]);
        for row in 0..b * n {
            let u = filtered(a.dims, row, a.p, a.weight, a.bias);
            for i in 0..3 * f {
                let (part, column) = (i / f, i % f);
                let others = u[(part + 1) % 3 * f + column] * u[(part + 2) % 3 * f + column];
                let du = a.dy[row * f + column].f64() * others;
                db[row % n] += du;
                for (j, s) in (0..k).filter_map(|j| Some((j, source(i, j, k)?))) {
                    dp[row * 3 * f + s] += a.weight[row % n * k + j].f64() * du;
                    dw[row % n * k + j] += a.p[row * 3 * f + s].f64() * du;
                }
            }
        }
        for (out, sums) in [(a.dp, dp), (a.dweight, dw), (a.dbias, db)] {
            out.into_iter().flatten().zip(sums).for_each(|(o, v)| *o = T::from_f64(v));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Tier;
    use crate::check::{Fill, Tolerance, assert_close, draw_f32};
    use crate::generated::feature_gated_conv::{Backward, CASES, Dims, Forward, INFO, Params};

    #[test]
    fn the_filter_runs_across_the_parts() {
        // Features 1, 2 | 3, 4 | 5, 6 with taps (10, 1): 1, 12 | 23, 34 | 45, 56, so each part reads the one before.
        let run = |forward: fn(Forward<'_, f32>)| {
            let mut y = [0.0f32; 2];
            let (dims, p) = (Dims { b: 1, n: 1, f: 2, k: 2 }, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
            forward(Forward { dims, params: Params {}, p: &p, weight: &[10.0, 1.0], bias: &[0.0], y: &mut y });
            y
        };
        assert_eq!(run(reference::forward), [1.0 * 23.0 * 45.0, 12.0 * 34.0 * 56.0]);
        assert_eq!(run(cpu::forward), [1.0 * 23.0 * 45.0, 12.0 * 34.0 * 56.0]);
    }

    #[test]
    fn cpu_agrees_with_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let (dims @ Dims { b, n, f, k }, params) = (case.dims, case.params);
            let draw = |name: &str, len, fill| draw_f32(case.name, name, len, fill);
            let (p, dy) = (draw("p", b * n * 3 * f, Fill::Normal), draw("dy", b * n * f, Fill::Normal));
            let [weight, bias] =
                [("weight", n * k), ("bias", n)].map(|(name, len)| draw(name, len, Fill::Uniform(-0.5, 0.5)));
            let run = |forward: fn(Forward<'_, f32>), backward: fn(Backward<'_, f32>)| {
                let nan = |len: usize| vec![f32::NAN; len];
                let (mut y, mut dp, mut dw, mut db) = (nan(b * n * f), nan(p.len()), nan(n * k), nan(n));
                forward(Forward { dims, params, p: &p, weight: &weight, bias: &bias, y: &mut y });
                let (p, weight, bias) = (&p[..], &weight[..], &bias[..]);
                let (dp_out, dweight, dbias) = (Some(&mut dp[..]), Some(&mut dw[..]), Some(&mut db[..]));
                backward(Backward { dims, params, dy: &dy, p, weight, bias, dp: dp_out, dweight, dbias });
                [y, dp, dw, db]
            };
            let (got, want) = (run(cpu::forward, cpu::backward), run(reference::forward, reference::backward));
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let tolerance = INFO.tolerance.unwrap_or(Tolerance::F32);
                assert_close(&format!("{} tensor {i}", case.name), got, want, tolerance);
            }
        }
    }
}
