//! Terms of the training loss with learned-range variance (arXiv 2102.09672, as DiT trains), and their gradient.
//!
//! Per sample: `mse`, the mean of (noise - eps)², which trains eps; and `vb`, a variational-bound term in bits per
//! element with eps detached, which trains only the variance channels v. For t > 0 `vb` is
//! KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)); for t = 0 it is the negative log-likelihood of x_0 under a Gaussian
//! discretised to bins of width 2/255.
//!
//! Both need only the difference of two means, and since x_t = √ᾱ x_0 + √(1-ᾱ) noise exactly, that difference is
//! `gap · (eps - noise)` with gap = β/√(α(1-ᾱ)): x_t drops out, and with it the division by a tiny √ᾱ at large t.

use crate::error::{Error, Result};
use crate::sample::real::Real;
use crate::sample::schedule::Schedule;
use std::f64::consts::{FRAC_2_PI, LN_2};

/// Everything the loss needs to know about one sample's timestep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossCoefs {
    /// √ᾱ_t: weight of the clean latent in x_t.
    pub signal: f64,
    /// √(1-ᾱ_t): weight of the noise in x_t.
    pub sigma: f64,
    /// β/√(α(1-ᾱ)): mean of q minus mean of p, per unit of eps - noise.
    pub gap: f64,
    /// Log variance at v = -1, also that of q: the posterior's, clipped.
    pub log_lo: f64,
    /// Log variance at v = +1: ln β_t.
    pub log_hi: f64,
    /// Whether t = 0, where the likelihood replaces the divergence.
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
        Ok(LossCoefs {
            signal: alpha_bar.sqrt(),
            sigma,
            gap: beta / ((1.0 - beta).sqrt() * sigma),
            log_lo: schedule.log_posterior_variance_clipped(t),
            log_hi: beta.ln(),
            first: t == 0,
        })
    }
}

/// Loss terms of one sample, both averaged over its elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossTerms {
    /// Mean squared error of the noise prediction.
    pub mse: f64,
    /// Variational-bound term, in bits.
    pub vb: f64,
}

/// Noised latent x_t = √ᾱ x0 + √(1-ᾱ) noise, element by element; the slices have one length.
///
/// # Errors
/// A failure when the lengths differ.
pub fn add_noise<R: Real>(coefs: &LossCoefs, x0: &[R], noise: &[R], x_t: &mut [R]) -> Result<()> {
    check_length("noise", noise.len(), x0.len())?;
    check_length("x_t", x_t.len(), x0.len())?;
    let (signal, sigma) = (R::from_f64(coefs.signal), R::from_f64(coefs.sigma));
    for ((out, &x0), &noise) in x_t.iter_mut().zip(x0).zip(noise) {
        *out = signal * x0 + sigma * noise;
    }
    Ok(())
}

/// Loss terms of one sample.
///
/// `x0` and `noise` have n elements [C, …]; `model_output` has 2n [2C, …]: first eps, then v.
/// Elements are computed in `R`, their sums in f64.
///
/// # Errors
/// A failure when the lengths do not fit.
pub fn forward<R: Real>(coefs: &LossCoefs, x0: &[R], noise: &[R], model_output: &[R]) -> Result<LossTerms> {
    check_sample(x0, noise, model_output.len())?;
    let (eps, v) = model_output.split_at(x0.len());
    let (mut mse, mut vb) = (0.0, 0.0);
    for i in 0..x0.len() {
        let error = eps[i] - noise[i];
        mse += (error * error).to_f64();
        vb += variance_term(coefs, x0[i], error, v[i]).0.to_f64();
    }
    let n = x0.len() as f64;
    Ok(LossTerms { mse: mse / n, vb: vb / (n * LN_2) })
}

/// Gradient of `weight · (mse + vb)` of one sample with respect to `model_output`, written to `grad` (2n elements);
/// for the mean over a batch `weight` is 1/B. Shapes as in [`forward`].
///
/// # Errors
/// A failure when the lengths do not fit.
pub fn backward<R: Real>(
    coefs: &LossCoefs,
    x0: &[R],
    noise: &[R],
    model_output: &[R],
    weight: f64,
    grad: &mut [R],
) -> Result<()> {
    check_sample(x0, noise, model_output.len())?;
    check_length("grad", grad.len(), model_output.len())?;
    let n = x0.len();
    let (eps, v) = model_output.split_at(n);
    let (grad_eps, grad_v) = grad.split_at_mut(n);
    let mse_scale = R::from_f64(2.0 * weight / n as f64);
    // d logvar / dv = ½(log_hi - log_lo).
    let vb_scale = R::from_f64(0.5 * (coefs.log_hi - coefs.log_lo) * weight / (n as f64 * LN_2));
    for i in 0..n {
        let error = eps[i] - noise[i];
        grad_eps[i] = mse_scale * error;
        grad_v[i] = vb_scale * variance_term(coefs, x0[i], error, v[i]).1;
    }
    Ok(())
}

