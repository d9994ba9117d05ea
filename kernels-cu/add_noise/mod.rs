//! The forward diffusion process: see `op.toml`.

pub mod cpu;
pub mod launch;

/// The oracle.
pub mod reference {
    use crate::Real;
    use crate::generated::add_noise::{Dims, Forward};

    /// The mixture.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, l } = a.dims;
        for i in 0..b * l {
            let (signal, sigma) = (a.coefs[i / l * 2].f64(), a.coefs[i / l * 2 + 1].f64());
            a.x_t[i] = T::from_f64(signal * a.x0[i].f64() + sigma * a.noise[i].f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Tier;
    use crate::check::{Fill, Tolerance, assert_close, draw_f32};
    use crate::generated::add_noise::{CASES, Dims, Forward, Params};

    #[test]
    fn by_hand() {
        let mut x_t = [0.0f64; 4];
        let (dims, params) = (Dims { b: 2, l: 2 }, Params {});
        let (x0, noise, coefs) = (&[1.0, 2.0, 3.0, 4.0], &[10.0, 20.0, 30.0, 40.0], &[0.5, 0.25, 0.0, 1.0]);
        reference::forward(Forward { dims, params, x0, noise, coefs, x_t: &mut x_t });
        assert_eq!(x_t, [3.0, 6.0, 30.0, 40.0]);
    }

    #[test]
    fn cpu_agrees_with_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let (dims, params, len) = (case.dims, case.params, case.dims.b * case.dims.l);
            let draw = |name| draw_f32(case.name, name, len, Fill::Normal);
            let (x0, noise) = (draw("x0"), draw("noise"));
            let coefs = draw_f32(case.name, "coefs", 2 * dims.b, Fill::Uniform(0.0, 1.0));
            let (mut got, mut want) = (vec![0.0; len], vec![0.0; len]);
            cpu::forward(Forward { dims, params, x0: &x0, noise: &noise, coefs: &coefs, x_t: &mut got });
            reference::forward(Forward { dims, params, x0: &x0, noise: &noise, coefs: &coefs, x_t: &mut want });
            assert_close(case.name, &got, &want, Tolerance::F32);
        }
    }
}
