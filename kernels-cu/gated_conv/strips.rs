//! The fused kernel of the gated convolutions: blocks of tokens over threads, channels in strips that keep filters and
//! windows in the first-level cache and the strips of a block in the second.
//!
//! A block recomputes the few tokens around it that its convolutions reach, so blocks share nothing but the sums of the
//! filter gradients, which are added in the order of the blocks.

use super::grid::{backward_square, forward_square};
use super::square::{self, Rows};
use super::taps::{CHANNELS, Filter, GROUP, ZEROS, filter_gradients};
use super::window::Window;
use crate::simd::vectorised;
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Floats of all strips of a block that should stay in the second-level cache.
const CACHED: usize = 96 * 1024;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// What a call computes: `y = q·inner(k·v)`, `(q, k, v) = short(p)`, channel by channel.
#[derive(Clone, Copy)]
pub(crate) struct Call<'w> {
    /// Channels C.
    pub channels: usize,
    /// Channels at the end that run against token order.
    pub reversed: usize,
    /// Tokens and taps.
    pub window: Window,
    /// Weight `[3, C, taps]` and bias `[3, C]` of the filters of q, k and v; absent where there are none.
    pub short: [Option<&'w [f32]>; 2],
    /// Weight `[C, taps]` and bias `[C]` of the filter of k·v; absent where there is none.
    pub inner: [Option<&'w [f32]>; 2],
}

/// Gradients to be written, where they are wanted.
pub(crate) struct Gradients<'g> {
    /// `[B, N, 3, C]`
    pub dp: Option<&'g mut [f32]>,
    /// Weight and bias of the short filters.
    pub short: [Option<&'g mut [f32]>; 2],
    /// Weight and bias of the inner filter.
    pub inner: [Option<&'g mut [f32]>; 2],
}

/// Rows of some channels of consecutive tokens.
pub(super) struct Strip<'a> {
    pub data: &'a mut [f32],
    pub tokens: Range<usize>,
    pub len: usize,
}

impl Strip<'_> {
    #[inline(always)]
    pub fn row(&self, token: usize) -> &[f32] {
        &self.data[(token - self.tokens.start) * self.len..][..self.len]
    }

    #[inline(always)]
    pub fn row_mut(&mut self, token: usize) -> &mut [f32] {
        &mut self.data[(token - self.tokens.start) * self.len..][..self.len]
    }

    pub fn rows(&self) -> Rows<&[f32]> {
        Rows { data: self.data, origin: self.tokens.start, step: self.len, offset: 0 }
    }

    pub fn rows_mut(&mut self) -> Rows<&mut [f32]> {
        Rows { data: self.data, origin: self.tokens.start, step: self.len, offset: 0 }
    }
}

