//! CPU path: forward, squares of 16 by 16 are turned in registers and decay on the way, channels over threads; backward a
//! lag at a time, lags over threads.

use super::rate;
use crate::attention::tiles::{WIDTH, copy};
use crate::attention::turn::{Square, turn};
use crate::generated::filter_window::{Backward, Dims, Forward, Params};
use crate::simd::{exp_decay, vectorised};
use rayon::prelude::*;

/// Elements that one thread takes at a time at the least.
const GRAIN: usize = 1 << 12;

/// The exponent of a lag: how far it is from the centre, negative.
#[inline(always)]
fn away(params: Params, lag: usize) -> f32 {
    -(lag.abs_diff(params.centre) as f32)
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { l, c } = a.dims;
    let (x, params) = (a.x, a.params);
    a.y.par_chunks_mut(WIDTH * l).enumerate().for_each(|(block, y)| {
        let first = block * WIDTH;
        let count = WIDTH.min(c - first);
        vectorised(
            #[inline(always)]
            || {
                let rates: [f32; WIDTH] = std::array::from_fn(|i| rate(params, first + i) as f32);
                let mut square: Square = [[0.0; WIDTH]; WIDTH];
                for lag in (0..l).step_by(WIDTH) {
                    let live = WIDTH.min(l - lag);
                    for (i, row) in square.iter_mut().enumerate().take(live) {
                        let from = &x[(lag + i) * c + first..];
                        match from.first_chunk::<WIDTH>() {
                            Some(from) if count == WIDTH => *row = *from,
                            _ => copy(&from[..count], row),
                        }
                    }
                    turn(&mut square);
                    let away: [f32; WIDTH] = std::array::from_fn(|i| away(params, lag + i));
                    for ((values, y), rate) in square.iter_mut().zip(y.chunks_exact_mut(l)).zip(rates) {
                        for lane in 0..WIDTH {
                            values[lane] *= exp_decay(away[lane] * rate);
                        }
                        match y[lag..].first_chunk_mut::<WIDTH>() {
                            Some(y) => *y = *values,
                            None => y[lag..].copy_from_slice(&values[..live]),
                        }
                    }
                }
            },
        );
    });
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let (Dims { l, c }, Some(dx)) = (a.dims, a.dx) else { return };
    let rates: Vec<f32> = (0..c).map(|channel| rate(a.params, channel) as f32).collect();
    dx.par_chunks_mut(c).enumerate().with_min_len(GRAIN.div_ceil(c)).for_each(|(lag, dx)| {
        let away = away(a.params, lag);
        vectorised(
            #[inline(always)]
            || {
                dx.iter_mut().zip(&rates).for_each(|(dx, rate)| *dx = exp_decay(away * rate));
                dx.iter_mut().zip(a.dy[lag..].iter().step_by(l)).for_each(|(dx, dy)| *dx *= dy);
            },
        );
    });
}
