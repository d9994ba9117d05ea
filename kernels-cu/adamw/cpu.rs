//! CPU path: one pass over all tensors, blocks over threads.

use crate::generated::adamw::{Forward, Params};
use crate::simd::vectorised;
use rayon::prelude::*;

/// Elements of a block.
const BLOCK: usize = 1 << 14;

/// The step.
pub fn forward(a: Forward<'_, f32>) {
    let (params, grad) = (a.params, a.grad.par_chunks(BLOCK));
    let state = a.param.par_chunks_mut(BLOCK).zip(a.m.par_chunks_mut(BLOCK)).zip(a.v.par_chunks_mut(BLOCK)).zip(grad);
    let update = |param: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32]| {
        vectorised(
            #[inline(always)]
            || step(params, param, m, v, grad),
        );
    };
    match a.ema {
        None => state.for_each(|(((param, m), v), grad)| update(param, m, v, grad)),
        Some(ema) => state.zip(ema.par_chunks_mut(BLOCK)).for_each(|((((param, m), v), grad), ema)| {
            update(param, m, v, grad);
            vectorised(
                #[inline(always)]
                || average(params.ema_rate, ema, param),
            );
        }),
    }
}

#[inline(always)]
fn step(p: Params, param: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32]) {
    let n = param.len();
    let (m, v, grad) = (&mut m[..n], &mut v[..n], &grad[..n]);
    let (keep, rate, scale) = (1.0 - p.lr * p.weight_decay, p.lr / p.bias1, 1.0 / p.bias2.sqrt());
    for i in 0..n {
        let g = p.grad_scale * grad[i];
        m[i] += p.rate1 * (g - m[i]);
        v[i] += p.rate2 * (g * g - v[i]);
        param[i] = keep * param[i] - rate * m[i] / v[i].sqrt().mul_add(scale, p.eps);
    }
}

#[inline(always)]
fn average(rate: f32, ema: &mut [f32], param: &[f32]) {
    let param = &param[..ema.len()];
    for i in 0..ema.len() {
        // The difference form keeps the average still where it has arrived.
        ema[i] += rate * (param[i] - ema[i]);
    }
}
