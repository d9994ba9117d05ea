//! CPU path: blocks of tokens over threads, channels in strips that keep filters and windows in the first-level cache.
//!
//! A block recomputes the few rows around it that its convolutions reach, so blocks share nothing but the sums of the
//! filter gradients, which are added in the order of the blocks.

use super::taps::{CHANNELS, Filter, GROUP, ZEROS, filter_gradients};
use crate::generated::gated_conv::{Backward, Dims, Forward};
use crate::simd::vectorised;
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Tokens of a block: the whole of a small sequence, else enough to make the recomputed margin small.
fn block_len(Dims { n, k, .. }: Dims) -> usize {
    n.min(64.max(4 * k))
}

/// The blocks of all samples, in order: (sample, tokens).
fn blocks(dims: Dims) -> Vec<(usize, Range<usize>)> {
    let Dims { b, n, .. } = dims;
    let block = block_len(dims);
    (0..b).flat_map(|sample| (0..n).step_by(block).map(move |t| (sample, t..(t + block).min(n)))).collect()
}

/// The blocks of a tensor `[B, N, width]`, in the order of [`blocks`].
fn split(dims: Dims, width: usize, x: &mut [f32]) -> Vec<&mut [f32]> {
    x.chunks_mut(dims.n * width).flat_map(|sample| sample.chunks_mut(block_len(dims) * width)).collect()
}

/// Rows of some channels of consecutive tokens.
struct Strip<'a> {
    data: &'a mut [f32],
    tokens: Range<usize>,
    len: usize,
}

impl Strip<'_> {
    #[inline(always)]
    fn row(&self, token: usize) -> &[f32] {
        &self.data[(token - self.tokens.start) * self.len..][..self.len]
    }

    #[inline(always)]
    fn row_mut(&mut self, token: usize) -> &mut [f32] {
        &mut self.data[(token - self.tokens.start) * self.len..][..self.len]
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

/// The filters of one call.
struct Filters<'w> {
    dims: Dims,
    lead: usize,
    short: Option<[Filter<'w>; 3]>,
    inner: Option<Filter<'w>>,
}

impl<'w> Filters<'w> {
    fn new(dims: Dims, lead: usize, short: [Option<&'w [f32]>; 2], inner: [Option<&'w [f32]>; 2]) -> Self {
        let Dims { c, k, .. } = dims;
        let filter =
            |w: &'w [f32], bias: &'w [f32], i: usize| Filter::new(&w[i * c * k..][..c * k], &bias[i * c..][..c], k);
        let short = short[0].zip(short[1]).map(|(w, bias)| [0, 1, 2].map(|part| filter(w, bias, part)));
        Filters { dims, lead, short, inner: inner[0].zip(inner[1]).map(|(w, bias)| filter(w, bias, 0)) }
    }

    /// Padded taps.
    fn taps(&self) -> usize {
        self.dims.k.next_multiple_of(GROUP)
    }

    /// Tokens that the convolution of `tokens` reads.
    fn sources(&self, tokens: &Range<usize>) -> Range<usize> {
        tokens.start.saturating_sub(self.lead)..(tokens.end + self.dims.k - 1 - self.lead).min(self.dims.n)
    }

    /// Tokens whose convolution reads `tokens`.
    fn readers(&self, tokens: &Range<usize>) -> Range<usize> {
        tokens.start.saturating_sub(self.dims.k - 1 - self.lead)..(tokens.end + self.lead).min(self.dims.n)
    }

    /// The row that tap `j` of token `t` reads.
    #[inline(always)]
    fn source<'a>(&self, t: usize, j: usize, row: impl Fn(usize) -> &'a [f32]) -> &'a [f32] {
        let token = (t + j).wrapping_sub(self.lead);
        if j < self.dims.k && token < self.dims.n { row(token) } else { &ZEROS }
    }

    /// The row that reads token `t` by tap `j`.
    #[inline(always)]
    fn reader<'a>(&self, t: usize, j: usize, row: impl Fn(usize) -> &'a [f32]) -> &'a [f32] {
        let token = (t + self.lead).wrapping_sub(j);
        if j < self.dims.k && token < self.dims.n { row(token) } else { &ZEROS }
    }

    /// Row `t` of q, k or v, for the channels of `out` from `first` on; `p` is the sample's `[N, 3, C]`.
    #[inline(always)]
    fn short(&self, part: usize, p: &[f32], t: usize, first: usize, out: &mut [f32]) {
        let len = out.len();
        let row = |t: usize| &p[(t * 3 + part) * self.dims.c + first..][..len];
        match &self.short {
            Some(filters) => filters[part].apply(first, |j| self.source(t, j, row), out),
            None => out.copy_from_slice(row(t)),
        }
    }

    /// Row `t` of the inner convolution of `gated`.
    #[inline(always)]
    fn inner(&self, gated: &Strip<'_>, t: usize, first: usize, out: &mut [f32]) {
        match &self.inner {
            Some(filter) => filter.apply(first, |j| self.source(t, j, |t| gated.row(t)), out),
            None => out.copy_from_slice(gated.row(t)),
        }
    }

    /// Gradient of row `t` of `gated` from that of the inner convolution.
    #[inline(always)]
    fn inner_transposed(&self, d: &Strip<'_>, t: usize, first: usize, out: &mut [f32]) {
        match &self.inner {
            Some(filter) => filter.apply_transposed(first, |j| self.reader(t, j, |t| d.row(t)), out),
            None => out.copy_from_slice(d.row(t)),
        }
    }

    /// Gradient of row `t` of `p` from that of q, k or v.
    #[inline(always)]
    fn short_transposed(&self, part: usize, d: &Strip<'_>, t: usize, first: usize, out: &mut [f32]) {
        match &self.short {
            Some(filters) => filters[part].apply_transposed(first, |j| self.reader(t, j, |t| d.row(t)), out),
            None => out.copy_from_slice(d.row(t)),
        }
    }
}

