//! CPU path: samples over threads.

use super::{COEFS, Coefs};
use crate::generated::loss_diffusion::{Backward, Dims, Forward};
use rayon::prelude::*;
use std::f64::consts::LN_2;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { b, c, s } = a.dims;
    let len = c * s;
    let (output, x0, x_t, noise, coefs) = (a.model_output, a.x0, a.x_t, a.noise, a.coefs);
    a.mse.par_iter_mut().zip(&mut *a.vb).enumerate().for_each(|(sample, (mse, vb))| {
        let coefs = Coefs::row(&coefs[sample * COEFS..][..COEFS]);
        let (eps, v) = output[sample * 2 * len..][..2 * len].split_at(len);
        let (x0, x_t, noise) = (&x0[sample * len..][..len], &x_t[sample * len..][..len], &noise[sample * len..][..len]);
        let (mut squares, mut nats) = (0.0f64, 0.0f64);
        for i in 0..len {
            squares += f64::from(noise[i] - eps[i]).powi(2);
            nats += coefs.bound(x0[i].into(), x_t[i].into(), eps[i].into(), v[i].into()).0;
        }
        (*mse, *vb) = ((squares / len as f64) as f32, (nats / (LN_2 * len as f64)) as f32);
    });
    let terms = a.mse.iter().zip(&*a.vb).map(|(m, v)| f64::from(*m) + f64::from(a.params.vlb_weight) * f64::from(*v));
    a.loss[0] = (terms.sum::<f64>() / b as f64) as f32;
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let Some(grad) = a.dmodel_output else { return };
    let Dims { b, c, s } = a.dims;
    let len = c * s;
    let scale = f64::from(a.dloss[0]) / (b * len) as f64;
    let bound_scale = scale * f64::from(a.params.vlb_weight) / LN_2;
    let (output, x0, x_t, noise, coefs) = (a.model_output, a.x0, a.x_t, a.noise, a.coefs);
    grad.par_chunks_mut(2 * len).enumerate().for_each(|(sample, grad)| {
        let coefs = Coefs::row(&coefs[sample * COEFS..][..COEFS]);
        let (eps, v) = output[sample * 2 * len..][..2 * len].split_at(len);
        let (x0, x_t, noise) = (&x0[sample * len..][..len], &x_t[sample * len..][..len], &noise[sample * len..][..len]);
        let (deps, dv) = grad.split_at_mut(len);
        for i in 0..len {
            deps[i] = 2.0 * scale as f32 * (eps[i] - noise[i]);
            dv[i] = (bound_scale * coefs.bound(x0[i].into(), x_t[i].into(), eps[i].into(), v[i].into()).1) as f32;
        }
    });
}
