//! CPU path: one pass for the statistics, one for the result, a row at a time in cache; rows over threads.

use crate::generated::ln_modulate::{Backward, Dims, Forward};
use crate::simd::{sum_each, sum_pairs, vectorised};
use rayon::prelude::*;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { n, c, d, .. } = a.dims;
    let (x, table, params) = (a.x, a.modulation, a.params);
    a.y.par_chunks_mut(d).zip(a.mean.par_iter_mut().zip(a.rstd)).enumerate().with_min_len(8).for_each(
        |(token, (y, (mean, rstd)))| {
            let x = &x[token * d..][..d];
            let table = &table[token / n * c * d..][..c * d];
            let (shift, scale) = (&table[params.shift * d..][..d], &table[params.scale * d..][..d]);
            (*mean, *rstd) = vectorised(
                #[inline(always)]
                || normalise(x, shift, scale, params.eps, y),
            );
        },
    );
}

#[inline(always)]
fn normalise(x: &[f32], shift: &[f32], scale: &[f32], eps: f32, y: &mut [f32]) -> (f32, f32) {
    let d = x.len();
    let (shift, scale, y) = (&shift[..d], &scale[..d], &mut y[..d]);
    let mean = sum_each(x, |x| x) / d as f32;
    let var = sum_each(x, |x| (x - mean) * (x - mean)) / d as f32;
    let rstd = 1.0 / (var + eps).sqrt();
    for i in 0..d {
        y[i] = ((x[i] - mean) * rstd).mul_add(1.0 + scale[i], shift[i]);
    }
    (mean, rstd)
}

/// Backward pass. Samples go over threads: each owns its rows of `dmodulation`, so no sum is shared.
pub fn backward(a: Backward<'_, f32>) {
    let Dims { b, n, c, d } = a.dims;
    let dx = a.dx.map(|dx| dx.par_chunks_mut(n * d).map(Some).collect()).unwrap_or_else(|| none(b));
    let dm = a.dmodulation.map(|dm| dm.par_chunks_mut(c * d).map(Some).collect()).unwrap_or_else(|| none(b));
    let dx: Vec<Option<&mut [f32]>> = dx;
    let dm: Vec<Option<&mut [f32]>> = dm;
    let (dy, x, table, mean, rstd, params) = (a.dy, a.x, a.modulation, a.mean, a.rstd, a.params);
    dx.into_par_iter().zip(dm).enumerate().for_each(|(sample, (mut dx, dm))| {
        let scale = &table[(sample * c + params.scale) * d..][..d];
        let mut dshift = vec![0.0f32; d];
        let mut dscale = vec![0.0f32; d];
        for token in sample * n..(sample + 1) * n {
            let (x, dy) = (&x[token * d..][..d], &dy[token * d..][..d]);
            let dx = dx.as_mut().map(|dx| &mut dx[(token - sample * n) * d..][..d]);
            vectorised(
                #[inline(always)]
                || row_backward(x, dy, scale, mean[token], rstd[token], &mut dshift, &mut dscale, dx),
            );
        }
        if let Some(dm) = dm {
            dm.fill(0.0);
            dm[params.shift * d..][..d].copy_from_slice(&dshift);
            dm[params.scale * d..][..d].copy_from_slice(&dscale);
        }
    });
}

fn none<'a>(count: usize) -> Vec<Option<&'a mut [f32]>> {
    (0..count).map(|_| None).collect()
}

#[inline(always)]
fn row_backward(
    x: &[f32],
    dy: &[f32],
    scale: &[f32],
    mean: f32,
    rstd: f32,
    dshift: &mut [f32],
    dscale: &mut [f32],
    dx: Option<&mut [f32]>,
) {
    let d = x.len();
    // Of one length, so that no index is checked.
    let (dy, scale, dshift, dscale) = (&dy[..d], &scale[..d], &mut dshift[..d], &mut dscale[..d]);
    let h = |x: f32| (x - mean) * rstd;
    for i in 0..d {
        dshift[i] += dy[i];
        dscale[i] += dy[i] * h(x[i]);
    }
    let Some(dx) = dx else { return };
    let dx = &mut dx[..d];
    for i in 0..d {
        dx[i] = dy[i] * (1.0 + scale[i]);
    }
    let mean_g = sum_each(dx, |g| g) / d as f32;
    let mean_gh = sum_pairs(dx, x, |g, x| g * h(x)) / d as f32;
    for i in 0..d {
        dx[i] = rstd * (dx[i] - mean_g - h(x[i]) * mean_gh);
    }
}
