//! From scores to the weights of a softmax and back, a row of one query at a time.

use super::tiles::WIDTH;
use crate::simd::{exp_decay, reduce};
use std::ops::RangeInclusive;

/// A score that does not count. Finite, so that a block of nothing else makes no NaN: what it adds is lost in rounding
/// as soon as a score that counts comes.
pub const HIDDEN: f32 = -1e30;

/// Factors of the scores at which those that are hidden stay far below the others.
pub const USUAL: RangeInclusive<f32> = 1e-6..=1e6;

/// What an operator does to the scores of a query, shown to it as (query, first key, scores of the keys from there on).
pub trait Scores {
    /// Before the factor and the softmax: adds a bias, or sets to [`HIDDEN`] what must not count.
    #[inline(always)]
    fn alter(&mut self, _query: usize, _first: usize, _scores: &mut [f32]) {}

    /// Is told of the gradients of the scores, times the factor.
    #[inline(always)]
    fn gradients(&mut self, _query: usize, _first: usize, _gradients: &[f32]) {}
}

/// Every key counts.
pub struct All;

impl Scores for All {}

/// A function that hides keys.
impl<F: FnMut(usize, usize, &mut [f32])> Scores for F {
    #[inline(always)]
    fn alter(&mut self, query: usize, first: usize, scores: &mut [f32]) {
        self(query, first, scores);
    }
}

/// Turns scores into exp(scale·score − max), max over `before` and the row; returns the maximum and the sum.
#[inline(always)]
pub fn exponentials(row: &mut [f32], scale: f32, before: f32) -> (f32, f32) {
    let mut max = [before; WIDTH];
    for x in row.chunks_exact_mut(WIDTH) {
        for lane in 0..WIDTH {
            // What is hidden stays so whatever the scale; a NaN stays one.
            x[lane] = if x[lane] <= HIDDEN { x[lane] } else { x[lane] * scale };
            max[lane] = if x[lane] > max[lane] { x[lane] } else { max[lane] };
        }
    }
    let max = maximum(max);
    let mut sum = [0.0f32; WIDTH];
    for x in row.chunks_exact_mut(WIDTH) {
        for lane in 0..WIDTH {
            x[lane] = exp_decay(x[lane] - max);
            sum[lane] += x[lane];
        }
    }
    (max, reduce(sum))
}

/// Largest lane, pairwise.
#[inline(always)]
fn maximum(mut lanes: [f32; WIDTH]) -> f32 {
    let mut half = WIDTH / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = if lanes[i + half] > lanes[i] { lanes[i + half] } else { lanes[i] };
        }
        half /= 2;
    }
    lanes[0]
}

/// From scores in `p` and dy·v in `ds`: p = exp(scale·s − lse), ds = scale·p·(ds − delta).
#[inline(always)]
pub fn score_gradients(p: &mut [f32], ds: &mut [f32], scale: f32, lse: f32, delta: f32) {
    let ds = &mut ds[..p.len()];
    for i in 0..p.len() {
        p[i] = exp_decay(if p[i] <= HIDDEN { HIDDEN } else { p[i].mul_add(scale, -lse) });
        ds[i] = scale * p[i] * (ds[i] - delta);
    }
}
