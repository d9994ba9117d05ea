//! Strips of a grid with windows of three by three: the steps of `strips`, each over all tokens of the block by one of the
//! walks of `square`.

use super::square::{self, Convolve, Correlate, Rows, Write};
use super::strips::{Filters, Strip, gradient_rows, multiply, product};
use super::taps::{Filter, GROUP};
use super::window::Window;
use crate::simd::vectorised;
use std::ops::Range;

/// The filter of a call with what it walks over, but for tokens, input and result.
fn walk<'a>(
    filter: &'a Filter<'_>,
    window: &Window,
    [first, len]: [usize; 2],
    tokens: &Range<usize>,
    x: Rows<&'a [f32]>,
    out: Rows<&'a mut [f32]>,
) -> Convolve<'a> {
    Convolve {
        grid: window.grid,
        tokens: tokens.clone(),
        len,
        taps: std::array::from_fn(|j| filter.tap(j, first, len)),
        bias: Some(filter.bias(first, len)),
        turned: false,
        x,
        out,
        write: Write::Set,
    }
}

/// Rows `tokens` of q, k or v into `out`, or times what is there, for `len` channels from `first` on.
fn short_rows(
    filters: &Filters<'_>,
    window: &Window,
    (part, p): (usize, &[f32]),
    tokens: &Range<usize>,
    channels @ [first, len]: [usize; 2],
    out: Rows<&mut [f32]>,
    write: Write,
) {
    let step = 3 * filters.channels;
    let x = Rows { data: p, origin: 0, step, offset: part * filters.channels + first };
    if let Some(filters) = &filters.short {
        return square::run(Convolve { write, ..walk(&filters[part], window, channels, tokens, x, out) });
    }
    let rows = out.data.chunks_mut(out.step).skip(tokens.start - out.origin);
    rows.zip(p[tokens.start * step..tokens.end * step].chunks_exact(step)).for_each(|(row, p)| {
        let (row, p) = (&mut row[out.offset..][..len], &p[x.offset..][..len]);
        if write == Write::Times { multiply(row, p) } else { row.copy_from_slice(p) }
    });
}

/// Forward pass of a strip.
pub fn forward_square(
    filters: &Filters<'_>,
    window: &Window,
    p: &[f32],
    tokens: &Range<usize>,
    first: usize,
    mut gated: Strip<'_>,
    y: &mut [f32],
) {
    let (c, channels, inside) = (filters.channels, [first, gated.len], gated.tokens.clone());
    short_rows(filters, window, (1, p), &inside, channels, gated.rows_mut(), Write::Set);
    short_rows(filters, window, (2, p), &inside, channels, gated.rows_mut(), Write::Times);
    let y = Rows { data: y, origin: tokens.start, step: c, offset: first };
    short_rows(filters, window, (0, p), tokens, channels, Rows { data: &mut *y.data, ..y }, Write::Set);
    match &filters.inner {
        Some(filter) => {
            let walk = walk(filter, window, channels, tokens, gated.rows(), y);
            square::run(Convolve { write: Write::Times, ..walk });
        }
        None => {
            for (row, gated) in y.data.chunks_exact_mut(c).zip(gated.data.chunks_exact(gated.len)) {
                multiply(&mut row[first..][..gated.len()], gated);
            }
        }
    }
}

/// Backward pass of a strip.
pub fn backward_square(
    filters: &Filters<'_>,
    window: &Window,
    p: &[f32],
    dy: &[f32],
    tokens: &Range<usize>,
    first: usize,
    [mut key, mut value, gated, mut d_mixed, mut dq, mut dk, mut dv]: [Strip<'_>; 7],
    mut dp: Option<&mut [f32]>,
    dw: &mut [f32],
) {
    let (c, len) = (filters.channels, key.len);
    let (channels, sources, gates, outer) =
        ([first, len], key.tokens.clone(), d_mixed.tokens.clone(), dq.tokens.clone());
    let dy = |t: usize| &dy[t * c + first..][..len];
    short_rows(filters, window, (1, p), &sources, channels, key.rows_mut(), Write::Set);
    short_rows(filters, window, (2, p), &sources, channels, value.rows_mut(), Write::Set);
    short_rows(filters, window, (0, p), &gates, channels, d_mixed.rows_mut(), Write::Set);
    vectorised(
        #[inline(always)]
        || {
            product(key.data, value.data, gated.data);
            gates.clone().for_each(|t| multiply(d_mixed.row_mut(t), dy(t)));
        },
    );
    match &filters.inner {
        Some(filter) => {
            square::run(walk(filter, window, channels, &outer, gated.rows(), dq.rows_mut()));
            let gradient = walk(filter, window, channels, &outer, d_mixed.rows(), dv.rows_mut());
            square::run(Convolve { bias: None, turned: true, ..gradient });
        }
        None => {
            dq.data.copy_from_slice(gated.data);
            dv.data.copy_from_slice(d_mixed.data);
        }
    }
    vectorised(
        #[inline(always)]
        || {
            for t in outer.clone() {
                multiply(dq.row_mut(t), dy(t));
                product(dv.row(t), value.row(t), dk.row_mut(t));
                multiply(dv.row_mut(t), key.row(t));
            }
        },
    );
    let gradients = [dq, dk, dv];
    let rows = gradient_rows(window) * c;
    for (part, gradient) in gradients.iter().enumerate() {
        let offset = part * c + first;
        if let Some(filters) = &filters.short {
            let x = Rows { data: p, origin: 0, step: 3 * c, offset };
            add_gradients(window, tokens, channels, gradient.rows(), x, &mut dw[part * rows..][..rows], c);
            let Some(dp) = dp.as_deref_mut() else { continue };
            let out = Rows { data: dp, origin: tokens.start, step: 3 * c, offset };
            let gradient = walk(&filters[part], window, channels, tokens, gradient.rows(), out);
            square::run(Convolve { bias: None, turned: true, ..gradient });
        } else if let Some(dp) = dp.as_deref_mut() {
            for (row, t) in dp.chunks_exact_mut(3 * c).zip(tokens.clone()) {
                row[offset..][..len].copy_from_slice(gradient.row(t));
            }
        }
    }
    if filters.inner.is_some() {
        add_gradients(window, tokens, channels, d_mixed.rows(), gated.rows(), &mut dw[3 * rows..], c);
    }
}

/// Adds a strip's gradients of taps and bias to `dw` as `strip_gradients` does.
fn add_gradients(
    window: &Window,
    tokens: &Range<usize>,
    [first, len]: [usize; 2],
    dy: Rows<&[f32]>,
    x: Rows<&[f32]>,
    dw: &mut [f32],
    stride: usize,
) {
    // The fourth column of every row of taps is padding.
    let mut rows = dw.chunks_exact_mut(stride).enumerate().filter(|(i, _)| i % GROUP != GROUP - 1);
    let sums = std::array::from_fn(|_| rows.next().map_or(&mut [][..], |(_, row)| &mut row[first..][..len]));
    square::run(Correlate { grid: window.grid, tokens: tokens.clone(), len, dy, x, sums });
}
