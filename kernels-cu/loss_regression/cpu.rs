//! CPU path: fixed blocks over threads, f32 lanes inside a block, block sums added in f64 in their order.

use super::{L1, L2};
use crate::generated::loss_regression::{Backward, Dims, Forward, Params};
use crate::simd::{sum_pairs, vectorised};
use rayon::prelude::*;

/// Elements of a block: the same on every machine, so that the sum is.
const BLOCK: usize = 1 << 14;
/// Elements that one set of f32 lanes adds before its sum goes to f64.
const RUN: usize = 1 << 10;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { b, n, d } = a.dims;
    let params = a.params;
    let blocks: Vec<f64> =
        a.pred.par_chunks(BLOCK).zip(a.target.par_chunks(BLOCK)).map(|(p, t)| block_sum(params, p, t)).collect();
    a.loss[0] = (blocks.iter().sum::<f64>() / (b * n * d) as f64) as f32;
}

fn block_sum(params: Params, pred: &[f32], target: &[f32]) -> f64 {
    let delta = params.delta;
    vectorised(
        #[inline(always)]
        || match params.kind {
            L1 => sum_errors(pred, target, |e| e.abs()),
            L2 => sum_errors(pred, target, |e| e * e),
            _ => sum_errors(pred, target, |e| {
                // q·(|e| − q/2) with q = min(|e|, δ) is both branches.
                let q = e.abs().min(delta);
                q * (e.abs() - 0.5 * q)
            }),
        },
    )
}

#[inline(always)]
fn sum_errors(pred: &[f32], target: &[f32], rho: impl Fn(f32) -> f32) -> f64 {
    let mut total = 0.0;
    for (p, t) in pred.chunks(RUN).zip(target.chunks(RUN)) {
        total += f64::from(sum_pairs(p, t, |p, t| rho(p - t)));
    }
    total
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let Some(dpred) = a.dpred else { return };
    let Dims { b, n, d } = a.dims;
    let (params, delta) = (a.params, a.params.delta);
    let scale = a.dloss[0] / (b * n * d) as f32;
    let blocks = a.pred.par_chunks(BLOCK).zip(a.target.par_chunks(BLOCK));
    dpred.par_chunks_mut(BLOCK).zip(blocks).for_each(|(out, (p, t))| {
        vectorised(
            #[inline(always)]
            || match params.kind {
                L1 => each_error(out, p, t, |e| scale * if e == 0.0 { 0.0 } else { e / e.abs() }),
                L2 => each_error(out, p, t, |e| 2.0 * scale * e),
                _ => each_error(out, p, t, |e| scale * e.clamp(-delta, delta)),
            },
        );
    });
}

#[inline(always)]
fn each_error(out: &mut [f32], pred: &[f32], target: &[f32], slope: impl Fn(f32) -> f32) {
    let n = out.len();
    let (pred, target) = (&pred[..n], &target[..n]);
    for i in 0..n {
        out[i] = slope(pred[i] - target[i]);
    }
}
