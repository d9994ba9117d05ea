//! CPU path: blocks of tokens over threads, channels in strips whose filter and window stay in the first-level cache.
//!
//! All indices are times: the position of a token in the order of the scan. In the backward pass a block computes the
//! gradients of the few rows behind it again, so that blocks share nothing but the sums of the filter gradients, which
//! are added in the order of the blocks.

use crate::Order;
use crate::attention::layout::with_scratch;
use crate::gated_conv::taps::{CHANNELS, Filter, GROUP, ZEROS, filter_gradients};
use crate::generated::conv_silu::{Backward, Dims, Forward, Params};
use crate::simd::{sigmoid, vectorised};
use rayon::prelude::*;
use std::ops::Range;

/// Tokens of a block: enough to make the rows computed twice few.
fn block_len(Dims { n, k, .. }: Dims) -> usize {
    n.min(64.max(8 * k))
}

/// One sample, read in the order of the scan.
#[derive(Clone, Copy)]
struct Sample<'a> {
    dims: Dims,
    order: Order,
    offset: usize,
    /// `[N, W]`.
    p: &'a [f32],
    filter: &'a Filter<'a>,
}

impl<'a> Sample<'a> {
    fn new(dims: Dims, params: Params, p: &'a [f32], sample: usize, filter: &'a Filter<'a>) -> Self {
        let Dims { n, w, .. } = dims;
        let order = Order { n, reverse: params.reverse };
        Sample { dims, order, offset: params.offset, p: &p[sample * n * w..][..n * w], filter }
    }

    /// The times of a block of tokens, given by its index.
    fn times(&self, block: usize) -> Range<usize> {
        let Dims { n, .. } = self.dims;
        let tokens = block * block_len(self.dims)..n.min((block + 1) * block_len(self.dims));
        if self.order.reverse { n - tokens.end..n - tokens.start } else { tokens }
    }

    /// Place of a time in a block of tokens.
    #[inline(always)]
    fn place(&self, times: &Range<usize>, time: usize) -> usize {
        if self.order.reverse { times.end - 1 - time } else { time - times.start }
    }

    #[inline(always)]
    fn row(&self, time: usize, first: usize, len: usize) -> &'a [f32] {
        if time < self.dims.n {
            &self.p[self.order.token(time) * self.dims.w + self.offset + first..][..len]
        } else {
            &ZEROS[..len]
        }
    }

    /// The convolution at a time, before the activation.
    #[inline(always)]
    fn convolve(&self, time: usize, first: usize, out: &mut [f32]) {
        let len = out.len();
        let source = |j: usize| {
            let earlier = (time + j).wrapping_sub(self.dims.k - 1);
            self.row(if j < self.dims.k { earlier } else { usize::MAX }, first, len)
        };
        self.filter.apply(first, source, out);
    }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let dims @ Dims { n, c, k, .. } = a.dims;
    let filter = Filter::new(a.weight, a.bias, k, 0);
    a.y.par_chunks_mut(n * c).enumerate().for_each(|(sample, y)| {
        let sample = Sample::new(dims, a.params, a.p, sample, &filter);
        y.par_chunks_mut(block_len(dims) * c).enumerate().for_each(|(block, y)| {
            let times = sample.times(block);
            vectorised(
                #[inline(always)]
                || {
                    for first in (0..c).step_by(CHANNELS) {
                        let len = CHANNELS.min(c - first);
                        for time in times.clone() {
                            let y = &mut y[sample.place(&times, time) * c + first..][..len];
                            sample.convolve(time, first, y);
                            for i in 0..len {
                                y[i] *= sigmoid(y[i]);
                            }
                        }
                    }
                },
            );
        });
    });
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let dims @ Dims { b, n, w, c, k } = a.dims;
    let filter = Filter::new(a.weight, a.bias, k, 0);
    let (per_sample, block) = (n.div_ceil(block_len(dims)), block_len(dims));
    let mut dp: Vec<Option<&mut [f32]>> = match a.dp {
        Some(dp) => dp.chunks_mut(n * w).flat_map(|sample| sample.chunks_mut(block * w)).map(Some).collect(),
        None => (0..b * per_sample).map(|_| None).collect(),
    };
    // Per block: the padded taps and the bias, rows of C.
    let taps = k.next_multiple_of(GROUP);
    let mut partial = vec![0.0f32; b * per_sample * (taps + 1) * c];
    dp.par_iter_mut().zip(partial.par_chunks_mut((taps + 1) * c)).enumerate().for_each(|(index, (dp, dw))| {
        let sample = Sample::new(dims, a.params, a.p, index / per_sample, &filter);
        let dy = &a.dy[index / per_sample * n * c..][..n * c];
        if let Some(dp) = dp {
            dp.fill(0.0);
        }
        for first in (0..c).step_by(CHANNELS) {
            let len = CHANNELS.min(c - first);
            with_scratch([(block + k - 1) * len], |[du]| {
                vectorised(
                    #[inline(always)]
                    || strip(&sample, index % per_sample, dy, first, len, du, dp.as_deref_mut(), dw),
                );
            });
        }
    });
    let (total, rest) = partial.split_at_mut((taps + 1) * c);
    for block in rest.chunks_exact(total.len()) {
        total.iter_mut().zip(block).for_each(|(sum, x)| *sum += x);
    }
    if let Some(out) = a.dweight {
        out.iter_mut().enumerate().for_each(|(i, out)| *out = total[i % k * c + i / k]);
    }
    if let Some(out) = a.dbias {
        out.copy_from_slice(&total[taps * c..]);
    }
}

