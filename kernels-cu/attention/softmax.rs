//! From scores to the weights of a softmax and back, a row of one query at a time.
//!
//! The queries are multiplied by the factor of the scores beforehand, so that a weight is one subtraction and an
//! exponential.

use super::tiles::WIDTH;
use crate::simd::{exp_weight, ln, reduce};
use std::ops::RangeInclusive;

/// A score that does not count. Finite, so that a block of nothing else makes no NaN: what it adds is lost in rounding
/// as soon as a score that counts comes.
pub const HIDDEN: f32 = -1e30;

/// Factors of the scores at which those that are hidden stay far below the others.
pub const USUAL: RangeInclusive<f32> = 1e-6..=1e6;

/// What an operator does to the scores of a query, shown to it as (query, first key, scores of the keys from there on).
pub trait Scores {
    /// Before the softmax: adds a bias, or sets to [`HIDDEN`] what must not count.
    #[inline(always)]
    fn alter(&mut self, _query: usize, _first: usize, _scores: &mut [f32]) {}

    /// Is told of the gradients of the scores with their factor and bias.
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

/// Turns scores into exp(score − max), max over `before` and the row; returns the maximum and the sum. The weight of the
/// largest score is exactly 1.
#[inline(always)]
pub fn exponentials(row: &mut [f32], before: f32) -> (f32, f32) {
    let (row, _) = row.as_chunks_mut::<WIDTH>();
    let mut max = [before; WIDTH];
    for x in row.iter() {
        for lane in 0..WIDTH {
            max[lane] = if x[lane] > max[lane] { x[lane] } else { max[lane] };
        }
    }
    let max = maximum(max);
    let mut sum = [0.0f32; WIDTH];
    for x in row.iter_mut() {
        for lane in 0..WIDTH {
            x[lane] = exp_weight(x[lane] - max);
            sum[lane] += x[lane];
        }
    }
    (max, reduce(sum))
}

/// Log of a sum of exponentials from what [`exponentials`] returns.
#[inline(always)]
pub fn log_sum(max: f32, total: f32) -> f32 {
    max + ln(total)
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

/// From scores in `p` and dy·v in `ds`: p = exp(s − lse), ds = p·(ds − delta).
#[inline(always)]
pub fn score_gradients(p: &mut [f32], ds: &mut [f32], lse: f32, delta: f32) {
    let ((p, _), (ds, _)) = (p.as_chunks_mut::<WIDTH>(), ds.as_chunks_mut::<WIDTH>());
    for (p, ds) in p.iter_mut().zip(ds) {
        for lane in 0..WIDTH {
            p[lane] = exp_weight(p[lane] - lse);
            ds[lane] = p[lane] * (ds[lane] - delta);
        }
    }
}
