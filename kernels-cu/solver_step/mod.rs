//! One fused sampler step: see `op.toml` for the formula.
//!
//! Every linear sampler is a choice of factors: ancestral (cx, c0 and the learned noise), DDIM (c0, ce), the
//! second-order DPM-Solver++ (cx, c0, c1).

pub mod cpu;
pub mod launch;

/// The oracle: plain loops in f64.
pub mod reference {
    use crate::Real;
    use crate::generated::solver_step::{Dims, Forward};

    /// The step.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, c, co, s } = a.dims;
        let p = a.params;
        let f = |x: f32| -> f64 { x.into() };
        for i in 0..b * c * s {
            let (sample, channel, pixel) = (i / (c * s), i / s % c, i % s);
            let output = |channel: usize| {
                let at = (sample * co + channel) * s + pixel;
                let cond = a.cond[at].f64();
                match a.uncond {
                    Some(uncond) if channel < p.guided_channels => {
                        uncond[at].f64() + f(p.guidance) * (cond - uncond[at].f64())
                    }
                    _ => cond,
                }
            };
            let (x, eps) = (a.x[i].f64(), output(channel));
            let x0 = f(p.inv_alpha) * (x - f(p.sigma) * eps);
            let scale = if p.learned && p.cn != 0.0 {
                let fraction = (output(c + channel) + 1.0) / 2.0;
                (0.5 * (fraction * f(p.log_hi) + (1.0 - fraction) * f(p.log_lo))).exp()
            } else {
                f(p.cn)
            };
            let previous = a.x0_prev.map_or(0.0, |x0_prev| f(p.c1) * x0_prev[i].f64());
            let noise = a.noise.map_or(0.0, |noise| scale * noise[i].f64());
            a.x_next[i] = T::from_f64(f(p.cx) * x + f(p.ce) * eps + f(p.c0) * x0 + previous + noise);
            a.x0[i] = T::from_f64(x0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Tier;
    use crate::check::{Fill, Tolerance, assert_close, draw_f32};
    use crate::generated::solver_step::{CASES, Dims, Forward, Params};

    #[test]
    fn by_hand() {
        // Two channels, the first guided: eps = [1 + 3(2 - 1), 5] = [4, 5]; x0 = 2(x - eps/2) = 2x - eps.
        let dims = Dims { b: 1, c: 2, co: 4, s: 1 };
        let params = Params {
            guidance: 3.0,
            guided_channels: 1,
            inv_alpha: 2.0,
            sigma: 0.5,
            cx: 1.0,
            ce: 10.0,
            c0: 100.0,
            c1: 1000.0,
            cn: 1.0,
            learned: true,
            log_hi: 0.0,
            log_lo: -1.0,
        };
        let (mut x_next, mut x0) = ([0.0f64; 2], [0.0; 2]);
        reference::forward(Forward {
            dims,
            params,
            x: &[1.0, 2.0],
            cond: &[2.0, 5.0, 1.0, -1.0],
            uncond: Some(&[1.0, 77.0, 77.0, 77.0]),
            noise: Some(&[0.25, 1.0]),
            x0_prev: Some(&[1.0, -1.0]),
            x_next: &mut x_next,
            x0: &mut x0,
        });
        assert_eq!(x0, [-2.0, -1.0]);
        // v = 1 chooses log_hi, a deviation of 1; v = -1 chooses log_lo, a deviation of e^-1/2.
        let want = [1.0 + 40.0 - 200.0 + 1000.0 + 0.25, 2.0 + 50.0 - 100.0 - 1000.0 + (-0.5f64).exp()];
        assert_eq!(x_next, want);
    }

    #[test]
    fn cpu_agrees_with_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let (dims, params) = (case.dims, case.params);
            let Dims { b, c, co, s } = dims;
            let draw = |name, len| draw_f32(case.name, name, len, Fill::Normal);
            let (x, cond, uncond) = (draw("x", b * c * s), draw("cond", b * co * s), draw("uncond", b * co * s));
            let (noise, x0_prev) = (draw("noise", b * c * s), draw("x0_prev", b * c * s));
            let run = |forward: fn(Forward<'_, f32>)| {
                let (mut x_next, mut x0) = (vec![0.0; b * c * s], vec![0.0; b * c * s]);
                forward(Forward {
                    dims,
                    params,
                    x: &x,
                    cond: &cond,
                    uncond: (!case.absent.contains(&"uncond")).then_some(&uncond),
                    noise: (!case.absent.contains(&"noise")).then_some(&noise),
                    x0_prev: (!case.absent.contains(&"x0_prev")).then_some(&x0_prev),
                    x_next: &mut x_next,
                    x0: &mut x0,
                });
                (x_next, x0)
            };
            let (got, want) = (run(cpu::forward), run(reference::forward));
            assert_close(&format!("{}: x_next", case.name), &got.0, &want.0, Tolerance::F32);
            assert_close(&format!("{}: x0", case.name), &got.1, &want.1, Tolerance::F32);
        }
    }
}
