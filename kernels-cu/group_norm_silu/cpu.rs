//! CPU path: statistics in one pass over blocks of pixels that stay in cache, the result in a second.
//!
//! A block's sums run over pixels, channel by channel in vector lanes; the sums of a group, and of the blocks in their
//! order, are taken in f64. Blocks do not depend on the number of threads, so neither do the bits.

use crate::generated::group_norm_silu::{Backward, Dims, Forward};
use crate::simd::{sigmoid, vectorised};
use rayon::prelude::*;

/// Values of a block: 128 KiB, which the second-level cache keeps.
const BLOCK: usize = 1 << 15;

/// Pixels of a block.
fn block(c: usize) -> usize {
    (BLOCK / c).max(1)
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { b, h, w, c, g } = a.dims;
    let image = h * w * c;
    for index in 0..b {
        let x = &a.x[index * image..][..image];
        let (mean, rstd) = (&mut a.mean[index * g..][..g], &mut a.rstd[index * g..][..g]);
        match a.stats {
            Some(stats) => {
                let (means, rstds) = stats[index * 2 * g..][..2 * g].split_at(g);
                mean.copy_from_slice(means);
                rstd.copy_from_slice(rstds);
            }
            None => statistics(x, c, a.params.eps, mean, rstd),
        }
        let affine = Affine::new(a.gamma, a.beta, mean, rstd);
        let (y, silu) = (&mut a.y[index * image..][..image], a.params.silu);
        let len = block(c) * c;
        y.par_chunks_mut(len).zip(x.par_chunks(len)).for_each(|(y, x)| {
            vectorised(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                        affine.row(x, silu, y);
                    }
                },
            );
        });
    }
}

/// What every channel is mapped by.
struct Affine<'a> {
    mean: Vec<f32>,
    scale: Vec<f32>,
    beta: &'a [f32],
}

impl<'a> Affine<'a> {
    fn new(gamma: &[f32], beta: &'a [f32], mean: &[f32], rstd: &[f32]) -> Self {
        let width = gamma.len() / mean.len();
        let of = |values: &[f32]| values.iter().flat_map(|v| std::iter::repeat_n(*v, width)).collect::<Vec<f32>>();
        let scale = of(rstd).iter().zip(gamma).map(|(r, g)| r * g).collect();
        Affine { mean: of(mean), scale, beta }
    }

    /// One pixel.
    #[inline(always)]
    fn row(&self, x: &[f32], silu: bool, y: &mut [f32]) {
        let c = y.len();
        let (x, mean, scale, beta) = (&x[..c], &self.mean[..c], &self.scale[..c], &self.beta[..c]);
        for i in 0..c {
            y[i] = (x[i] - mean[i]).mul_add(scale[i], beta[i]);
        }
        if silu {
            for z in y {
                *z *= sigmoid(*z);
            }
        }
    }
}

/// Mean and reciprocal standard deviation of every group of one image.
fn statistics(x: &[f32], c: usize, eps: f32, mean: &mut [f32], rstd: &mut [f32]) {
    let (g, len) = (mean.len(), block(c) * c);
    let width = c / g;
    // Of every block and group: the mean, and the sum of squares about it.
    let mut moments = vec![0.0f64; x.len().div_ceil(len) * 2 * g];
    moments.par_chunks_mut(2 * g).zip(x.par_chunks(len)).for_each(|(moments, x)| {
        let (means, squares) = moments.split_at_mut(g);
        let pixels = x.len() / c;
        let (mut sums, mut centre) = (vec![0.0f32; c], vec![0.0f32; c]);
        vectorised(
            #[inline(always)]
            || {
                let sums = &mut sums[..c];
                for row in x.chunks_exact(c) {
                    for i in 0..c {
                        sums[i] += row[i];
                    }
                }
            },
        );
        for (group, (mean, sums)) in means.iter_mut().zip(sums.chunks_exact(width)).enumerate() {
            *mean = sums.iter().map(|s| f64::from(*s)).sum::<f64>() / (pixels * width) as f64;
            centre[group * width..][..width].fill(*mean as f32);
            // What is summed next is about the rounded mean.
            *mean = f64::from(*mean as f32);
        }
        let mut about = vec![0.0f32; c];
        let mut left = vec![0.0f32; c];
        vectorised(
            #[inline(always)]
            || {
                let (centre, about, left) = (&centre[..c], &mut about[..c], &mut left[..c]);
                for row in x.chunks_exact(c) {
                    for i in 0..c {
                        let d = row[i] - centre[i];
                        about[i] = d.mul_add(d, about[i]);
                        left[i] += d;
                    }
                }
            },
        );
        for (group, (mean, square)) in means.iter_mut().zip(squares).enumerate() {
            let of = |values: &[f32]| values[group * width..][..width].iter().map(|v| f64::from(*v)).sum::<f64>();
            let (count, rest) = ((pixels * width) as f64, of(&left));
            *mean += rest / count;
            *square = of(&about) - rest * rest / count;
        }
    });
    for group in 0..g {
        let (mut seen, mut total, mut square) = (0.0f64, 0.0f64, 0.0f64);
        for (index, moments) in moments.chunks_exact(2 * g).enumerate() {
            let count = ((len.min(x.len() - index * len)) / c * width) as f64;
            let step = moments[group] - total;
            square += moments[g + group] + step * step * seen * count / (seen + count);
            total += step * count / (seen + count);
            seen += count;
        }
        mean[group] = total as f32;
        rstd[group] = (1.0 / (square / seen + f64::from(eps)).sqrt()) as f32;
    }
}