#[inline(always)]
fn multiply(x: &mut [f32], by: &[f32]) {
    let by = &by[..x.len()];
    for i in 0..x.len() {
        x[i] *= by[i];
    }
}

#[inline(always)]
fn product(x: &[f32], y: &[f32], out: &mut [f32]) {
    let (x, y) = (&x[..out.len()], &y[..out.len()]);
    for i in 0..out.len() {
        out[i] = x[i] * y[i];
    }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let dims @ Dims { n, c, .. } = a.dims;
    let filters = Filters::new(dims, a.params.lead, [a.short_weight, a.short_bias], [a.inner_weight, a.inner_bias]);
    let block = block_len(dims);
    a.y.par_chunks_mut(n * c).enumerate().for_each(|(sample, y)| {
        let p = &a.p[sample * n * 3 * c..][..n * 3 * c];
        y.par_chunks_mut(block * c).enumerate().for_each(|(index, y)| {
            let tokens = index * block..n.min((index + 1) * block);
            for first in (0..c).step_by(CHANNELS) {
                let len = CHANNELS.min(c - first);
                let gated = if filters.inner.is_some() { filters.sources(&tokens) } else { tokens.clone() };
                with_strips([&gated, &(0..1)], len, |strips| {
                    vectorised(
                        #[inline(always)]
                        || forward_strip(&filters, p, &tokens, first, strips, y),
                    );
                });
            }
        });
    });
}

