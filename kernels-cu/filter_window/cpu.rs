//! CPU path: squares of 16 by 16 are turned in registers and decay on the way; rows of the result over threads.

use super::rate;
use crate::attention::tiles::{WIDTH, copy};
use crate::attention::turn::{Square, turn};
use crate::generated::filter_window::{Backward, Dims, Forward, Params};
use crate::simd::{exp_decay, vectorised};
use rayon::prelude::*;
use std::cell::Cell;

thread_local! {
    /// Decay of every channel and distance of every lag, kept from call to call.
    static FACTORS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Calls `body` with the decay of every channel and minus the distance of every lag from the centre, each with zeros
/// up to whole vectors: their product is the exponent.
fn with_factors(Dims { l, c }: Dims, params: Params, body: impl FnOnce(&[f32], &[f32])) {
    let mut factors = FACTORS.take();
    factors.clear();
    factors.extend((0..c).map(|channel| rate(params, channel) as f32));
    factors.resize(c.next_multiple_of(WIDTH), 0.0);
    let lags = factors.len();
    factors.extend((0..l).map(|lag| -(lag.abs_diff(params.centre) as f32)));
    factors.resize(lags + l.next_multiple_of(WIDTH), 0.0);
    let (rates, away) = factors.split_at(lags);
    body(rates, away);
    FACTORS.set(factors);
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    with_factors(a.dims, a.params, |rates, away| turned(a.x, a.dims.l, rates, away, a.y));
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let Some(dx) = a.dx else { return };
    with_factors(a.dims, a.params, |rates, away| turned(a.dy, a.dims.c, away, rates, dx));
}

/// `out[i, j] = from[j, i] · exp(by_row[i] · by_column[j])` for rows of `width` values.
fn turned(from: &[f32], width: usize, by_row: &[f32], by_column: &[f32], out: &mut [f32]) {
    let rows = out.len() / width;
    let (by_column, _) = by_column.as_chunks::<WIDTH>();
    out.par_chunks_mut(WIDTH * width).zip(by_row.par_chunks(WIDTH)).enumerate().for_each(|(block, (out, by_row))| {
        let first = block * WIDTH;
        let count = WIDTH.min(rows - first);
        vectorised(
            #[inline(always)]
            || {
                let mut square: Square = [[0.0; WIDTH]; WIDTH];
                for (column, factors) in (0..width).step_by(WIDTH).zip(by_column) {
                    let live = WIDTH.min(width - column);
                    for (i, row) in square.iter_mut().enumerate().take(live) {
                        copy(&from[(column + i) * rows + first..][..count], row);
                    }
                    turn(&mut square);
                    for ((values, out), rate) in square.iter_mut().zip(out.chunks_exact_mut(width)).zip(by_row) {
                        for lane in 0..WIDTH {
                            values[lane] *= exp_decay(rate * factors[lane]);
                        }
                        match out[column..].first_chunk_mut::<WIDTH>() {
                            Some(out) => *out = *values,
                            None => out[column..].copy_from_slice(&values[..live]),
                        }
                    }
                }
            },
        );
    });
}
