//! The training objective of DiT: see `op.toml` for the formulas.
//!
//! The bound trains the variance alone: inside it eps is a constant. The gradient is therefore not the derivative of
//! the printed loss, and finite differences check it in two parts: the squared error by the generated check of the
//! cases with `vlb_weight = 0`, the bound by the tests below, which move only v.

pub mod cpu;

/// Columns of `coefs`.
pub const COEFS: usize = 8;

/// One row of `coefs`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coefs {
    /// Weight of the clean latent in the mean of the posterior q(x_{t-1} | x_t, x0).
    pub mean_x0: f64,
    /// Weight of x_t in that mean.
    pub mean_xt: f64,
    /// ln β_t: log variance at v = 1.
    pub log_beta: f64,
    /// Clipped log variance of the posterior: log variance at v = −1.
    pub log_posterior: f64,
    /// √(1/ᾱ_t).
    pub recip: f64,
    /// √(1/ᾱ_t − 1).
    pub recipm1: f64,
    /// Whether this is the last denoising step, whose term is a likelihood.
    pub is_t0: bool,
}

impl Coefs {
    /// Reads one row; the order is that of `op.toml`.
    pub fn row<T: crate::Real>(row: &[T]) -> Self {
        let at = |i: usize| row[i].f64();
        Coefs {
            mean_x0: at(0),
            mean_xt: at(1),
            log_beta: at(2),
            log_posterior: at(3),
            recip: at(4),
            recipm1: at(5),
            is_t0: at(6) > 0.5,
        }
    }

    /// The bound's term of one element in nats, and its derivative in v.
    #[inline(always)]
    pub fn bound(&self, x0: f64, x_t: f64, eps: f64, v: f64) -> (f64, f64) {
        let logvar = self.log_posterior + 0.5 * (v + 1.0) * (self.log_beta - self.log_posterior);
        let x0_hat = self.recip * x_t - self.recipm1 * eps;
        let (term, dlogvar) = if self.is_t0 {
            likelihood(x0, self.mean_x0 * x0_hat + self.mean_xt * x_t, logvar)
        } else {
            // The means differ by their x0 part alone.
            divergence(self.mean_x0 * (x0 - x0_hat), self.log_posterior, logvar)
        };
        (term, dlogvar * 0.5 * (self.log_beta - self.log_posterior))
    }
}

/// KL(N(μ, e^q) ‖ N(μ + difference, e^p)), and its derivative in p.
#[inline(always)]
fn divergence(difference: f64, q: f64, p: f64) -> (f64, f64) {
    let ratio = (q - p).exp() + difference * difference * (-p).exp();
    (0.5 * (p - q - 1.0 + ratio), 0.5 * (1.0 - ratio))
}

/// −ln of the probability that a Gaussian gives the bin x ± 1/255, and its derivative in the log variance.
fn likelihood(x: f64, mean: f64, logvar: f64) -> (f64, f64) {
    const HALF_BIN: f64 = 1.0 / 255.0;
    let inverse = (-0.5 * logvar).exp();
    let (upper, lower) = (inverse * (x - mean + HALF_BIN), inverse * (x - mean - HALF_BIN));
    let ((upper_cdf, upper_pdf), (lower_cdf, lower_pdf)) = (normal_cdf(upper), normal_cdf(lower));
    // Each bound moves by −bound/2 per unit of log variance.
    let (p, dp) = if x < -0.999 {
        (upper_cdf, upper_pdf * -0.5 * upper)
    } else if x > 0.999 {
        (1.0 - lower_cdf, lower_pdf * 0.5 * lower)
    } else {
        (upper_cdf - lower_cdf, upper_pdf * -0.5 * upper + lower_pdf * 0.5 * lower)
    };
    const LEAST: f64 = 1e-12;
    if p < LEAST { (-LEAST.ln(), 0.0) } else { (-p.ln(), -dp / p) }
}

/// The tanh approximation of the normal distribution function, and its derivative.
fn normal_cdf(u: f64) -> (f64, f64) {
    let slope = std::f64::consts::FRAC_2_PI.sqrt();
    let t = (slope * (u + 0.044715 * u * u * u)).tanh();
    (0.5 * (1.0 + t), 0.5 * (1.0 - t * t) * slope * (1.0 + 3.0 * 0.044715 * u * u))
}

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use super::{COEFS, Coefs};
    use crate::Real;
    use crate::generated::loss_diffusion::{Backward, Dims, Forward};
    use std::f64::consts::LN_2;

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, c, s } = a.dims;
        let (len, mut loss) = (c * s, 0.0);
        for sample in 0..b {
            let coefs = Coefs::row(&a.coefs[sample * COEFS..][..COEFS]);
            let (mut mse, mut vb) = (0.0, 0.0);
            for i in 0..len {
                let at = sample * len + i;
                let (eps, v) =
                    (a.model_output[sample * 2 * len + i].f64(), a.model_output[(sample * 2 + 1) * len + i].f64());
                mse += (a.noise[at].f64() - eps).powi(2) / len as f64;
                vb += coefs.bound(a.x0[at].f64(), a.x_t[at].f64(), eps, v).0 / (LN_2 * len as f64);
            }
            (a.mse[sample], a.vb[sample]) = (T::from_f64(mse), T::from_f64(vb));
            loss += (mse + f64::from(a.params.vlb_weight) * vb) / b as f64;
        }
        a.loss[0] = T::from_f64(loss);
    }

    /// Backward pass.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let Dims { b, c, s } = a.dims;
        let len = c * s;
        let scale = a.dloss[0].f64() / (b * len) as f64;
        let Some(grad) = a.dmodel_output else { return };
        for sample in 0..b {
            let coefs = Coefs::row(&a.coefs[sample * COEFS..][..COEFS]);
            for i in 0..len {
                let (at, eps_at, v_at) = (sample * len + i, sample * 2 * len + i, (sample * 2 + 1) * len + i);
                let (eps, v) = (a.model_output[eps_at].f64(), a.model_output[v_at].f64());
                let slope = coefs.bound(a.x0[at].f64(), a.x_t[at].f64(), eps, v).1;
                grad[eps_at] = T::from_f64(scale * 2.0 * (eps - a.noise[at].f64()));
                grad[v_at] = T::from_f64(scale * f64::from(a.params.vlb_weight) * slope / LN_2);
            }
        }
    }
}

#[cfg(test)]
mod tests;
