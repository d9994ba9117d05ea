//! From scores to the weights of a softmax and back, a row of one query at a time.

use super::tiles::WIDTH;
use crate::simd::{exp_weight, largest, ln, reduce};
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

    /// Is told of the gradients of the scores with their factor.
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

/// Turns the first `count` scores of a row of whole vectors into exp(scale·score − max), max over `before` and the
/// scores; returns the maximum and the sum. The weight of the largest score is exactly 1, what lies behind the scores
/// gets weights that are lost in rounding.
#[inline(always)]
pub fn exponentials(row: &mut [f32], count: usize, scale: f32, before: f32) -> (f32, f32) {
    let (row, _) = row.as_chunks_mut::<WIDTH>();
    let (whole, rest) = row.split_at_mut(count / WIDTH);
    let mut max = [before; WIDTH];
    for x in whole {
        for lane in 0..WIDTH {
            x[lane] *= scale;
            max[lane] = if x[lane] > max[lane] { x[lane] } else { max[lane] };
        }
    }
    let mut left = count % WIDTH;
    for x in rest {
        for lane in 0..WIDTH {
            x[lane] = if lane < left { x[lane] * scale } else { f32::NEG_INFINITY };
            max[lane] = if x[lane] > max[lane] { x[lane] } else { max[lane] };
        }
        left = 0;
    }
    let max = largest(max);
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

/// From scores in `p` and dy·v in `ds`, rows of whole vectors: p = exp(scale·s − lse), ds = p·(ds − delta).
#[inline(always)]
pub fn score_gradients(p: &mut [f32], ds: &mut [f32], scale: f32, lse: f32, delta: f32) {
    let ((p, _), (ds, _)) = (p.as_chunks_mut::<WIDTH>(), ds.as_chunks_mut::<WIDTH>());
    for (p, ds) in p.iter_mut().zip(ds) {
        for lane in 0..WIDTH {
            p[lane] = exp_weight(p[lane].mul_add(scale, -lse));
            ds[lane] = p[lane] * (ds[lane] - delta);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::vectorised;

    #[test]
    fn what_lies_behind_the_scores_weighs_nothing() {
        for count in [1, 15, 16, 17, 33, 48, 79, 80] {
            // Larger than every score, as what an earlier row left may be.
            let mut row = [9.0f32; 5 * WIDTH];
            (0..count).for_each(|i| row[i] = (i % 7) as f32 * 0.25);
            let largest = row[..count].iter().fold(f32::MIN, |most, x| x.max(most));
            let want: f64 = row[..count].iter().map(|x| f64::from(2.0 * (x - largest)).exp()).sum();
            let (max, sum) = vectorised(|| exponentials(&mut row, count, 2.0, f32::NEG_INFINITY));
            assert_eq!(max, 2.0 * largest, "{count}");
            assert!((f64::from(sum) - want).abs() < 1e-5 * want, "{count}: {sum} instead of {want}");
            assert!(row[count..].iter().all(|weight| *weight < 1e-30), "{count}: {row:?}");
        }
    }
}
