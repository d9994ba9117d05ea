//! CPU path: runs of one channel over threads; one pass for guidance, estimate and update, one each for the terms
//! that may be absent, in cache.

use crate::generated::solver_step::{Dims, Forward};
use crate::simd::{exp, vectorised};
use rayon::prelude::*;

/// Elements of a run at the most: its tensors stay in the first-level cache.
const RUN: usize = 1 << 10;
/// Elements that one thread takes at the least.
const GRAIN: usize = 1 << 14;

/// A model output and, where its channel is guided, its unconditional counterpart.
type Output<'a> = (&'a [f32], Option<&'a [f32]>);

/// The step.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { c, co, s, .. } = a.dims;
    let p = a.params;
    let (x, cond, uncond, noise, x0_prev) = (a.x, a.cond, a.uncond, a.noise, a.x0_prev);
    let plane = s.max(1);
    let planes = a.x_next.par_chunks_mut(plane).zip(a.x0.par_chunks_mut(plane)).enumerate();
    planes.with_min_len(GRAIN.div_ceil(plane)).for_each(|(index, (x_next, x0))| {
        let (sample, channel) = (index / c, index % c);
        let runs = x_next.par_chunks_mut(RUN).zip(x0.par_chunks_mut(RUN)).enumerate();
        runs.with_min_len(GRAIN / RUN).for_each(|(run, (x_next, x0))| {
            let (start, n) = (run * RUN, x_next.len());
            let x0 = &mut x0[..n];
            let output = |channel: usize| -> Output<'_> {
                let at = (sample * co + channel) * s + start;
                let guided = uncond.filter(|_| channel < p.guided_channels);
                (&cond[at..][..n], guided.map(|uncond| &uncond[at..][..n]))
            };
            let at = index * s + start;
            vectorised(
                #[inline(always)]
                || {
                    let x = &x[at..][..n];
                    each(output(channel), p.guidance, |i, eps| {
                        x0[i] = p.inv_alpha * (x[i] - p.sigma * eps);
                        x_next[i] = p.cx * x[i] + p.ce * eps + p.c0 * x0[i];
                    });
                    if let Some(x0_prev) = x0_prev {
                        x_next.iter_mut().zip(&x0_prev[at..]).for_each(|(x, previous)| *x += p.c1 * previous);
                    }
                    let Some(noise) = noise else { return };
                    let noise = &noise[at..][..n];
                    if p.learned && p.cn != 0.0 {
                        let (middle, slope) = (0.25 * (p.log_hi + p.log_lo), 0.25 * (p.log_hi - p.log_lo));
                        each(output(c + channel), p.guidance, |i, v| x_next[i] += exp(middle + slope * v) * noise[i]);
                    } else {
                        x_next.iter_mut().zip(noise).for_each(|(x, noise)| *x += p.cn * noise);
                    }
                },
            );
        });
    });
}

/// Hands `put` every element of an output after guidance.
#[inline(always)]
fn each((cond, uncond): Output<'_>, guidance: f32, mut put: impl FnMut(usize, f32)) {
    match uncond {
        Some(uncond) => {
            for (i, (c, u)) in cond.iter().zip(uncond).enumerate() {
                put(i, u + guidance * (c - u));
            }
        }
        None => {
            for (i, c) in cond.iter().enumerate() {
                put(i, *c);
            }
        }
    }
}