/// Gradients of one block of one strip of channels.
#[inline(always)]
fn strip(
    sample: &Sample<'_>,
    block: usize,
    dy: &[f32],
    first: usize,
    len: usize,
    du: &mut [f32],
    dp: Option<&mut [f32]>,
    dw: &mut [f32],
) {
    let Dims { n, w, c, k, .. } = sample.dims;
    let times = sample.times(block);
    // The convolutions that read this block reach K − 1 tokens on.
    let readers = times.start..n.min(times.end + k - 1);
    for time in readers.clone() {
        let du = &mut du[(time - times.start) * len..][..len];
        let dy = &dy[sample.order.token(time) * c + first..][..len];
        sample.convolve(time, first, du);
        for i in 0..len {
            let s = sigmoid(du[i]);
            du[i] = dy[i] * s * du[i].mul_add(1.0 - s, 1.0);
        }
    }
    let du =
        |time: usize| if readers.contains(&time) { &du[(time - times.start) * len..][..len] } else { &ZEROS[..len] };
    if let Some(dp) = dp {
        for time in times.clone() {
            let dp = &mut dp[sample.place(&times, time) * w + sample.offset + first..][..len];
            sample.filter.apply_transposed(first, |j| du(if j < k { time + k - 1 - j } else { usize::MAX }), dp);
        }
    }
    let (dw, bias) = dw.split_at_mut(k.next_multiple_of(GROUP) * c);
    filter_gradients(&times, k - 1, du, |t| sample.row(t, first, len), dw, Some(bias), c, (first, len));
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::Tier;
    use crate::check::{Fill, Tolerance, compare, draw_f32};
    use crate::generated::conv_silu::{CASES, INFO};

    #[test]
    fn agrees_with_the_oracle() {
        for case in CASES.iter().filter(|case| case.tier == Tier::Tiny) {
            let (dims @ Dims { b, n, w, c, k }, params) = (case.dims, case.params);
            let (p, dy) =
                (draw_f32("p", case.name, b * n * w, Fill::Normal), draw_f32("dy", case.name, b * n * c, Fill::Normal));
            let weight = draw_f32("weight", case.name, c * k, Fill::Uniform(-0.5, 0.5));
            let bias = draw_f32("bias", case.name, c, Fill::Uniform(-0.5, 0.5));
            let run = |forward: fn(Forward<'_, f32>), backward: fn(Backward<'_, f32>)| {
                let [mut y, mut dp, mut dw, mut db] = [b * n * c, b * n * w, c * k, c].map(|len| vec![f32::NAN; len]);
                forward(Forward { dims, params, p: &p, weight: &weight, bias: &bias, y: &mut y });
                backward(Backward {
                    dims,
                    params,
                    dy: &dy,
                    p: &p,
                    weight: &weight,
                    bias: &bias,
                    dp: Some(&mut dp),
                    dweight: Some(&mut dw),
                    dbias: Some(&mut db),
                });
                [("y", y), ("dp", dp), ("dweight", dw), ("dbias", db)]
            };
            let (got, want) = (run(forward, backward), run(reference::forward, reference::backward));
            for ((name, got), (_, want)) in got.iter().zip(&want) {
                let result = compare(got, want, INFO.tolerance.unwrap_or(Tolerance::F32));
                assert!(result.pass, "{} {name}: {result:?}", case.name);
            }
        }
    }
}
