//! Cross-entropy of a classifier: see `op.toml` for the formulas.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::generated::cross_entropy::{Backward, Forward};

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let mut total = 0.0;
        for (b, row) in a.logits.chunks_exact(a.dims.k).enumerate() {
            // The largest logit is taken out, so that no exponential overflows.
            let top = row.iter().fold(f64::NEG_INFINITY, |m, v| m.max(v.f64()));
            let lse = top + row.iter().map(|v| (v.f64() - top).exp()).sum::<f64>().ln();
            a.lse[b] = T::from_f64(lse);
            total += lse - row[a.labels[b] as usize].f64();
        }
        a.loss[0] = T::from_f64(total / a.dims.b as f64);
    }

    /// Backward pass.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let Some(dlogits) = a.dlogits else { return };
        let scale = a.dloss[0].f64() / a.dims.b as f64;
        for b in 0..a.dims.b {
            for k in 0..a.dims.k {
                let probability = (a.logits[b * a.dims.k + k].f64() - a.lse[b].f64()).exp();
                let target = f64::from(a.labels[b] as usize == k);
                dlogits[b * a.dims.k + k] = T::from_f64(scale * (probability - target));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Tier;
    use crate::check::{Fill, Tolerance, assert_close, draw_f32, draw_i32};
    use crate::generated::cross_entropy::{Backward, CASES, Dims, Forward, Params};

    type Paths = (fn(Forward<'_, f32>), fn(Backward<'_, f32>));

    fn run((forward, backward): Paths, dims: Dims, logits: &[f32], labels: &[i32], dloss: f32) -> [Vec<f32>; 3] {
        let (mut loss, mut lse, mut dlogits) = (vec![0.0], vec![0.0; dims.b], vec![0.0; logits.len()]);
        forward(Forward { dims, params: Params {}, logits, labels, loss: &mut loss, lse: &mut lse });
        let dlogits_out = Some(&mut dlogits[..]);
        backward(Backward {
            dims,
            params: Params {},
            dloss: &[dloss],
            logits,
            labels,
            lse: &lse,
            dlogits: dlogits_out,
        });
        [loss, lse, dlogits]
    }

    const ORACLE: Paths = (reference::forward, reference::backward);
    const CPU: Paths = (cpu::forward, cpu::backward);

    #[test]
    fn by_hand() {
        // Odds 1 : 3 and 1 : 1; the wanted classes have probabilities 3/4 and 1/2.
        let (ln2, ln3) = (std::f32::consts::LN_2, 3f32.ln());
        for paths in [ORACLE, CPU] {
            let dims = Dims { b: 2, k: 2 };
            let [loss, lse, dlogits] = run(paths, dims, &[0.0, ln3, 5.0, 5.0], &[1, 0], 2.0);
            assert_close("loss", &loss, &[0.5 * (3.0 * ln2 - ln3)], Tolerance::F32);
            assert_close("lse", &lse, &[2.0 * ln2, 5.0 + ln2], Tolerance::F32);
            assert_close("dlogits", &dlogits, &[0.25, -0.25, -0.5, 0.5], Tolerance::F32);
        }
    }

    #[test]
    fn large_logits_do_not_overflow() {
        for paths in [ORACLE, CPU] {
            let [loss, lse, dlogits] = run(paths, Dims { b: 1, k: 3 }, &[1e4, -1e4, 0.0], &[1], 1.0);
            assert_eq!((loss[0], lse[0]), (2e4, 1e4));
            assert_eq!(dlogits, [1.0, -1.0, 0.0]);
        }
    }

    #[test]
    fn cpu_agrees_with_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let Dims { b, k } = case.dims;
            let logits = draw_f32(case.name, "logits", b * k, Fill::Normal);
            let labels = draw_i32(case.name, "labels", b, Fill::Index(k));
            let dloss = draw_f32(case.name, "dloss", 1, Fill::Normal)[0];
            let (got, want) =
                (run(CPU, case.dims, &logits, &labels, dloss), run(ORACLE, case.dims, &logits, &labels, dloss));
            for (i, what) in ["loss", "lse", "dlogits"].into_iter().enumerate() {
                assert_close(&format!("{}: {what}", case.name), &got[i], &want[i], Tolerance::F32);
            }
        }
    }
}
