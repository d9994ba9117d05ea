//! Depthwise convolution for one row of channels, four taps at a time.

use std::cell::RefCell;
use std::ops::Range;

/// Taps applied in one pass over a row as a rule; filters are padded with zero taps to whole passes.
pub const GROUP: usize = 4;
/// Most channels of a row: weights, window and result of all four filters stay in the first-level cache.
pub const CHANNELS: usize = 128;
/// What a tap outside the sequence reads.
pub const ZEROS: [f32; CHANNELS] = [0.0; CHANNELS];

/// A filter, transposed so that channels are contiguous: `[taps, C]`, with its bias `[C]`.
pub struct Filter<'a> {
    taps: Vec<f32>,
    /// Taps applied in one pass: three where that wastes none, as in windows of three columns.
    group: usize,
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
    /// From the weights `[C, K]` and the bias `[C]`; the last `reversed` channels run against token order, which is the
    /// same as running with their taps in the other order.
    pub fn new(weight: &[f32], bias: &'a [f32], k: usize, reversed: usize) -> Self {
        let channels = bias.len();
        let mut taps = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
        taps.clear();
        let group = if k.is_multiple_of(3) { 3 } else { GROUP };
        taps.resize(k.next_multiple_of(group) * channels, 0.0);
        for (channel, weight) in weight.chunks_exact(k).enumerate() {
            let backward = channel + reversed >= channels;
            for (j, w) in weight.iter().enumerate() {
                taps[if backward { k - 1 - j } else { j } * channels + channel] = *w;
            }
        }
        Filter { taps, group, bias, channels }
    }

    /// `len` channels from `first` on of tap `j`.
    pub fn tap(&self, j: usize, first: usize, len: usize) -> &[f32] {
        &self.taps[j * self.channels + first..][..len]
    }

    /// `len` channels from `first` on of the bias.
    pub fn bias(&self, first: usize, len: usize) -> &[f32] {
        &self.bias[first..][..len]
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
        for (index, taps) in self.taps.chunks_exact(self.group * self.channels).enumerate() {
            let w = |j: usize| &taps[j * self.channels + first..][..len];
            let x = |j: usize| &x(index * self.group + j)[..len];
            if self.group == 3 {
                let ([w0, w1, w2], [x0, x1, x2]) = ([w(0), w(1), w(2)], [x(0), x(1), x(2)]);
                for i in 0..len {
                    out[i] = w0[i].mul_add(x0[i], w1[i].mul_add(x1[i], w2[i].mul_add(x2[i], out[i])));
                }
                continue;
            }
            let ([w0, w1, w2, w3], [x0, x1, x2, x3]) = ([w(0), w(1), w(2), w(3)], [x(0), x(1), x(2), x(3)]);
            for i in 0..len {
                let sum = w0[i].mul_add(x0[i], w1[i].mul_add(x1[i], out[i]));
                out[i] = w2[i].mul_add(x2[i], w3[i].mul_add(x3[i], sum));
            }
        }
    }
}

/// Gradients of taps and bias over `tokens`: `dw[j] += Σ_t dy(t)·x(t − lead + j)`, `bias += Σ_t dy(t)` where wanted.
///
/// `dw` holds rows of `stride` channels, one per padded tap; `first` and `len` choose the channels. `x` is asked for
/// tokens outside the sequence too, wrapped below zero, and answers zeros. Four tokens at a time, so that the sums are
/// loaded and stored once for sixteen products.
#[inline(always)]
pub fn filter_gradients<'a, 'b>(
    tokens: &Range<usize>,
    lead: usize,
    dy: impl Fn(usize) -> &'a [f32],
    x: impl Fn(usize) -> &'b [f32],
    dw: &mut [f32],
    mut bias: Option<&mut [f32]>,
    stride: usize,
    (first, len): (usize, usize),
) {
    for t in tokens.clone().step_by(GROUP) {
        let mut d: [&[f32]; GROUP] = [&ZEROS[..len]; GROUP];
        for i in 0..GROUP.min(tokens.end - t) {
            d[i] = &dy(t + i)[..len];
        }
        let [d0, d1, d2, d3] = d;
        if let Some(bias) = &mut bias {
            let bias = &mut bias[first..][..len];
            for i in 0..len {
                bias[i] += (d0[i] + d1[i]) + (d2[i] + d3[i]);
            }
        }
        for (group, dw) in dw.chunks_exact_mut(GROUP * stride).enumerate() {
            let row = |i: usize| &x((t + group * GROUP + i).wrapping_sub(lead))[..len];
            let (x0, x1, x2, x3, x4, x5, x6) = (row(0), row(1), row(2), row(3), row(4), row(5), row(6));
            let (w0, w) = dw.split_at_mut(stride);
            let (w1, w) = w.split_at_mut(stride);
            let (w2, w3) = w.split_at_mut(stride);
            let (w0, w1) = (&mut w0[first..][..len], &mut w1[first..][..len]);
            let (w2, w3) = (&mut w2[first..][..len], &mut w3[first..][..len]);
            for i in 0..len {
                let d = [d0[i], d1[i], d2[i], d3[i]];
                w0[i] += dot(d, [x0[i], x1[i], x2[i], x3[i]]);
                w1[i] += dot(d, [x1[i], x2[i], x3[i], x4[i]]);
                w2[i] += dot(d, [x2[i], x3[i], x4[i], x5[i]]);
                w3[i] += dot(d, [x3[i], x4[i], x5[i], x6[i]]);
            }
        }
    }
}

#[inline(always)]
fn dot(a: [f32; GROUP], b: [f32; GROUP]) -> f32 {
    a[0].mul_add(b[0], a[1].mul_add(b[1], a[2].mul_add(b[2], a[3] * b[3])))
}