/// Cuts this thread's scratch into strips over the given tokens; contents are arbitrary.
fn with_strips<const COUNT: usize>(tokens: [&Range<usize>; COUNT], len: usize, body: impl FnOnce([Strip<'_>; COUNT])) {
    SCRATCH.with_borrow_mut(|scratch| {
        let total = tokens.iter().map(|t| t.len() * len).sum();
        if scratch.len() < total {
            scratch.resize(total, 0.0);
        }
        let mut rest = &mut scratch[..];
        body(tokens.map(|tokens| {
            let data = rest.split_off_mut(..tokens.len() * len).unwrap_or_default();
            Strip { data, tokens: tokens.clone(), len }
        }));
    });
}

/// The strips of a call: (first channel, channels), so wide that `tokens` rows in all stay in the cache, but no less
/// than a row needs to be more than the rest of its loops. None holds channels of both directions.
fn strips(channels: usize, reversed: usize, tokens: usize) -> impl Iterator<Item = (usize, usize)> {
    let width = (CACHED / tokens.max(1) / 64 * 64).clamp(64, CHANNELS);
    let forward = channels - reversed.min(channels);
    let part = move |from: usize, to: usize| (from..to).step_by(width).map(move |first| (first, width.min(to - first)));
    part(0, forward).chain(part(forward, channels))
}

/// The filters of one call.
pub(crate) struct Filters<'w> {
    pub(super) channels: usize,
    pub(super) short: Option<[Filter<'w>; 3]>,
    pub(super) inner: Option<Filter<'w>>,
}

impl<'w> Filters<'w> {
    pub fn new(call: Call<'w>) -> Self {
        let (c, taps) = (call.channels, call.window.taps());
        let filter = |w: &'w [f32], bias: &'w [f32], i: usize| {
            Filter::new(&w[i * c * taps..][..c * taps], &bias[i * c..][..c], taps, call.reversed)
        };
        let short = call.short[0].zip(call.short[1]).map(|(w, bias)| [0, 1, 2].map(|part| filter(w, bias, part)));
        let inner = call.inner[0].zip(call.inner[1]).map(|(w, bias)| filter(w, bias, 0));
        Filters { channels: c, short, inner }
    }

    /// Row `t` of q, k or v, for the channels of `out` from `first` on; `p` is the sample's `[N, 3, C]`.
    #[inline(always)]
    pub fn short(&self, window: &Window, part: usize, p: &[f32], t: usize, first: usize, out: &mut [f32]) {
        let len = out.len();
        let row = |t: usize| &p[(t * 3 + part) * self.channels + first..][..len];
        match &self.short {
            Some(filters) => {
                let place = window.place(t);
                filters[part].apply(first, |j| window.source(place, j).map_or(&ZEROS[..], row), out);
            }
            None => out.copy_from_slice(row(t)),
        }
    }

    /// Row `t` of the inner convolution of `gated`.
    #[inline(always)]
    fn inner(&self, window: &Window, gated: &Strip<'_>, t: usize, first: usize, out: &mut [f32]) {
        match &self.inner {
            Some(filter) => {
                let place = window.place(t);
                filter.apply(first, |j| window.source(place, j).map_or(&ZEROS[..], |t| gated.row(t)), out);
            }
            None => out.copy_from_slice(gated.row(t)),
        }
    }

    /// Gradient of row `t` of `gated` from that of the inner convolution.
    #[inline(always)]
    fn inner_transposed(&self, window: &Window, d: &Strip<'_>, t: usize, first: usize, out: &mut [f32]) {
        transposed(self.inner.as_ref(), window, |t| d.row(t), t, first, out);
    }

    /// Gradient of row `t` of `p` from the rows `d` of that of q, k or v.
    #[inline(always)]
    pub fn short_transposed<'d>(
        &self,
        window: &Window,
        part: usize,
        d: impl Fn(usize) -> &'d [f32],
        t: usize,
        first: usize,
        out: &mut [f32],
    ) {
        transposed(self.short.as_ref().map(|filters| &filters[part]), window, d, t, first, out);
    }
}

/// Gradient of the input row `t` of a filter from the rows `d` of that of its output.
#[inline(always)]
fn transposed<'d>(
    filter: Option<&Filter<'_>>,
    window: &Window,
    d: impl Fn(usize) -> &'d [f32],
    t: usize,
    first: usize,
    out: &mut [f32],
) {
    match filter {
        Some(filter) => {
            let place = window.place(t);
            filter.apply_transposed(first, |j| window.reader(place, j).map_or(&ZEROS[..], &d), out);
        }
        None => out.copy_from_slice(d(t)),
    }
}

#[inline(always)]
pub(super) fn multiply(x: &mut [f32], by: &[f32]) {
    let by = &by[..x.len()];
    for i in 0..x.len() {
        x[i] *= by[i];
    }
}

#[inline(always)]
pub(super) fn product(x: &[f32], y: &[f32], out: &mut [f32]) {
    let (x, y) = (&x[..out.len()], &y[..out.len()]);
    for i in 0..out.len() {
        out[i] = x[i] * y[i];
    }
}

