//! CPU path: squares of 16 by 16 are turned in registers. Forward they decay on the way, channels over threads; backward
//! whole lags decay once they are complete, lags over threads.

use super::rate;
use crate::attention::tiles::{WIDTH, copy};
use crate::attention::turn::{Square, turn};
use crate::generated::filter_window::{Backward, Dims, Forward, Params};
use crate::simd::{exp_decay, vectorised};
use rayon::prelude::*;

/// Squares along the lags that one thread takes at a time backward, so that it reads a few cache lines of a channel.
const SQUARES: usize = 4;

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

/// Backward pass. The decay of a distance is that of its multiple of [`WIDTH`] times that of the rest: few exponentials.
pub fn backward(a: Backward<'_, f32>) {
    let (Dims { l, c }, Some(dx)) = (a.dims, a.dx) else { return };
    let rates: Vec<f32> = (0..c).map(|channel| rate(a.params, channel) as f32).collect();
    let most = a.params.centre.max(l.saturating_sub(a.params.centre));
    // Of the distances below WIDTH, then of its multiples.
    let mut decays = vec![0.0f32; (WIDTH + most / WIDTH + 1) * c];
    decays.par_chunks_mut(c).enumerate().for_each(|(index, decays)| {
        let distance = if index < WIDTH { index } else { (index - WIDTH) * WIDTH };
        vectorised(
            #[inline(always)]
            || {
                // Bound in here: what is captured would be read again for every element.
                let away = -(distance as f32);
                for (decay, rate) in decays.iter_mut().zip(&rates) {
                    *decay = exp_decay(away * rate);
                }
            },
        );
    });
    dx.par_chunks_mut(SQUARES * WIDTH * c).enumerate().for_each(|(block, dx)| {
        let start = block * SQUARES * WIDTH;
        vectorised(
            #[inline(always)]
            || {
                let mut square: Square = [[0.0; WIDTH]; WIDTH];
                for first in (0..c).step_by(WIDTH) {
                    let count = WIDTH.min(c - first);
                    for (lag, dx) in (start..).step_by(WIDTH).zip(dx.chunks_mut(WIDTH * c)) {
                        let live = WIDTH.min(l - lag);
                        for (i, row) in square.iter_mut().enumerate().take(count) {
                            let from = &a.dy[(first + i) * l + lag..];
                            match from.first_chunk::<WIDTH>() {
                                Some(from) if live == WIDTH => *row = *from,
                                _ => copy(&from[..live], row),
                            }
                        }
                        turn(&mut square);
                        for (row, dx) in square.iter().zip(dx.chunks_exact_mut(c)) {
                            match dx[first..].first_chunk_mut::<WIDTH>() {
                                Some(dx) => *dx = *row,
                                None => dx[first..].copy_from_slice(&row[..count]),
                            }
                        }
                    }
                }
                for (i, dx) in dx.chunks_exact_mut(c).enumerate() {
                    let distance = (start + i).abs_diff(a.params.centre);
                    let near = &decays[distance % WIDTH * c..][..c];
                    let far = &decays[(WIDTH + distance / WIDTH) * c..][..c];
                    dx.iter_mut().zip(near).zip(far).for_each(|((dx, near), far)| *dx *= near * far);
                }
            },
        );
    });
}