/// One element's bound term in nats and its derivative with respect to the log variance.
fn variance_term<R: Real>(coefs: &LossCoefs, x0: R, error: R, v: R) -> (R, R) {
    let real = R::from_f64;
    let half = real(0.5);
    let f = half * (v + real(1.0));
    let log_variance = f * real(coefs.log_hi) + (real(1.0) - f) * real(coefs.log_lo);
    let gap = real(coefs.gap) * error;
    if coefs.first {
        return discretised_nll(x0, gap, log_variance);
    }
    // KL of two Gaussians: ½(lv - lq - 1 + e^{lq-lv} + gap² e^{-lv}).
    let excess = real(coefs.log_lo) - log_variance;
    let ratio = excess.exp();
    let distance = gap * gap * (-log_variance).exp();
    (half * (-excess - real(1.0) + ratio + distance), half * (real(1.0) - ratio - distance))
}

/// Half width of a bin of the discretised likelihood: 8-bit values scaled to -1..=1.
const HALF_BIN: f64 = 1.0 / 255.0;
/// Beyond this magnitude a value falls in an outermost, half-infinite bin.
const EDGE: f64 = 0.999;
/// Probabilities are not taken below this.
const LEAST_PROBABILITY: f64 = 1e-12;

/// -ln of the probability of x's bin under a Gaussian with mean x - centred, and its derivative by the log variance.
fn discretised_nll<R: Real>(x: R, centred: R, log_variance: R) -> (R, R) {
    let real = R::from_f64;
    let inverse = (-real(0.5) * log_variance).exp();
    let (upper, lower) = (inverse * (centred + real(HALF_BIN)), inverse * (centred - real(HALF_BIN)));
    let ((cdf_upper, slope_upper), (cdf_lower, slope_lower)) = (normal_cdf(upper), normal_cdf(lower));
    // Each bound u scales with e^{-lv/2}, so du/dlv = -u/2.
    let (rise_upper, rise_lower) = (-real(0.5) * upper * slope_upper, -real(0.5) * lower * slope_lower);
    let (p, rise) = if x < real(-EDGE) {
        (cdf_upper, rise_upper)
    } else if x > real(EDGE) {
        (real(1.0) - cdf_lower, -rise_lower)
    } else {
        (cdf_upper - cdf_lower, rise_upper - rise_lower)
    };
    if p < real(LEAST_PROBABILITY) {
        return (-real(LEAST_PROBABILITY).ln(), real(0.0));
    }
    let log_p = p.ln();
    // 1/p without a division: exp(-ln p).
    (-log_p, -rise * (-log_p).exp())
}

/// The tanh approximation of the standard normal distribution function, and its derivative.
fn normal_cdf<R: Real>(u: R) -> (R, R) {
    let real = R::from_f64;
    let (scale, cubic) = (real(FRAC_2_PI.sqrt()), real(0.044715));
    let square = u * u;
    let tanh = (scale * u * (real(1.0) + cubic * square)).tanh();
    let slope = real(0.5) * (real(1.0) - tanh * tanh) * scale * (real(1.0) + real(3.0) * cubic * square);
    (real(0.5) * (real(1.0) + tanh), slope)
}

fn check_sample<R>(x0: &[R], noise: &[R], outputs: usize) -> Result<()> {
    if x0.is_empty() {
        return Err(Error::failure("training loss", "sample has no elements").is(0).must("at least 1"));
    }
    check_length("noise", noise.len(), x0.len())?;
    check_length("model_output", outputs, 2 * x0.len())
}

