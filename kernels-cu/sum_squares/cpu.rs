//! CPU path: fixed blocks over threads, f64 lanes inside a block, block sums added in their order.

use crate::generated::sum_squares::Forward;
use crate::simd::{LANES, vectorised};
use rayon::prelude::*;

/// Elements of a block: the same on every machine, so that the sum is.
const BLOCK: usize = 1 << 16;

/// The sum.
pub fn forward(a: Forward<'_, f32>) {
    let block = |x: &[f32]| {
        vectorised(
            #[inline(always)]
            || block_sum(x),
        )
    };
    // Few enough blocks to collect; a parallel sum would add them in an order that depends on the threads.
    let blocks: Vec<f64> = a.x.par_chunks(BLOCK).map(block).collect();
    a.out[0] = blocks.iter().sum::<f64>() as f32;
}

#[inline(always)]
fn block_sum(x: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let whole = x.chunks_exact(LANES);
    let rest: f64 = whole.remainder().iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    for x in whole {
        for lane in 0..LANES {
            lanes[lane] += f64::from(x[lane]) * f64::from(x[lane]);
        }
    }
    lanes.iter().sum::<f64>() + rest
}
