//! CPU path: rows of squares over threads, channels in vectors; every gradient of a parameter is summed by rows of
//! squares first and then over these in order, so that results do not depend on the threads.

use crate::attention::layout::with_scratch;
use crate::generated::kv_compress::{Backward, Dims, Forward};
use crate::simd::{sum_each, sum_pairs, vectorised};
use rayon::prelude::*;
use std::cell::Cell;

thread_local! {
    /// Memory of the transposed taps, kept from call to call.
    static TAPS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Calls `body` with the taps as `[K·K, D]`, channels side by side.
fn with_taps(Dims { d, k, .. }: Dims, weight: &[f32], body: impl FnOnce(&[f32])) {
    let (mut taps, squared) = (TAPS.take(), k * k);
    taps.clear();
    taps.resize(squared * d, 0.0);
    for (channel, weight) in weight.chunks_exact(squared).enumerate() {
        weight.iter().enumerate().for_each(|(tap, w)| taps[tap * d + channel] = *w);
    }
    body(&taps);
    TAPS.set(taps);
}

/// What the squares of one row read: `rows` begins with its first grid row.
#[derive(Clone, Copy)]
struct Squares<'a> {
    dims: Dims,
    first: usize,
    rows: &'a [f32],
    taps: &'a [f32],
    bias: &'a [f32],
}

impl<'a> Squares<'a> {
    /// Row of squares `row` of a sample.
    fn new(
        dims: Dims,
        first: usize,
        x: &'a [f32],
        [sample, row]: [usize; 2],
        taps: &'a [f32],
        bias: &'a [f32],
    ) -> Self {
        let Dims { gh, gw, r, d, k, .. } = dims;
        Squares { dims, first, rows: &x[(sample * gh + row * k) * gw * r * d..][..k * gw * r * d], taps, bias }
    }

    /// Where tap `tap` of the square in column `column` reads its vector of channels, in the rows of this square.
    #[inline(always)]
    fn source(&self, column: usize, part: usize, tap: usize) -> usize {
        let Dims { gw, r, d, k, .. } = self.dims;
        ((tap / k * gw + column * k + tap % k) * r + self.first + part) * d
    }

    /// The convolution, every channel.
    #[inline(always)]
    fn convolve(&self, column: usize, part: usize, out: &mut [f32]) {
        let d = out.len();
        out.copy_from_slice(self.bias);
        for (tap, weight) in self.taps.chunks_exact(d).enumerate() {
            add_product(weight, &self.rows[self.source(column, part, tap)..][..d], out);
        }
    }
}

#[inline(always)]
fn add_product(a: &[f32], b: &[f32], sum: &mut [f32]) {
    let (a, b) = (&a[..sum.len()], &b[..sum.len()]);
    for i in 0..sum.len() {
        sum[i] = a[i].mul_add(b[i], sum[i]);
    }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let dims @ Dims { gh, gw, d, k, .. } = a.dims;
    let (rows, columns) = (gh / k, gw / k);
    let (x, bias, gamma, beta, params) = (a.x, a.bias, a.gamma, a.beta, a.params);
    with_taps(dims, a.weight, |taps| {
        let statistics = a.mean.par_chunks_mut(2 * columns).zip(a.rstd.par_chunks_mut(2 * columns));
        a.y.par_chunks_mut(2 * columns * d).zip(statistics).enumerate().for_each(|(index, (y, (mean, rstd)))| {
            let squares = Squares::new(dims, params.first, x, [index / rows, index % rows], taps, bias);
            vectorised(
                #[inline(always)]
                || {
                    for (i, y) in y.chunks_exact_mut(d).enumerate() {
                        squares.convolve(i / 2, i % 2, y);
                        (mean[i], rstd[i]) = normalise(y, gamma, beta, params.eps);
                    }
                },
            );
        });
    });
}

