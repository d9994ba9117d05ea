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
    noise: &'a [f32],
}

impl<'a> Sample<'a> {
    /// Sample `i` of the batch.
    fn new(i: usize, len: usize, output: &'a [f32], [x0, noise]: [&'a [f32]; 2], coefs: &[f32]) -> Self {
        let (eps, v) = output[2 * i * len..][..2 * len].split_at(len);
        let cut = |x: &'a [f32]| &x[i * len..][..len];
        Sample { coefs: Coefs::row(&coefs[i * COEFS..][..COEFS]), eps, v, x0: cut(x0), noise: cut(noise) }
    }

    /// Elements from `start` on, one run at the most.
    #[inline(always)]
    fn run(self, start: usize) -> Self {
        let end = self.eps.len().min(start + RUN);
        let cut = |x: &'a [f32]| &x[start..end];
        let Sample { eps, v, x0, noise, .. } = self;
        Sample { eps: cut(eps), v: cut(v), x0: cut(x0), noise: cut(noise), ..self }
    }

    /// The bound and its derivative in v by the oracle's arithmetic, element `i`.
    fn exact(&self, i: usize) -> (f64, f64) {
        self.coefs.bound(self.x0[i].into(), self.noise[i].into(), self.eps[i].into(), self.v[i].into())
    }
}

/// [`Coefs::bound`] of a divergence in f32: with d = logvar − log_lo and k = distance²/e^{log_lo}, the term is
/// (d + e^{−d} − 1 + k·e^{−d})/2 and its derivative in d is −(e^{−d} − 1 + k·e^{−d})/2.
#[derive(Clone, Copy)]
struct Divergence {
    half_range: f32,
    /// √k per unit of eps − noise.
    scaled_gap: f32,
}

impl Divergence {
    fn new(c: &Coefs) -> Self {
        let scaled_gap = c.gap * (-0.5 * c.log_lo).exp();
        Divergence { half_range: (0.5 * c.log_range) as f32, scaled_gap: scaled_gap as f32 }
    }

    /// (d, e^{−d} − 1 + k·e^{−d}).
    #[inline(always)]
    fn terms(&self, noise: f32, eps: f32, v: f32) -> (f32, f32) {
        let d = self.half_range * (v + 1.0);
        let (distance, decay) = (self.scaled_gap * (eps - noise), exp_m1(-d));
        (d, decay + distance * distance * (1.0 + decay))
    }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { b, c, s } = a.dims;
    let len = c * s;
    let (output, inputs, coefs) = (a.model_output, [a.x0, a.noise], a.coefs);
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
        let Sample { coefs, eps, v, noise, .. } = sample.run(start);
        let n = eps.len();
        let (v, noise) = (&v[..n], &noise[..n]);
        squares += f64::from(sum_by(n, |i| (noise[i] - eps[i]) * (noise[i] - eps[i])));
        nats += if coefs.first {
            (0..n).map(|i| sample.exact(start + i).0).sum()
        } else {
            let mut terms = [0.0f32; RUN];
            let terms = &mut terms[..n];
            for i in 0..n {
                let (d, rest) = divergence.terms(noise[i], eps[i], v[i]);
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
    let (output, inputs, coefs) = (a.model_output, [a.x0, a.noise], a.coefs);
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
    let Sample { coefs, eps, v, noise, .. } = sample;
    let n = eps.len();
    let (v, noise) = (&v[..n], &noise[..n]);
    let (deps, dv) = (&mut deps[..n], &mut dv[..n]);
    for i in 0..n {
        deps[i] = eps_scale * (eps[i] - noise[i]);
    }
    if coefs.first {
        dv.iter_mut().enumerate().for_each(|(i, dv)| *dv = (bound_scale * sample.exact(i).1) as f32);
        return;
    }
    let divergence = Divergence::new(&coefs);
    let slope = -0.5 * bound_scale as f32 * divergence.half_range;
    for i in 0..n {
        dv[i] = slope * divergence.terms(noise[i], eps[i], v[i]).1;
    }
}
