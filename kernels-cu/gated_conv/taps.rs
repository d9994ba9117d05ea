//! Depthwise convolution along the tokens for one row of channels, four taps at a time.

use crate::simd::LANES;
use std::cell::RefCell;

/// Taps applied in one pass over a row; filters are padded with zero taps to a multiple of it.
pub const GROUP: usize = 4;
/// Most channels of a row: weights, window and result of all four filters stay in the first-level cache.
pub const CHANNELS: usize = 128;
/// What a tap outside the sequence reads.
pub const ZEROS: [f32; CHANNELS] = [0.0; CHANNELS];

/// A filter, transposed so that channels are contiguous: `[taps, C]`, with its bias `[C]`.
pub struct Filter<'a> {
    taps: Vec<f32>,
    bias: &'a [f32],
    channels: usize,
}

thread_local! {
    /// Memory of transposed filters, kept from call to call.
    static SPARE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

impl Drop for Filter<'_> {
    fn drop(&mut self) {
        let taps = std::mem::take(&mut self.taps);
        SPARE.with_borrow_mut(|spare| spare.push(taps));
    }
}

impl<'a> Filter<'a> {
    /// From the weights `[C, K]` and the bias `[C]`.
    pub fn new(weight: &[f32], bias: &'a [f32], k: usize) -> Self {
        let channels = bias.len();
        let mut taps = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
        taps.clear();
        taps.resize(k.next_multiple_of(GROUP) * channels, 0.0);
        for (channel, weight) in weight.chunks_exact(k).enumerate() {
            weight.iter().enumerate().for_each(|(j, w)| taps[j * channels + channel] = *w);
        }
        Filter { taps, bias, channels }
    }

    /// `out = bias + Σ_j w[j]·x(j)` for the channels from `first` on; `x(j)` is the row that tap `j` reads.
    #[inline(always)]
    pub fn apply<'x>(&self, first: usize, x: impl Fn(usize) -> &'x [f32], out: &mut [f32]) {
        out.copy_from_slice(&self.bias[first..][..out.len()]);
        self.accumulate(first, x, out);
    }

    /// `out = Σ_j w[j]·dy(j)`: the gradient of the input; `dy(j)` is the gradient of the row that read it by tap `j`.
    #[inline(always)]
    pub fn apply_transposed<'x>(&self, first: usize, dy: impl Fn(usize) -> &'x [f32], out: &mut [f32]) {
        out.fill(0.0);
        self.accumulate(first, dy, out);
    }

    #[inline(always)]
    fn accumulate<'x>(&self, first: usize, x: impl Fn(usize) -> &'x [f32], out: &mut [f32]) {
        let len = out.len();
        for (group, taps) in self.taps.chunks_exact(GROUP * self.channels).enumerate() {
            let w = |j: usize| &taps[j * self.channels + first..][..len];
            let x = |j: usize| &x(group * GROUP + j)[..len];
            let ([w0, w1, w2, w3], [x0, x1, x2, x3]) = ([w(0), w(1), w(2), w(3)], [x(0), x(1), x(2), x(3)]);
            for i in 0..len {
                let sum = w0[i].mul_add(x0[i], w1[i].mul_add(x1[i], out[i]));
                out[i] = w2[i].mul_add(x2[i], w3[i].mul_add(x3[i], sum));
            }
        }
    }
}

/// Gradients of taps and bias over `rows` tokens: `dw[j] += Σ_t dy(t)·x(t, j)`, `db += Σ_t dy(t)`, for `len` channels.
///
/// `dw` holds rows of `stride` values, one per padded tap, the bias last.
#[inline(always)]
pub fn filter_gradients<'a, 'b>(
    rows: usize,
    len: usize,
    taps: usize,
    dy: impl Fn(usize) -> &'a [f32],
    x: impl Fn(usize, usize) -> &'b [f32],
    dw: &mut [f32],
    stride: usize,
) {
    for group in (0..taps).step_by(GROUP) {
        let mut at = 0;
        while at < len {
            let lanes = LANES.min(len - at);
            let mut sums = [[0.0f32; LANES]; GROUP + 1];
            for t in 0..rows {
                let window: [&[f32]; GROUP] = std::array::from_fn(|j| &x(t, group + j)[at..]);
                add_products(&dy(t)[at..], window, lanes, &mut sums);
            }
            for j in 0..GROUP {
                let out = &mut dw[(group + j) * stride + at..][..lanes];
                out.iter_mut().zip(&sums[j]).for_each(|(o, s)| *o = *s);
            }
            if group == 0 {
                let out = &mut dw[taps * stride + at..][..lanes];
                out.iter_mut().zip(&sums[GROUP]).for_each(|(o, s)| *o = *s);
            }
            at += lanes;
        }
    }
}

#[inline(always)]
fn add_products(dy: &[f32], x: [&[f32]; GROUP], lanes: usize, sums: &mut [[f32; LANES]; GROUP + 1]) {
    let mut add = |lanes: usize| {
        for j in 0..GROUP {
            let x = &x[j][..lanes];
            for lane in 0..lanes {
                sums[j][lane] = dy[lane].mul_add(x[lane], sums[j][lane]);
            }
        }
        for lane in 0..lanes {
            sums[GROUP][lane] += dy[lane];
        }
    };
    // A constant length is a register; the rest of an odd row is a loop.
    if lanes == LANES { add(LANES) } else { add(lanes) }
}
