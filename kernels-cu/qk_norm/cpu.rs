//! CPU path: a token at a time in cache, tokens over threads; sums of the scales and shifts over blocks of tokens.

use crate::generated::qk_norm::{Backward, Dims, Forward};
use crate::simd::{sum_by, vectorised};
use rayon::prelude::*;

/// Tokens of a task of the backward pass; each task has its own sums.
const TOKENS: usize = 64;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { d, .. } = a.dims;
    let (x, eps) = (a.x, a.params.eps);
    let maps = [(a.q_gamma, a.q_beta), (a.k_gamma, a.k_beta)];
    let moments = a.mean.par_chunks_mut(2).zip(a.rstd.par_chunks_mut(2));
    a.y.par_chunks_mut(3 * d).zip(moments).enumerate().with_min_len(4).for_each(|(token, (y, (mean, rstd)))| {
        let x = &x[token * 3 * d..][..3 * d];
        vectorised(
            #[inline(always)]
            || {
                for (part, (gamma, beta)) in maps.into_iter().enumerate() {
                    let (x, y) = (&x[part * d..][..d], &mut y[part * d..][..d]);
                    let (gamma, beta) = (&gamma[..d], &beta[..d]);
                    let m = sum_by(d, |i| x[i]) / d as f32;
                    let r = 1.0 / (sum_by(d, |i| (x[i] - m) * (x[i] - m)) / d as f32 + eps).sqrt();
                    for i in 0..d {
                        y[i] = ((x[i] - m) * r).mul_add(gamma[i], beta[i]);
                    }
                    (mean[part], rstd[part]) = (m, r);
                }
            },
        );
        y[2 * d..].copy_from_slice(&x[2 * d..]);
    });
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let Dims { b, n, d } = a.dims;
    let tasks = (b * n).div_ceil(TOKENS);
    let mut dx: Vec<Option<&mut [f32]>> = match a.dx {
        Some(dx) => dx.chunks_mut(TOKENS * 3 * d).map(Some).collect(),
        None => (0..tasks).map(|_| None).collect(),
    };
    // Of every task: sums for the scale and the shift of the queries, then of the keys.
    let mut partial = vec![0.0f32; tasks * 4 * d];
    let (x, dy, mean, rstd, gammas) = (a.x, a.dy, a.mean, a.rstd, [a.q_gamma, a.k_gamma]);
    dx.par_iter_mut().zip(partial.par_chunks_mut(4 * d)).enumerate().for_each(|(task, (dx, sums))| {
        let first = task * TOKENS;
        for token in first..(first + TOKENS).min(b * n) {
            let (x, dy) = (&x[token * 3 * d..][..3 * d], &dy[token * 3 * d..][..3 * d]);
            let mut dx = dx.as_mut().map(|dx| &mut dx[(token - first) * 3 * d..][..3 * d]);
            for (part, gamma) in gammas.into_iter().enumerate() {
                let moments = (mean[token * 2 + part], rstd[token * 2 + part]);
                let sums = sums[2 * part * d..][..2 * d].split_at_mut(d);
                let dx = dx.as_mut().map(|dx| &mut dx[part * d..][..d]);
                let (x, dy) = (&x[part * d..][..d], &dy[part * d..][..d]);
                vectorised(
                    #[inline(always)]
                    || row(x, dy, gamma, moments, sums, dx),
                );
            }
            if let Some(dx) = dx {
                dx[2 * d..].copy_from_slice(&dy[2 * d..]);
            }
        }
    });
    for (index, out) in [a.dq_gamma, a.dq_beta, a.dk_gamma, a.dk_beta].into_iter().enumerate() {
        let Some(out) = out else { continue };
        out.fill(0.0);
        for sums in partial.chunks_exact(4 * d) {
            out.iter_mut().zip(&sums[index * d..][..d]).for_each(|(o, v)| *o += v);
        }
    }
}

#[inline(always)]
fn row(
    x: &[f32],
    dy: &[f32],
    gamma: &[f32],
    (mean, rstd): (f32, f32),
    (scale, shift): (&mut [f32], &mut [f32]),
    dx: Option<&mut [f32]>,
) {
    let d = x.len();
    let (dy, gamma) = (&dy[..d], &gamma[..d]);
    let norm = |i: usize| (x[i] - mean) * rstd;
    let g = |i: usize| dy[i] * gamma[i];
    for i in 0..d {
        scale[i] += dy[i] * norm(i);
        shift[i] += dy[i];
    }
    let Some(dx) = dx else { return };
    let mean_g = sum_by(d, g) / d as f32;
    let mean_gn = sum_by(d, |i| g(i) * norm(i)) / d as f32;
    for i in 0..d {
        dx[i] = rstd * (g(i) - mean_g - norm(i) * mean_gn);
    }
}