#[inline(always)]
fn normalise(y: &mut [f32], gamma: &[f32], beta: &[f32], eps: f32) -> (f32, f32) {
    let d = y.len();
    let (gamma, beta) = (&gamma[..d], &beta[..d]);
    let mean = sum_each(y, |y| y) / d as f32;
    let var = sum_each(y, |y| (y - mean) * (y - mean)) / d as f32;
    let rstd = 1.0 / (var + eps).sqrt();
    for i in 0..d {
        y[i] = ((y[i] - mean) * rstd).mul_add(gamma[i], beta[i]);
    }
    (mean, rstd)
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let dims @ Dims { b, gh, gw, r, d, k, .. } = a.dims;
    let (rows, columns, sums) = (gh / k, gw / k, (k * k + 3) * d);
    let mut partial = vec![0.0f32; b * rows * sums];
    with_taps(dims, a.weight, |taps| {
        let tasks: Vec<Option<&mut [f32]>> = match a.dx {
            None => (0..b * rows).map(|_| None).collect(),
            Some(dx) => {
                let sample = |dx| split_rows(dx, rows, k * gw * r * d);
                dx.chunks_exact_mut(gh * gw * r * d).flat_map(sample).map(Some).collect()
            }
        };
        tasks.into_par_iter().zip(partial.par_chunks_mut(sums)).enumerate().for_each(|(index, (dx, partial))| {
            let squares = Squares::new(dims, a.params.first, a.x, [index / rows, index % rows], taps, a.bias);
            let all = index * columns * 2;
            let saved = Saved {
                dy: &a.dy[all * d..][..columns * 2 * d],
                mean: &a.mean[all..][..columns * 2],
                rstd: &a.rstd[all..][..columns * 2],
                gamma: a.gamma,
            };
            with_scratch([d, d], |[n, g]| {
                vectorised(
                    #[inline(always)]
                    || row_backward(squares, saved, n, g, partial, dx),
                );
            });
        });
    });
    let (total, rest) = partial.split_at_mut(sums);
    for row in rest.chunks_exact(sums) {
        total.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    }
    let squared = k * k;
    for (channel, weight) in a.dweight.into_iter().flat_map(|w| w.chunks_exact_mut(squared)).enumerate() {
        weight.iter_mut().enumerate().for_each(|(tap, w)| *w = total[tap * d + channel]);
    }
    for (i, out) in [a.dbias, a.dgamma, a.dbeta].into_iter().enumerate() {
        out.into_iter().for_each(|out| out.copy_from_slice(&total[(squared + i) * d..][..d]));
    }
}

/// A sample's gradient by rows of squares; what lies below the last one becomes zero.
fn split_rows(sample: &mut [f32], rows: usize, len: usize) -> impl Iterator<Item = &mut [f32]> {
    let (whole, rest) = sample.split_at_mut(rows * len);
    rest.fill(0.0);
    whole.chunks_exact_mut(len)
}

/// What a row of squares saved, and what came back for it.
#[derive(Clone, Copy)]
struct Saved<'a> {
    dy: &'a [f32],
    mean: &'a [f32],
    rstd: &'a [f32],
    gamma: &'a [f32],
}

/// One row of squares; `n` and `g` are scratch, `partial` holds the sums of taps, bias, gamma and beta.
#[inline(always)]
fn row_backward(
    squares: Squares<'_>,
    saved: Saved<'_>,
    n: &mut [f32],
    g: &mut [f32],
    partial: &mut [f32],
    mut dx: Option<&mut [f32]>,
) {
    let d = n.len();
    let (d_taps, rest) = partial.split_at_mut(partial.len() - 3 * d);
    let (d_bias, rest) = rest.split_at_mut(d);
    let (d_gamma, d_beta) = rest.split_at_mut(d);
    if let Some(dx) = &mut dx {
        dx.fill(0.0);
    }
    for (i, dy) in saved.dy.chunks_exact(d).enumerate() {
        let (mean, rstd, gamma) = (saved.mean[i], saved.rstd[i], &saved.gamma[..d]);
        squares.convolve(i / 2, i % 2, n);
        for j in 0..d {
            n[j] = (n[j] - mean) * rstd;
            g[j] = dy[j] * gamma[j];
            d_gamma[j] = dy[j].mul_add(n[j], d_gamma[j]);
            d_beta[j] += dy[j];
        }
        let mean_g = sum_each(g, |g| g) / d as f32;
        let mean_gn = sum_pairs(g, n, |g, n| g * n) / d as f32;
        for j in 0..d {
            g[j] = rstd * (g[j] - mean_g - n[j] * mean_gn);
            d_bias[j] += g[j];
        }
        for (tap, d_tap) in d_taps.chunks_exact_mut(d).enumerate() {
            let from = squares.source(i / 2, i % 2, tap);
            add_product(g, &squares.rows[from..][..d], d_tap);
            if let Some(dx) = &mut dx {
                let (dx, weight) = (&mut dx[from..][..d], &squares.taps[tap * d..][..d]);
                for j in 0..d {
                    dx[j] = g[j] * weight[j];
                }
            }
        }
    }
}