#[inline(always)]
fn forward_strip(
    filters: &Filters<'_>,
    p: &[f32],
    tokens: &Range<usize>,
    first: usize,
    [mut gated, mut extra]: [Strip<'_>; 2],
    y: &mut [f32],
) {
    let (c, len) = (filters.dims.c, gated.len);
    for t in gated.tokens.clone() {
        filters.short(1, p, t, first, gated.row_mut(t));
        filters.short(2, p, t, first, extra.row_mut(0));
        multiply(gated.row_mut(t), extra.row(0));
    }
    for t in tokens.clone() {
        let y = &mut y[(t - tokens.start) * c + first..][..len];
        filters.short(0, p, t, first, y);
        filters.inner(&gated, t, first, extra.row_mut(0));
        multiply(y, extra.row(0));
    }
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let dims @ Dims { n, c, k, .. } = a.dims;
    let filters = Filters::new(dims, a.params.lead, [a.short_weight, a.short_bias], [a.inner_weight, a.inner_bias]);
    let blocks = blocks(dims);
    let dp = a.dp.map_or_else(
        || blocks.iter().map(|_| None).collect(),
        |dp| split(dims, 3 * c, dp).into_iter().map(Some).collect::<Vec<_>>(),
    );
    // Per block: taps and bias of the three short filters and of the inner one, rows of C.
    let rows = filters.taps() + 1;
    let mut partial = vec![0.0f32; blocks.len() * 4 * rows * c];
    blocks.into_par_iter().zip(dp).zip(partial.par_chunks_mut(4 * rows * c)).for_each(
        |(((sample, tokens), mut dp), dw)| {
            let p = &a.p[sample * n * 3 * c..][..n * 3 * c];
            let dy = &a.dy[sample * n * c..][..n * c];
            for first in (0..c).step_by(CHANNELS) {
                let len = CHANNELS.min(c - first);
                // Gradients of q, k, v are wanted where a short filter reaches this block, those of the inner
                // filter's output where that reaches them, and k·v where the inner filter reads.
                let outer = if filters.short.is_some() { filters.readers(&tokens) } else { tokens.clone() };
                let (gates, sources) = match filters.inner {
                    Some(_) => (filters.readers(&outer), filters.sources(&outer)),
                    None => (outer.clone(), outer.clone()),
                };
                with_strips([&sources, &sources, &sources, &gates, &outer, &outer, &outer], len, |strips| {
                    vectorised(
                        #[inline(always)]
                        || backward_strip(&filters, p, dy, &tokens, first, strips, dp.as_deref_mut(), dw),
                    );
                });
            }
        },
    );
    let (total, rest) = partial.split_at_mut(4 * rows * c);
    for block in rest.chunks_exact(total.len()) {
        total.iter_mut().zip(block).for_each(|(sum, x)| *sum += x);
    }
    let filter = |i: usize| &total[i * rows * c..][..rows * c];
    let weight = |i: usize, channel: usize, j: usize| filter(i)[j * c + channel];
    let bias = |i: usize| &filter(i)[(rows - 1) * c..];
    for (out, first) in [(a.dshort_weight, 0), (a.dinner_weight, 3)] {
        for (i, out) in out.into_iter().flat_map(|out| out.chunks_exact_mut(k)).enumerate() {
            (0..k).for_each(|j| out[j] = weight(first + i / c, i % c, j));
        }
    }
    for (out, first) in [(a.dshort_bias, 0), (a.dinner_bias, 3)] {
        for (i, out) in out.into_iter().flat_map(|out| out.chunks_exact_mut(c)).enumerate() {
            out.copy_from_slice(bias(first + i));
        }
    }
}

#[inline(always)]
fn backward_strip(
    filters: &Filters<'_>,
    p: &[f32],
    dy: &[f32],
    tokens: &Range<usize>,
    first: usize,
    [mut key, mut value, mut gated, mut d_mixed, mut dq, mut dk, mut dv]: [Strip<'_>; 7],
    dp: Option<&mut [f32]>,
    dw: &mut [f32],
) {
    let (Dims { n, c, .. }, len) = (filters.dims, key.len);
    let dy = |t: usize| &dy[t * c + first..][..len];
    for t in key.tokens.clone() {
        filters.short(1, p, t, first, key.row_mut(t));
        filters.short(2, p, t, first, value.row_mut(t));
        product(key.row(t), value.row(t), gated.row_mut(t));
    }
    for t in d_mixed.tokens.clone() {
        filters.short(0, p, t, first, d_mixed.row_mut(t));
        multiply(d_mixed.row_mut(t), dy(t));
    }
    for t in dq.tokens.clone() {
        filters.inner(&gated, t, first, dq.row_mut(t));
        multiply(dq.row_mut(t), dy(t));
        filters.inner_transposed(&d_mixed, t, first, dv.row_mut(t));
        product(dv.row(t), value.row(t), dk.row_mut(t));
        multiply(dv.row_mut(t), key.row(t));
    }
    let gradients = [dq, dk, dv];
    if let Some(dp) = dp {
        for (i, rows) in dp.chunks_exact_mut(3 * c).enumerate() {
            for part in 0..3 {
                let out = &mut rows[part * c + first..][..len];
                filters.short_transposed(part, &gradients[part], tokens.start + i, first, out);
            }
        }
    }
    let (taps, rows) = (filters.taps(), (filters.taps() + 1) * c);
    if filters.short.is_some() {
        for part in 0..3 {
            let x = |t: usize| if t < n { &p[(t * 3 + part) * c + first..][..len] } else { &ZEROS[..len] };
            let dw = &mut dw[part * rows..][..rows];
            filter_gradients(tokens, filters.lead, taps, |t| gradients[part].row(t), x, dw, first, len);
        }
    }
    if filters.inner.is_some() {
        let x = |t: usize| if gated.tokens.contains(&t) { gated.row(t) } else { &ZEROS[..len] };
        filter_gradients(tokens, filters.lead, taps, |t| d_mixed.row(t), x, &mut dw[3 * rows..], first, len);
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::Tier;
    use crate::check::{Fill, Tolerance, compare, draw_f32};
    use crate::generated::gated_conv::{CASES, INFO};

    #[test]
    fn agrees_with_the_oracle() {
        let tolerance = INFO.tolerance.unwrap_or(Tolerance::F32);
        for case in CASES.iter().filter(|case| case.tier == Tier::Tiny) {
            let (dims @ Dims { b, n, c, k }, params) = (case.dims, case.params);
            let draw = |name: &str, len: usize| draw_f32(case.name, name, len, Fill::Normal);
            let uniform = |name: &str, len: usize| draw_f32(case.name, name, len, Fill::Uniform(-0.3, 0.3));
            let optional = |name: &str, len: usize| (!case.absent.contains(&name)).then(|| uniform(name, len));
            let (p, dy) = (draw("p", b * n * 3 * c), draw("dy", b * n * c));
            let (short, short_bias) = (optional("short_weight", 3 * c * k), optional("short_bias", 3 * c));
            let (inner, inner_bias) = (optional("inner_weight", c * k), optional("inner_bias", c));
            let run = |forward: fn(Forward<'_, f32>), backward: fn(Backward<'_, f32>)| {
                let mut y = vec![f32::NAN; b * n * c];
                let nan = |like: &Option<Vec<f32>>| like.as_ref().map(|x| vec![f32::NAN; x.len()]);
                let mut dp = vec![f32::NAN; p.len()];
                let [mut ds, mut dsb, mut di, mut dib] = [&short, &short_bias, &inner, &inner_bias].map(nan);
                let (short_weight, short_bias) = (short.as_deref(), short_bias.as_deref());
                let (inner_weight, inner_bias) = (inner.as_deref(), inner_bias.as_deref());
                forward(Forward { dims, params, p: &p, short_weight, short_bias, inner_weight, inner_bias, y: &mut y });
                backward(Backward {
                    dims,
                    params,
                    dy: &dy,
                    p: &p,
                    short_weight,
                    short_bias,
                    inner_weight,
                    inner_bias,
                    dp: Some(&mut dp),
                    dshort_weight: ds.as_deref_mut(),
                    dshort_bias: dsb.as_deref_mut(),
                    dinner_weight: di.as_deref_mut(),
                    dinner_bias: dib.as_deref_mut(),
                });
                [
                    ("y", Some(y)),
                    ("dp", Some(dp)),
                    ("dshort", ds),
                    ("dshort_bias", dsb),
                    ("dinner", di),
                    ("dinner_bias", dib),
                ]
            };
            let (got, want) = (run(forward, backward), run(reference::forward, reference::backward));
            for ((name, got), (_, want)) in got.iter().zip(&want) {
                let (Some(got), Some(want)) = (got, want) else { continue };
                let result = compare(got, want, tolerance);
                assert!(result.pass, "{} {name}: {result:?}", case.name);
            }
        }
    }
}
