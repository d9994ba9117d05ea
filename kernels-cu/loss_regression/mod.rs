//! Regression losses between a student's and a teacher's output: see `op.toml` for the formulas.

pub mod cpu;
pub mod launch;

/// `kind` of the mean absolute error.
pub const L1: usize = 0;
/// `kind` of the mean squared error.
pub const L2: usize = 1;
/// `kind` of the Huber loss.
pub const HUBER: usize = 2;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use super::{L1, L2};
    use crate::Real;
    use crate::generated::loss_regression::{Backward, Dims, Forward, Params};

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let sum: f64 = a.pred.iter().zip(a.target).map(|(p, t)| rho(a.params, p.f64() - t.f64())).sum();
        a.loss[0] = T::from_f64(sum / count(a.dims));
    }

    /// Backward pass.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let Some(dpred) = a.dpred else { return };
        let scale = a.dloss[0].f64() / count(a.dims);
        for (d, (p, t)) in dpred.iter_mut().zip(a.pred.iter().zip(a.target)) {
            *d = T::from_f64(scale * slope(a.params, p.f64() - t.f64()));
        }
    }

    fn count(dims: Dims) -> f64 {
        (dims.b * dims.n * dims.d) as f64
    }

    fn rho(params: Params, e: f64) -> f64 {
        let delta = f64::from(params.delta);
        match params.kind {
            L1 => e.abs(),
            L2 => e * e,
            _ if e.abs() <= delta => 0.5 * e * e,
            _ => delta * (e.abs() - 0.5 * delta),
        }
    }

    fn slope(params: Params, e: f64) -> f64 {
        let delta = f64::from(params.delta);
        match params.kind {
            L1 if e == 0.0 => 0.0,
            L1 => e.signum(),
            L2 => 2.0 * e,
            _ => e.clamp(-delta, delta),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{HUBER, L1, L2, cpu, reference};
    use crate::Tier;
    use crate::check::{Fill, Tolerance, assert_close, draw_f32};
    use crate::generated::loss_regression::{Backward, CASES, Dims, Forward, Params};

    #[test]
    fn by_hand() {
        // Errors -3, 0, 0.5, 1.
        let (pred, target) = ([-2.0f64, 5.0, 1.5, 2.0], [1.0, 5.0, 1.0, 1.0]);
        let dims = Dims { b: 1, n: 2, d: 2 };
        for (kind, want, slopes) in [
            (L1, 4.5, [-1.0, 0.0, 1.0, 1.0]),
            (L2, 10.25, [-6.0, 0.0, 1.0, 2.0]),
            (HUBER, 2.5 + 0.125 + 0.5, [-1.0, 0.0, 0.5, 1.0]),
        ] {
            let (params, mut loss, mut dpred) = (Params { kind, delta: 1.0 }, [0.0], [0.0; 4]);
            reference::forward(Forward { dims, params, pred: &pred, target: &target, loss: &mut loss });
            assert_eq!(loss[0], want / 4.0, "kind {kind}");
            reference::backward(Backward {
                dims,
                params,
                dloss: &[4.0],
                pred: &pred,
                target: &target,
                dpred: Some(&mut dpred),
            });
            assert_eq!(dpred, slopes, "kind {kind}");
        }
    }

    #[test]
    fn cpu_agrees_with_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let (dims, params, len) = (case.dims, case.params, case.dims.b * case.dims.n * case.dims.d);
            let draw = |name, len| draw_f32(case.name, name, len, Fill::Normal);
            let (pred, target, dloss) = (draw("pred", len), draw("target", len), draw("dloss", 1));
            let run = |forward: fn(Forward<'_, f32>), backward: fn(Backward<'_, f32>)| {
                let (mut loss, mut dpred) = (vec![0.0], vec![0.0; len]);
                forward(Forward { dims, params, pred: &pred, target: &target, loss: &mut loss });
                backward(Backward {
                    dims,
                    params,
                    dloss: &dloss,
                    pred: &pred,
                    target: &target,
                    dpred: Some(&mut dpred),
                });
                (loss, dpred)
            };
            let (got, want) = (run(cpu::forward, cpu::backward), run(reference::forward, reference::backward));
            assert_close(&format!("{}: loss", case.name), &got.0, &want.0, Tolerance::F32);
            assert_close(&format!("{}: dpred", case.name), &got.1, &want.1, Tolerance::F32);
        }
    }
}
