//! Coefficients of the training loss with learned-range variance (arXiv 2102.09672, as DiT trains); the operator
//! `loss_diffusion` is the loss itself, and its contract the formulas.

use crate::error::{Error, Result};
use crate::sample::schedule::Schedule;

/// Everything the loss needs to know about one sample's timestep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossCoefs {
    /// √ᾱ_t: weight of the clean latent in x_t.
    pub signal: f64,
    /// √(1-ᾱ_t): weight of the noise in x_t.
    pub sigma: f64,
    /// β/√(α(1-ᾱ)): mean of q(x_{t-1} | x_t, x_0) minus mean of p(x_{t-1} | x_t), per unit of eps - noise.
    pub gap: f64,
    /// Log variance at v = -1, also that of q: the posterior's, clipped.
    pub log_lo: f64,
    /// Log variance at v = +1, which is ln β_t, less `log_lo`. The two agree to 1e-6 at large t: their difference is
    /// taken here, in f64, and rounded afterwards.
    pub log_range: f64,
    /// Whether t = 0, where the likelihood of x_0 replaces the divergence of q from p.
    pub first: bool,
}

impl LossCoefs {
    /// Coefficients of timestep `t`.
    ///
    /// # Errors
    /// A failure when `t` is not a timestep of the schedule.
    pub fn new(schedule: &Schedule, t: usize) -> Result<Self> {
        if t >= schedule.len() {
            return Err(Error::failure("training loss", "timestep out of range")
                .is(t)
                .must(format!("0 to {}", schedule.len() - 1)));
        }
        let (beta, alpha_bar) = (schedule.beta(t), schedule.alpha_bar(t));
        let sigma = (1.0 - alpha_bar).sqrt();
        let log_lo = schedule.log_posterior_variance_clipped(t);
        Ok(LossCoefs {
            signal: alpha_bar.sqrt(),
            sigma,
            gap: beta / ((1.0 - beta).sqrt() * sigma),
            log_lo,
            log_range: beta.ln() - log_lo,
            first: t == 0,
        })
    }

    /// The sample's row of the input `coefs` of `loss_diffusion`.
    pub fn row(&self) -> [f32; 4] {
        [self.gap as f32, self.log_lo as f32, self.log_range as f32, f32::from(self.first)]
    }