impl Call<'_> {
    /// Tokens of a block: the whole of a small sequence, else enough to make the recomputed margin small.
    fn block(&self) -> usize {
        self.window.tokens().min(64.max(4 * self.window.margin()))
    }

    /// The window of the channels from `first` on.
    pub fn window_of(&self, first: usize) -> Window {
        if first + self.reversed >= self.channels { self.window.turned() } else { self.window }
    }

    /// Whether the walks of `square` take the window.
    fn square(&self) -> bool {
        self.reversed == 0 && square::takes(&self.window)
    }

    /// Forward pass over samples `p [B, N, 3, C]` to `y [B, N, C]`.
    pub fn forward(&self, p: &[f32], y: &mut [f32]) {
        let (n, c, block) = (self.window.tokens(), self.channels, self.block());
        let filters = Filters::new(*self);
        y.par_chunks_mut(n * c).enumerate().for_each(|(sample, y)| {
            let p = &p[sample * n * 3 * c..][..n * 3 * c];
            y.par_chunks_mut(block * c).enumerate().for_each(|(index, y)| {
                let tokens = index * block..n.min((index + 1) * block);
                for (first, len) in strips(c, self.reversed, block + self.window.margin()) {
                    let window = self.window_of(first);
                    let gated = if filters.inner.is_some() { window.sources(&tokens) } else { tokens.clone() };
                    if self.square() {
                        with_strips([&gated], len, |[gated]| {
                            forward_square(&filters, &window, p, &tokens, first, gated, y);
                        });
                        continue;
                    }
                    with_strips([&gated, &(0..1)], len, |strips| {
                        vectorised(
                            #[inline(always)]
                            || forward_strip(&filters, &window, p, &tokens, first, strips, y),
                        );
                    });
                }
            });
        });
    }

    /// Backward pass over `p [B, N, 3, C]` and `dy [B, N, C]`.
    pub fn backward(&self, p: &[f32], dy: &[f32], out: Gradients<'_>) {
        let (n, c, block, taps) = (self.window.tokens(), self.channels, self.block(), self.window.taps());
        let filters = Filters::new(*self);
        let count = n.div_ceil(block.max(1));
        let mut dp: Vec<Option<&mut [f32]>> = match out.dp {
            Some(dp) => dp.chunks_mut(n * 3 * c).flat_map(|x| x.chunks_mut(block * 3 * c)).map(Some).collect(),
            None => (0..dy.len() / (n * c).max(1) * count).map(|_| None).collect(),
        };
        let rows = gradient_rows(&self.window);
        let mut partial = vec![0.0f32; dp.len() * 4 * rows * c];
        let parts = partial.par_chunks_mut(4 * rows * c);
        dp.par_iter_mut().zip(parts).enumerate().for_each(|(index, (dp, dw))| {
            let (sample, from) = (index / count, index % count * block);
            let tokens = from..n.min(from + block);
            let p = &p[sample * n * 3 * c..][..n * 3 * c];
            let dy = &dy[sample * n * c..][..n * c];
            for (first, len) in strips(c, self.reversed, 7 * (block + 2 * self.window.margin())) {
                let window = self.window_of(first);
                // Gradients of q, k, v are wanted where a short filter reaches this block, those of the inner
                // filter's output where that reaches them, and k·v where the inner filter reads.
                let outer = if filters.short.is_some() { window.readers(&tokens) } else { tokens.clone() };
                let (gates, sources) = match filters.inner {
                    Some(_) => (window.readers(&outer), window.sources(&outer)),
                    None => (outer.clone(), outer.clone()),
                };
                with_strips([&sources, &sources, &sources, &gates, &outer, &outer, &outer], len, |strips| {
                    if self.square() {
                        return backward_square(
                            &filters,
                            &window,
                            p,
                            dy,
                            &tokens,
                            first,
                            strips,
                            dp.as_deref_mut(),
                            dw,
                        );
                    }
                    vectorised(
                        #[inline(always)]
                        || backward_strip(&filters, &window, p, dy, &tokens, first, strips, dp.as_deref_mut(), dw),
                    );
                });
            }
        });
        let (total, rest) = partial.split_at_mut(4 * rows * c);
        for block in rest.chunks_exact(total.len()) {
            total.iter_mut().zip(block).for_each(|(sum, x)| *sum += x);
        }
        let filter = |i: usize| &total[i * rows * c..][..rows * c];
        let [columns, padded] = [self.window.size[1], self.window.size[1].next_multiple_of(GROUP)];
        let store = |[weight, bias]: [Option<&mut [f32]>; 2], first: usize| {
            for (i, out) in weight.into_iter().flat_map(|w| w.chunks_exact_mut(taps)).enumerate() {
                let backward = i % c + self.reversed >= c;
                for (j, out) in out.iter_mut().enumerate() {
                    let j = if backward { taps - 1 - j } else { j };
                    *out = filter(first + i / c)[(j / columns * padded + j % columns) * c + i % c];
                }
            }
            for (i, out) in bias.into_iter().flat_map(|bias| bias.chunks_exact_mut(c)).enumerate() {
                out.copy_from_slice(&filter(first + i)[(rows - 1) * c..]);
            }
        };
        store(out.short, 0);
        store(out.inner, 3);
    }
}

/// Rows of the gradient sums of a filter: its taps, each row of the window padded to whole groups, and the bias.
pub(crate) fn gradient_rows(window: &Window) -> usize {
    window.size[0] * window.size[1].next_multiple_of(GROUP) + 1
}

