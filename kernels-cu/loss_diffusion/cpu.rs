//! CPU path: samples over threads, runs of f32 lanes inside a sample, their sums added in f64.
//!
//! The likelihood of the last denoising step is a logarithm of a difference of two distribution functions, which f32
//! cannot hold; those samples (one in a thousand) take the oracle's arithmetic.

use super::{COEFS, Coefs};
use crate::generated::loss_diffusion::{Backward, Dims, Forward};
use crate::simd::{exp_m1, sum_by, vectorised};
use rayon::prelude::*;
use std::f64::consts::LN_2;

/// Elements that one set of f32 lanes adds.
const RUN: usize = 1 << 10;

/// One sample's tensors, C·S elements each.
#[derive(Clone, Copy)]
struct Sample<'a> {
    coefs: Coefs,
    eps: &'a [f32],
    v: &'a [f32],
    x0: &'a [f32],
    x_t: &'a [f32],
    noise: &'a [f32],
}

impl<'a> Sample<'a> {
    /// Sample `i` of the batch.
    fn new(i: usize, len: usize, output: &'a [f32], [x0, x_t, noise]: [&'a [f32]; 3], coefs: &[f32]) -> Self {
        let (eps, v) = output[2 * i * len..][..2 * len].split_at(len);
        let cut = |x: &'a [f32]| &x[i * len..][..len];
        Sample {
            coefs: Coefs::row(&coefs[i * COEFS..][..COEFS]),
            eps,
            v,
            x0: cut(x0),
            x_t: cut(x_t),
            noise: cut(noise),
        }
    }

    /// Elements from `start` on, one run at the most.
    #[inline(always)]
    fn run(self, start: usize) -> Self {
        let end = self.eps.len().min(start + RUN);
        let cut = |x: &'a [f32]| &x[start..end];
        let Sample { eps, v, x0, x_t, noise, .. } = self;
        Sample { eps: cut(eps), v: cut(v), x0: cut(x0), x_t: cut(x_t), noise: cut(noise), ..self }
    }

    /// The bound and its derivative in v by the oracle's arithmetic, element `i`.
    fn exact(&self, i: usize) -> (f64, f64) {
        self.coefs.bound(self.x0[i].into(), self.x_t[i].into(), self.eps[i].into(), self.v[i].into())
    }
}

/// [`Coefs::bound`] of a divergence in f32: with d = logvar − posterior and k = (difference of means)²/posterior,
/// the term is (d + e^{−d} − 1 + k·e^{−d})/2 and its derivative in d is −(e^{−d} − 1 + k·e^{−d})/2.
#[derive(Clone, Copy)]
struct Divergence {
    mean_x0: f32,
    recip: f32,
    recipm1: f32,
    half_gap: f32,
    precision: f32,
}

impl Divergence {
    fn new(c: &Coefs) -> Self {
        let gap = c.log_beta - c.log_posterior;
        let [mean_x0, recip, recipm1] = [c.mean_x0 as f32, c.recip as f32, c.recipm1 as f32];
        Divergence { mean_x0, recip, recipm1, half_gap: 0.5 * gap as f32, precision: (-c.log_posterior).exp() as f32 }
    }

    /// (d, e^{−d} − 1 + k·e^{−d}).
    #[inline(always)]
    fn terms(&self, x0: f32, x_t: f32, eps: f32, v: f32) -> (f32, f32) {
        let difference = self.mean_x0 * (x0 - (self.recip * x_t - self.recipm1 * eps));
        let d = self.half_gap * (v + 1.0);
        let decay = exp_m1(-d);
        (d, decay + difference * difference * self.precision * (1.0 + decay))
    }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { b, c, s } = a.dims;
    let len = c * s;
    let (output, inputs, coefs) = (a.model_output, [a.x0, a.x_t, a.noise], a.coefs);
    a.mse.par_iter_mut().zip(&mut *a.vb).enumerate().for_each(|(i, (mse, vb))| {
        let sample = Sample::new(i, len, output, inputs, coefs);
        let (squares, nats) = vectorised(
            #[inline(always)]
            || sums(sample),
        );
        (*mse, *vb) = ((squares / len as f64) as f32, (nats / (LN_2 * len as f64)) as f32);
    });
    let terms = a.mse.iter().zip(&*a.vb).map(|(m, v)| f64::from(*m) + f64::from(a.params.vlb_weight) * f64::from(*v));
    a.loss[0] = (terms.sum::<f64>() / b as f64) as f32;
}

/// Sums of the squared error and of the bound in nats.
#[inline(always)]
fn sums(sample: Sample<'_>) -> (f64, f64) {
    let (mut squares, mut nats) = (0.0f64, 0.0f64);
    let divergence = Divergence::new(&sample.coefs);
    for start in (0..sample.eps.len()).step_by(RUN) {
        let Sample { coefs, eps, v, x0, x_t, noise } = sample.run(start);
        let n = eps.len();
        let (v, x0, x_t, noise) = (&v[..n], &x0[..n], &x_t[..n], &noise[..n]);
        squares += f64::from(sum_by(n, |i| (noise[i] - eps[i]) * (noise[i] - eps[i])));
        nats += if coefs.is_t0 {
            (0..n).map(|i| sample.exact(start + i).0).sum()
        } else {
            let mut terms = [0.0f32; RUN];
            let terms = &mut terms[..n];
            for i in 0..n {
                let (d, rest) = divergence.terms(x0[i], x_t[i], eps[i], v[i]);
                terms[i] = 0.5 * (d + rest);
            }
            f64::from(sum_by(n, |i| terms[i]))
        };
    }
    (squares, nats)
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let Some(grad) = a.dmodel_output else { return };
    let Dims { b, c, s } = a.dims;
    let len = c * s;
    let scale = f64::from(a.dloss[0]) / (b * len) as f64;
    let bound_scale = scale * f64::from(a.params.vlb_weight) / LN_2;
    let (output, inputs, coefs) = (a.model_output, [a.x0, a.x_t, a.noise], a.coefs);
    grad.par_chunks_mut(2 * len).enumerate().for_each(|(i, grad)| {
        let sample = Sample::new(i, len, output, inputs, coefs);
        let (deps, dv) = grad.split_at_mut(len);
        vectorised(
            #[inline(always)]
            || gradients(sample, 2.0 * scale as f32, bound_scale, deps, dv),
        );
    });
}

#[inline(always)]
fn gradients(sample: Sample<'_>, eps_scale: f32, bound_scale: f64, deps: &mut [f32], dv: &mut [f32]) {
    let Sample { coefs, eps, v, x0, x_t, noise } = sample;
    let n = eps.len();
    let (v, x0, x_t, noise) = (&v[..n], &x0[..n], &x_t[..n], &noise[..n]);
    let (deps, dv) = (&mut deps[..n], &mut dv[..n]);
    for i in 0..n {
        deps[i] = eps_scale * (eps[i] - noise[i]);
    }
    if coefs.is_t0 {
        dv.iter_mut().enumerate().for_each(|(i, dv)| *dv = (bound_scale * sample.exact(i).1) as f32);
        return;
    }
    let divergence = Divergence::new(&coefs);
    let slope = -0.5 * bound_scale as f32 * divergence.half_gap;
    for i in 0..n {
        dv[i] = slope * divergence.terms(x0[i], x_t[i], eps[i], v[i]).1;
    }
}