fn check_length(name: &str, len: usize, must: usize) -> Result<()> {
    match len == must {
        true => Ok(()),
        false => Err(Error::failure("training loss", format!("wrong length of {name}")).is(len).must(must)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::golden::{Case, assert_close};

    /// Loss terms, x_t and gradient of the golden batch in type R.
    fn golden<R: Real>(case: &Case) -> [Vec<f64>; 5] {
        let schedule = Schedule::default();
        let input = |name: &str| case.input(name).into_iter().map(R::from_f64).collect::<Vec<R>>();
        let (x0, noise, output) = (input("x0"), input("noise"), input("model_output"));
        let timesteps = case.input("t");
        let (batch, n) = (timesteps.len(), x0.len() / timesteps.len());
        let (mut x_t, mut grad) = (vec![R::from_f64(0.0); batch * n], vec![R::from_f64(0.0); 2 * batch * n]);
        let (mut mse, mut vb) = (vec![], vec![]);
        for (b, &t) in timesteps.iter().enumerate() {
            let coefs = LossCoefs::new(&schedule, t as usize).unwrap();
            let (one, two) = (b * n..(b + 1) * n, 2 * b * n..2 * (b + 1) * n);
            let (x0, noise, output) = (&x0[one.clone()], &noise[one.clone()], &output[two.clone()]);
            let terms = forward(&coefs, x0, noise, output).unwrap();
            mse.push(terms.mse);
            vb.push(terms.vb);
            add_noise(&coefs, x0, noise, &mut x_t[one]).unwrap();
            backward(&coefs, x0, noise, output, 1.0 / batch as f64, &mut grad[two]).unwrap();
        }
        let loss = mse.iter().zip(&vb).map(|(a, b)| a + b).collect();
        let wide = |values: Vec<R>| values.into_iter().map(R::to_f64).collect();
        [mse, vb, loss, wide(x_t), wide(grad)]
    }

    #[test]
    fn golden_in_f64() {
        let case = Case::open("samplers/training_loss");
        let names = ["mse", "vb", "loss", "x_t", "grad.model_output"];
        for (name, got) in names.iter().zip(golden::<f64>(&case)) {
            let want = case.expected(name);
            let largest = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            assert_close(name, &got, &want, (largest * 6e-8, 6e-8));
        }
    }

    #[test]
    fn golden_in_f32() {
        let case = Case::open("samplers/training_loss");
        let [mse, vb, _, _, grad] = golden::<f32>(&case);
        assert_close("mse", &mse, &case.expected("mse"), case.tolerance("mse (f32)"));
        assert_close("vb", &vb, &case.expected("vb"), case.tolerance("vb (f32)"));
        assert_close("grad", &grad, &case.expected("grad.model_output"), (2e-6, 1e-5));
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
    fn gradient_matches_differences() {
        let schedule = Schedule::default();
        // Interior, both edges, and values so far off that the probability is clamped.
        let cases = [(0.2, 0.1, 0.12), (-1.5, 0.3, 0.9), (1.5, -0.2, -0.5), (0.1, 0.0, 3.0), (-2.0, 0.0, -4.0)];
        for t in [0, 1, 400] {
            let coefs = LossCoefs::new(&schedule, t).unwrap();
            for (x0, noise, eps) in cases {
                for v in [-0.8, 0.1, 1.3] {
                    let value = |v: f64| forward(&coefs, &[x0], &[noise], &[eps, v]).unwrap().vb;
                    let mut grad = [f64::NAN; 2];
                    backward(&coefs, &[x0], &[noise], &[eps, v], 1.0, &mut grad).unwrap();
                    let slope = (value(v + 1e-5) - value(v - 1e-5)) / 2e-5;
                    assert!(
                        (grad[1] - slope).abs() < 1e-6 * slope.abs().max(1e-2),
                        "{t} {x0} {v}: {} {slope}",
                        grad[1]
                    );
                    assert!((grad[0] - 2.0 * (eps - noise)).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn misuse_is_refused() {
        let schedule = Schedule::default();
        assert!(LossCoefs::new(&schedule, 1000).unwrap_err().to_string().contains("is 1000; must be 0 to 999"));
        let c = LossCoefs::new(&schedule, 3).unwrap();
        assert!(forward::<f32>(&c, &[], &[], &[]).is_err());
        assert!(forward(&c, &[0.0f32; 2], &[0.0; 3], &[0.0; 4]).is_err());
        assert!(forward(&c, &[0.0f32; 2], &[0.0; 2], &[0.0; 3]).is_err());
        assert!(backward(&c, &[0.0f32; 2], &[0.0; 2], &[0.0; 4], 1.0, &mut [0.0; 2]).is_err());
        assert!(add_noise(&c, &[0.0f32; 2], &[0.0; 2], &mut [0.0; 1]).is_err());
    }
}