#[inline(always)]
fn forward_strip(
    filters: &Filters<'_>,
    window: &Window,
    p: &[f32],
    tokens: &Range<usize>,
    first: usize,
    [mut gated, mut extra]: [Strip<'_>; 2],
    y: &mut [f32],
) {
    let (c, len) = (filters.channels, gated.len);
    for t in gated.tokens.clone() {
        filters.short(window, 1, p, t, first, gated.row_mut(t));
        filters.short(window, 2, p, t, first, extra.row_mut(0));
        multiply(gated.row_mut(t), extra.row(0));
    }
    for t in tokens.clone() {
        let y = &mut y[(t - tokens.start) * c + first..][..len];
        filters.short(window, 0, p, t, first, y);
        filters.inner(window, &gated, t, first, extra.row_mut(0));
        multiply(y, extra.row(0));
    }
}

#[inline(always)]
fn backward_strip(
    filters: &Filters<'_>,
    window: &Window,
    p: &[f32],
    dy: &[f32],
    tokens: &Range<usize>,
    first: usize,
    [mut key, mut value, mut gated, mut d_mixed, mut dq, mut dk, mut dv]: [Strip<'_>; 7],
    dp: Option<&mut [f32]>,
    dw: &mut [f32],
) {
    let (c, len) = (filters.channels, key.len);
    let dy = |t: usize| &dy[t * c + first..][..len];
    for t in key.tokens.clone() {
        filters.short(window, 1, p, t, first, key.row_mut(t));
        filters.short(window, 2, p, t, first, value.row_mut(t));
        product(key.row(t), value.row(t), gated.row_mut(t));
    }
    for t in d_mixed.tokens.clone() {
        filters.short(window, 0, p, t, first, d_mixed.row_mut(t));
        multiply(d_mixed.row_mut(t), dy(t));
    }
    for t in dq.tokens.clone() {
        filters.inner(window, &gated, t, first, dq.row_mut(t));
        multiply(dq.row_mut(t), dy(t));
        filters.inner_transposed(window, &d_mixed, t, first, dv.row_mut(t));
        product(dv.row(t), value.row(t), dk.row_mut(t));
        multiply(dv.row_mut(t), key.row(t));
    }
    let gradients = [dq, dk, dv];
    if let Some(dp) = dp {
        for (i, rows) in dp.chunks_exact_mut(3 * c).enumerate() {
            for part in 0..3 {
                let out = &mut rows[part * c + first..][..len];
                filters.short_transposed(window, part, |t| gradients[part].row(t), tokens.start + i, first, out);
            }
        }
    }
    let rows = gradient_rows(window) * c;
    if filters.short.is_some() {
        for part in 0..3 {
            let x = |t: usize| &p[(t * 3 + part) * c + first..][..len];
            let dw = &mut dw[part * rows..][..rows];
            strip_gradients(window, tokens, |t| gradients[part].row(t), x, dw, c, (first, len));
        }
    }
    if filters.inner.is_some() {
        let x = |t: usize| if gated.tokens.contains(&t) { gated.row(t) } else { &ZEROS[..len] };
        strip_gradients(window, tokens, |t| d_mixed.row(t), x, &mut dw[3 * rows..], c, (first, len));
    }
}

/// Adds a strip's gradients of taps and bias to `dw`, which holds [`gradient_rows`] rows of `stride` channels.
#[inline(always)]
pub(crate) fn strip_gradients<'a, 'b>(
    window: &Window,
    tokens: &Range<usize>,
    dy: impl Fn(usize) -> &'a [f32],
    x: impl Fn(usize) -> &'b [f32],
    dw: &mut [f32],
    stride: usize,
    (first, len): (usize, usize),
) {
    let [grid_rows, columns] = window.grid;
    let (dw, bias) = dw.split_at_mut(dw.len() - stride);
    let padded = window.size[1].next_multiple_of(GROUP) * stride;
    for (row, span) in window.rows(tokens) {
        for (i, dw) in dw.chunks_exact_mut(padded).enumerate() {
            let source = (row + i).wrapping_sub(window.lead[0]);
            if source >= grid_rows {
                continue;
            }
            let bias = (i == window.lead[0]).then_some(&mut *bias);
            let dy = |column: usize| dy(row * columns + column);
            let x = |column: usize| if column < columns { x(source * columns + column) } else { &ZEROS[..len] };
            filter_gradients(&span, window.lead[1], dy, x, dw, bias, stride, (first, len));
        }
    }
}
