//! CPU path: channels over threads one way, lags the other.

use super::rate;
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
    a.y.par_chunks_mut(l).enumerate().with_min_len(GRAIN.div_ceil(l)).for_each(|(channel, y)| {
        let rate = rate(a.params, channel) as f32;
        vectorised(
            #[inline(always)]
            || {
                for (lag, y) in y.iter_mut().enumerate() {
                    *y = exp_decay(away(a.params, lag) * rate);
                }
                y.iter_mut().zip(a.x[channel..].iter().step_by(c)).for_each(|(y, x)| *y *= x);
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
