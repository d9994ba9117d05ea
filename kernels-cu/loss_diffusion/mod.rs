//! The training objective of DiT (arXiv 2102.09672): see `op.toml` for the formulas.
//!
//! The bound compares two Gaussians for x_{t-1}, the posterior q given x_t and x0 and the model's p. Both means are one
//! combination of x_t and a clean latent, and x_t = √ᾱ x0 + √(1−ᾱ) noise exactly, so they differ by
//! gap·(eps − noise) with gap = β/√(α(1−ᾱ)): x_t drops out, and with it the division by a tiny √ᾱ at large t.
//!
//! The upper end of the log variance comes as its distance from the lower one: the two agree to 1e-6 at large t, and
//! the gradient in v is proportional to their difference.
//!
//! The bound trains the variance alone: inside it eps is a constant. The gradient is therefore not the derivative of
//! the printed loss, and finite differences check it in two parts: the squared error by the generated check of the
//! cases with `vlb_weight = 0`, the bound by the tests below, which move only v.

pub mod cpu;
pub mod launch;

/// Columns of `coefs`.
pub const COEFS: usize = 4;

/// One row of `coefs`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coefs {
    /// β/√(α(1−ᾱ)): mean of q less mean of p, per unit of eps − noise.
    pub gap: f64,
    /// Log variance at v = −1, also that of q: the posterior's, clipped.
    pub log_lo: f64,
    /// Log variance at v = 1, which is ln β, less `log_lo`.
    pub log_range: f64,
    /// Whether this is the last denoising step, whose term is a likelihood.
    pub first: bool,
}

impl Coefs {
    /// Reads one row; the order is that of `op.toml`.
    pub fn row<T: crate::Real>(row: &[T]) -> Self {
        let at = |i: usize| row[i].f64();
        Coefs { gap: at(0), log_lo: at(1), log_range: at(2), first: at(3) > 0.5 }
    }

    /// The bound's term of one element in nats, and its derivative in v.
    pub fn bound(&self, x0: f64, noise: f64, eps: f64, v: f64) -> (f64, f64) {
        let (rise, distance) = (0.5 * (v + 1.0) * self.log_range, self.gap * (eps - noise));
        let (term, dlogvar) = if self.first {
            likelihood(x0, distance, self.log_lo + rise)
        } else {
            divergence(distance, self.log_lo, rise)
        };
        (term, dlogvar * 0.5 * self.log_range)
    }
}

/// KL(N(distance, e^q) ‖ N(0, e^{q + rise})), and its derivative in `rise`.
fn divergence(distance: f64, q: f64, rise: f64) -> (f64, f64) {
    // e^{−rise}·(1 + distance²/e^q) − 1, without cancellation where it is small.
    let excess = (-rise).exp_m1() + distance * distance * (-q - rise).exp();
    (0.5 * (rise + excess), -0.5 * excess)
}

/// −ln of the probability that a Gaussian gives the bin x ± 1/255, and its derivative in the log variance; `distance`
/// is x less the mean.
fn likelihood(x: f64, distance: f64, logvar: f64) -> (f64, f64) {
    const HALF_BIN: f64 = 1.0 / 255.0;
    let inverse = (-0.5 * logvar).exp();
    let (upper, lower) = (inverse * (distance + HALF_BIN), inverse * (distance - HALF_BIN));
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
                vb += coefs.bound(a.x0[at].f64(), a.noise[at].f64(), eps, v).0 / (LN_2 * len as f64);
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
                let slope = coefs.bound(a.x0[at].f64(), a.noise[at].f64(), eps, v).1;
                grad[eps_at] = T::from_f64(scale * 2.0 * (eps - a.noise[at].f64()));
                grad[v_at] = T::from_f64(scale * f64::from(a.params.vlb_weight) * slope / LN_2);
            }
        }
    }
}

#[cfg(test)]
mod tests;
