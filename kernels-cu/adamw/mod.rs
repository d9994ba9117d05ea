//! One AdamW step in place: see `op.toml` for the formula.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops in f64.
pub mod reference {
    use crate::Real;
    use crate::generated::adamw::Forward;

    /// The step.
    pub fn forward<T: Real>(mut a: Forward<'_, T>) {
        let p = a.params;
        let [lr, rate1, rate2, eps, decay] = [p.lr, p.rate1, p.rate2, p.eps, p.weight_decay].map(f64::from);
        let [bias1, bias2, grad_scale, ema_rate] = [p.bias1, p.bias2, p.grad_scale, p.ema_rate].map(f64::from);
        for i in 0..a.dims.l {
            let g = grad_scale * a.grad[i].f64();
            let m = a.m[i].f64() + rate1 * (g - a.m[i].f64());
            let v = a.v[i].f64() + rate2 * (g * g - a.v[i].f64());
            let param = (1.0 - lr * decay) * a.param[i].f64() - lr / bias1 * m / (v.sqrt() / bias2.sqrt() + eps);
            (a.m[i], a.v[i], a.param[i]) = (T::from_f64(m), T::from_f64(v), T::from_f64(param));
            if let Some(ema) = &mut a.ema {
                ema[i] = T::from_f64(ema[i].f64() + ema_rate * (param - ema[i].f64()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Tier;
    use crate::check::{Fill, Tolerance, assert_close, draw_f32};
    use crate::generated::adamw::{CASES, Dims, Forward, Params};

    #[test]
    fn two_steps_of_torch() {
        // torch.optim.AdamW([1.0], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1), gradients 0.5 and -0.25.
        let torch = [0.890_000_002, 0.854_430_059_747_933_4];
        let (mut param, mut m, mut v, mut ema) = ([1.0f64], [0.0], [0.0], [1.0]);
        let mut step = |grad: f64, bias1: f32, bias2: f32| {
            let params = Params {
                lr: 0.1,
                rate1: 0.1,
                rate2: 0.01,
                eps: 1e-8,
                weight_decay: 0.1,
                bias1,
                bias2,
                grad_scale: 1.0,
                ema_rate: 0.5,
            };
            let grad = &[grad];
            let (m, v, ema) = (&mut m[..], &mut v[..], Some(&mut ema[..]));
            reference::forward(Forward { dims: Dims { l: 1 }, params, grad, param: &mut param, m, v, ema });
            param[0]
        };
        assert!((step(0.5, 0.1, 0.01) - torch[0]).abs() < 1e-6);
        assert!((step(-0.25, 0.19, 0.0199) - torch[1]).abs() < 1e-6);
        assert!((ema[0] - (0.25 + 0.25 * torch[0] + 0.5 * torch[1])).abs() < 1e-6);
    }

    /// A decay of 0.9999 or more, as f32, is off by up to 3e-8: 3e-4 of one less it.
    #[test]
    fn slow_averages_keep_their_rate() {
        let params = Params {
            lr: 0.0,
            rate1: 1e-4,
            rate2: 1e-6,
            eps: 1.0,
            weight_decay: 0.0,
            bias1: 1.0,
            bias2: 1.0,
            grad_scale: 1.0,
            ema_rate: 1e-5,
        };
        for forward in [reference::forward::<f32>, cpu::forward] {
            let (mut m, mut v, mut ema) = ([0.0], [0.0], [0.0]);
            let (m_, v_, some_ema) = (&mut m[..], &mut v[..], Some(&mut ema[..]));
            let dims = Dims { l: 1 };
            forward(Forward { dims, params, grad: &[2.0], param: &mut [3.0], m: m_, v: v_, ema: some_ema });
            for (got, want) in [(m[0], 2e-4), (v[0], 4e-6), (ema[0], 3e-5)] {
                assert!((got / want - 1.0).abs() < 2e-7, "{got:e} {want:e}");
            }
        }
    }

    #[test]
    fn cpu_agrees_with_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let (dims, params, l) = (case.dims, case.params, case.dims.l);
            let draw = |name, fill| draw_f32(case.name, name, l, fill);
            let grad = draw("grad", Fill::Normal);
            let run = |forward: fn(Forward<'_, f32>)| {
                let (mut param, mut m) = (draw("param", Fill::Normal), draw("m", Fill::Normal));
                let (mut v, mut ema) = (draw("v", Fill::Positive), draw("ema", Fill::Normal));
                let some_ema = (!case.absent.contains(&"ema")).then_some(&mut ema[..]);
                forward(Forward { dims, params, grad: &grad, param: &mut param, m: &mut m, v: &mut v, ema: some_ema });
                [param, m, v, ema]
            };
            let (got, want) = (run(cpu::forward), run(reference::forward));
            for (name, (got, want)) in ["param", "m", "v", "ema"].iter().zip(got.iter().zip(&want)) {
                assert_close(&format!("{}: {name}", case.name), got, want, Tolerance::F32);
            }
        }
    }
}