    /// The sample's row of the input `coefs` of `add_noise`.
    pub fn noise_row(&self) -> [f32; 2] {
        [self.signal as f32, self.sigma as f32]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{add_noise, contracts, loss_diffusion, loss_diffusion_backward};
    use crate::sample::golden::{Case, assert_close};
    use crate::tensor::{Device, Tensor};
    use graft_kernels::generated::loss_diffusion as kernel;

    const PARAMS: kernel::Params = kernel::Params { vlb_weight: 1.0 };

    /// The golden batch: 4 samples of 4 channels, 36 pixels each.
    fn batch(case: &Case) -> Vec<LossCoefs> {
        let schedule = Schedule::default();
        case.input("t").into_iter().map(|t| LossCoefs::new(&schedule, t as usize).unwrap()).collect()
    }

    /// With coefficients that were never rounded the operator's oracle meets the stored values to their last bit.
    #[test]
    fn golden_in_f64() {
        let case = Case::open("samplers/training_loss");
        let rows = batch(&case);
        let (x0, noise, output) = (case.input("x0"), case.input("noise"), case.input("model_output"));
        let coefs: Vec<f64> =
            rows.iter().flat_map(|c| [c.gap, c.log_lo, c.log_range, f64::from(u8::from(c.first))]).collect();
        let (x0, noise, model_output, coefs) = (&x0[..], &noise[..], &output[..], &coefs[..]);
        let dims = kernel::Dims { b: 4, c: 4, s: 36 };
        let (mut loss, mut mse, mut vb, mut grad) = ([0.0], [0.0; 4], [0.0; 4], [0.0; 4 * 8 * 36]);
        graft_kernels::loss_diffusion::reference::forward(kernel::Forward {
            dims,
            params: PARAMS,
            model_output,
            x0,
            noise,
            coefs,
            loss: &mut loss,
            mse: &mut mse,
            vb: &mut vb,
        });
        graft_kernels::loss_diffusion::reference::backward(kernel::Backward {
            dims,
            params: PARAMS,
            dloss: &[1.0],
            model_output,
            x0,
            noise,
            coefs,
            dmodel_output: Some(&mut grad),
        });
        let x_t: Vec<f64> =
            (0..x0.len()).map(|i| rows[i / 144].signal * x0[i] + rows[i / 144].sigma * noise[i]).collect();
        let sums: Vec<f64> = mse.iter().zip(&vb).map(|(a, b)| a + b).collect();
        let got: [(&str, &[f64]); 5] =
            [("mse", &mse), ("vb", &vb), ("loss", &sums), ("x_t", &x_t), ("grad.model_output", &grad)];
        for (name, got) in got {
            let want = case.expected(name);
            let largest = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            assert_close(name, got, &want, (largest * 6e-8, 6e-8));
        }
        assert!((loss[0] - sums.iter().sum::<f64>() / 4.0).abs() < 1e-12);
    }

    #[test]
    fn golden_through_the_operator() {
        let case = Case::open("samplers/training_loss");
        let rows = batch(&case);
        for device in [Device::cpu(), Device::oracle()] {
            let input =
                |name: &str, channels| Tensor::from_f32(&device, &[4, channels, 36], &case.input_f32(name)).unwrap();
            let (x0, noise, output) = (input("x0", 4), input("noise", 4), input("model_output", 8));
            let each = rows.iter().flat_map(LossCoefs::row).collect::<Vec<_>>();
            let coefs = Tensor::from_f32(&device, &[4, 4], &each).unwrap();
            let weights = rows.iter().flat_map(LossCoefs::noise_row).collect::<Vec<_>>();
            let weights = Tensor::from_f32(&device, &[4, 2], &weights).unwrap();
            let flat = |t: &Tensor| t.reshape(&[4, 144]).unwrap();
            let x_t = add_noise(&flat(&x0), &flat(&noise), &weights, contracts::add_noise::Params {}).unwrap();
            let out = loss_diffusion(&output, &x0, &noise, &coefs, PARAMS).unwrap();
            let one = Tensor::from_f32(&device, &[1], &[1.0]).unwrap();
            let grad = loss_diffusion_backward(&one, &output, &x0, &noise, &coefs, true, PARAMS).unwrap().unwrap();
            let wide = |t: &Tensor| t.f32s().unwrap().iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
            let (grad, want) = (wide(&grad), case.expected("grad.model_output"));
            assert_close("x_t", &wide(&x_t), &case.expected("x_t"), (5e-7, 2e-7));
            assert_close("mse", &wide(&out.mse), &case.expected("mse"), case.tolerance("mse (f32)"));
            assert_close("vb", &wide(&out.vb), &case.expected("vb"), case.tolerance("vb (f32)"));
            let mean = case.expected("loss").iter().sum::<f64>() / 4.0;
            assert_close("loss", &wide(&out.loss), &[mean], (2e-6, 1e-6));
            assert_close("grad", &grad, &want, (2e-6, 1e-5));
            // The gradient in v shrinks to 1e-6 of that in eps at t = 999: each sample by its own size.
            for (sample, want) in want.chunks(288).enumerate() {
                let got = &grad[sample * 288 + 144..(sample + 1) * 288];
                assert_close(&format!("v of sample {sample}"), got, &want[144..], (f64::INFINITY, 3e-6));
            }
        }
    }

    /// The gap form must equal the textbook one, which goes through x_t and the posterior mean.
    #[test]
    fn gap_is_the_difference_of_posterior_means() {
        let schedule = Schedule::default();
        let (x0, noise, eps) = (0.3, -1.2, 0.7);
        for t in [0, 1, 17, 500, 999] {
            let c = LossCoefs::new(&schedule, t).unwrap();
            let x_t = c.signal * x0 + c.sigma * noise;
            let estimate = (x_t - c.sigma * eps) / c.signal;
            let (w0, wt) = schedule.posterior_mean_coefs(t);
            let difference = (w0 * x0 + wt * x_t) - (w0 * estimate + wt * x_t);
            assert!((c.gap * (eps - noise) - difference).abs() < 1e-9 * difference.abs(), "{t}");
        }
    }

    #[test]
    fn the_range_of_log_variances_keeps_its_digits() {
        // At t = 999 the variances differ by the factor (1-ᾱ_t)/(1-ᾱ_{t-1}) = 1 + β ᾱ_{t-1}/(1-ᾱ_{t-1}).
        let schedule = Schedule::default();
        let before = schedule.alpha_bar(998);
        let want = (schedule.beta(999) * before / (1.0 - before)).ln_1p();
        let [_, _, range, _] = LossCoefs::new(&schedule, 999).unwrap().row();
        assert!(want < 1e-6 && (f64::from(range) / want - 1.0).abs() < 1e-7, "{range:e} {want:e}");
    }

    #[test]
    fn misuse_is_refused() {
        let e = LossCoefs::new(&Schedule::default(), 1000).unwrap_err();
        assert!(e.to_string().contains("is 1000; must be 0 to 999"));
    }
}