/// Backward pass: one pass for the sums of channels, which leaves the gradient u of z where that of x will be, and one
/// for the gradient of x.
pub fn backward(a: Backward<'_, f32>) {
    let Dims { b, h, w, c, g } = a.dims;
    let (image, width, len) = (h * w * c, c / g, block(c) * c);
    let (mut d_gamma, mut d_beta) = (vec![0.0f64; c], vec![0.0f64; c]);
    let (asked, mut unasked) = (a.dx.is_some(), Vec::new());
    let dx = a.dx.unwrap_or_else(|| {
        unasked.resize(b * image, 0.0);
        &mut unasked
    });
    for (index, dx) in dx.chunks_mut(image).enumerate() {
        let (x, dy) = (&a.x[index * image..][..image], &a.dy[index * image..][..image]);
        let rstd = &a.rstd[index * g..][..g];
        let affine = Affine::new(a.gamma, a.beta, &a.mean[index * g..][..g], rstd);
        let [sum_u, sum_ud] = affine.slopes(x, dy, a.params.silu, dx);
        let rstd: Vec<f64> = (0..c).map(|i| f64::from(rstd[i / width])).collect();
        (0..c).for_each(|i| {
            d_gamma[i] += sum_ud[i] * rstd[i];
            d_beta[i] += sum_u[i];
        });
        if !asked {
            continue;
        }
        // dx = rstd·(v − mean(v) − n·mean(v·n)) with v = u·gamma and n = (x − mean)·rstd, but given statistics are
        // constants.
        let own = if a.stats.is_some() { 0.0 } else { 1.0 / (h * w * width) as f64 };
        let mean_of = |sums: &[f64], i: usize| -> f64 {
            let first = i / width * width;
            (first..first + width).map(|i| sums[i] * f64::from(a.gamma[i])).sum::<f64>() * own
        };
        let shift: Vec<f32> = (0..c).map(|i| (-rstd[i] * mean_of(&sum_u, i)) as f32).collect();
        let slope: Vec<f32> = (0..c).map(|i| (-rstd[i].powi(3) * mean_of(&sum_ud, i)) as f32).collect();
        dx.par_chunks_mut(len).zip(x.par_chunks(len)).for_each(|(dx, x)| {
            vectorised(
                #[inline(always)]
                || {
                    // Of one length, so that no index is checked.
                    let (mean, scale) = (&affine.mean[..c], &affine.scale[..c]);
                    let (shift, slope) = (&shift[..c], &slope[..c]);
                    for (dx, x) in dx.chunks_exact_mut(c).zip(x.chunks_exact(c)) {
                        for i in 0..c {
                            dx[i] = dx[i].mul_add(scale[i], (x[i] - mean[i]).mul_add(slope[i], shift[i]));
                        }
                    }
                },
            );
        });
    }
    a.dgamma.into_iter().flatten().zip(d_gamma).for_each(|(o, v)| *o = v as f32);
    a.dbeta.into_iter().flatten().zip(d_beta).for_each(|(o, v)| *o = v as f32);
}

impl Affine<'_> {
    /// The gradient u = dy·act'(z) of every value of one image, and Σ u and Σ u·(x − mean) of every channel.
    fn slopes(&self, x: &[f32], dy: &[f32], silu: bool, u: &mut [f32]) -> [Vec<f64>; 2] {
        let c = self.beta.len();
        let len = block(c) * c;
        let mut partial = vec![0.0f32; x.len().div_ceil(len) * 2 * c];
        let values = u.par_chunks_mut(len).zip(x.par_chunks(len).zip(dy.par_chunks(len)));
        partial.par_chunks_mut(2 * c).zip(values).for_each(|(sums, (u, (x, dy)))| {
            let (sum_u, sum_ud) = sums.split_at_mut(c);
            let mut d = vec![0.0f32; c];
            vectorised(
                #[inline(always)]
                || {
                    let (d, sum_u, sum_ud) = (&mut d[..c], &mut sum_u[..c], &mut sum_ud[..c]);
                    for (u, (x, dy)) in u.chunks_exact_mut(c).zip(x.chunks_exact(c).zip(dy.chunks_exact(c))) {
                        self.slope(x, dy, silu, d, u);
                        for i in 0..c {
                            sum_u[i] += u[i];
                            sum_ud[i] = u[i].mul_add(d[i], sum_ud[i]);
                        }
                    }
                },
            );
        });
        let mut total = [vec![0.0f64; c], vec![0.0f64; c]];
        for sums in partial.chunks_exact(2 * c) {
            for (total, sums) in total.iter_mut().zip(sums.chunks_exact(c)) {
                total.iter_mut().zip(sums).for_each(|(t, s)| *t += f64::from(*s));
            }
        }
        total
    }

    /// d = x − mean and u = dy·act'(z) of one pixel.
    #[inline(always)]
    fn slope(&self, x: &[f32], dy: &[f32], silu: bool, d: &mut [f32], u: &mut [f32]) {
        let c = u.len();
        let (x, dy, d) = (&x[..c], &dy[..c], &mut d[..c]);
        let (mean, scale, beta) = (&self.mean[..c], &self.scale[..c], &self.beta[..c]);
        for i in 0..c {
            d[i] = x[i] - mean[i];
            u[i] = dy[i];
        }
        if silu {
            for i in 0..c {
                let z = d[i].mul_add(scale[i], beta[i]);
                let s = sigmoid(z);
                u[i] *= s * z.mul_add(1.0 - s, 1.0);
            }
        }
    }
}
