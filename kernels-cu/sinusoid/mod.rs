//! Sinusoidal timestep features: see `op.toml` for the formula.
//!
//! At t = 999 one unit in the last place of a frequency moves the phase by 1e-4, so "equal to the original" means
//! rounding where the original rounds: exponent, frequency and phase are f32 here in every path.

pub mod cpu;
pub mod launch;

/// Frequency `i`, rounded to f32 after each operation. The exponential itself is exact before its rounding.
pub fn frequency(i: usize, denominator: f32) -> f32 {
    const MINUS_LN_10000: f32 = -9.210_340_5;
    let exponent = MINUS_LN_10000 * i as f32 / denominator;
    f64::from(exponent).exp() as f32
}

/// The oracle: cosine and sine in f64 of the f32 phase.
pub mod reference {
    use super::frequency;
    use crate::Real;
    use crate::generated::sinusoid::{Dims, Forward};

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, d } = a.dims;
        let half = d / 2;
        for sample in 0..b {
            for i in 0..half {
                let phase = f64::from(a.t[sample].f64() as f32 * frequency(i, a.params.denominator));
                a.y[sample * d + i] = T::from_f64(phase.cos());
                a.y[sample * d + half + i] = T::from_f64(phase.sin());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Tier;
    use crate::check::{Fill, Tolerance, assert_close, draw_f32, golden};
    use crate::generated::sinusoid::{CASES, Dims, Forward, Params};

    #[test]
    fn golden_features() {
        let case = "dit_original/forward_and_gradients";
        let (t, want) = (golden(case, "inputs", "t"), golden(case, "expected", "timestep_sinusoid"));
        let (dims, params) = (Dims { b: 3, d: 256 }, Params { denominator: 128.0 });
        for forward in [cpu::forward, reference::forward::<f32>] {
            let mut y = vec![0.0; 3 * 256];
            forward(Forward { dims, params, t: &t, y: &mut y });
            // Where another library's f32 exponential rounds to a neighbour, 999 times half a unit in the last place
            // moves the phase by 3e-5; it does so for a few frequencies only, and the others agree to the last bits.
            assert_close("timestep_sinusoid", &y, &want, Tolerance { atol: 3e-5, rtol: 0.0, rms: 2e-6 });
            let apart = y.iter().zip(&want).filter(|(y, want)| (*y - *want).abs() > 1.2e-7).count();
            assert!(apart <= 16, "{apart} of 768 features apart");
        }
    }

    #[test]
    fn cpu_agrees_with_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let (dims, params) = (case.dims, case.params);
            let t = draw_f32(case.name, "t", dims.b, Fill::Uniform(0.0, 1000.0));
            let (mut got, mut want) = (vec![0.0; dims.b * dims.d], vec![0.0; dims.b * dims.d]);
            cpu::forward(Forward { dims, params, t: &t, y: &mut got });
            reference::forward(Forward { dims, params, t: &t, y: &mut want });
            assert_close(case.name, &got, &want, Tolerance::F32);
        }
    }
}
