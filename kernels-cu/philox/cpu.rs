//! CPU path: sixteen blocks at a time in vector lanes, chunks over threads.

use super::{uniform, words};
use crate::generated::philox::{Forward, Params};
use crate::simd::{LANES, cos_sin_turn, ln, vectorised};
use rayon::prelude::*;

/// Numbers of a chunk.
const CHUNK: usize = 1 << 12;
/// Numbers of a group, the four of each lane.
const GROUP: usize = 4 * LANES;

/// The numbers.
pub fn forward(a: Forward<'_, f32>) {
    let params = a.params;
    a.z.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, z)| {
        let first = params.offset.wrapping_add((chunk * CHUNK) as u64);
        vectorised(
            #[inline(always)]
            || fill(params, first, z),
        );
    });
}

/// Fills `z` with the numbers from index `first` of the sequence on, which may lie inside a block.
#[inline(always)]
fn fill(params: Params, first: u64, z: &mut [f32]) {
    let (mut index, mut rest) = (first, z);
    while !rest.is_empty() {
        let skip = (index % 4) as usize;
        let count = (GROUP - skip).min(rest.len());
        let (head, tail) = rest.split_at_mut(count);
        head.copy_from_slice(&group(params, index / 4)[skip..skip + count]);
        (rest, index) = (tail, index.wrapping_add(count as u64));
    }
}

/// The numbers of [`LANES`] blocks from `first` on.
#[inline(always)]
fn group(params: Params, first: u64) -> [f32; GROUP] {
    let mut w = [[0u32; LANES]; 4];
    for lane in 0..LANES {
        // The index of a number has 64 bits and wraps; that of a block has 62.
        let block = (first + lane as u64) & (u64::MAX >> 2);
        let words = words(params, block);
        for k in 0..4 {
            w[k][lane] = words[k];
        }
    }
    let mut z = [0.0; GROUP];
    for lane in 0..LANES {
        for pair in 0..2 {
            let radius = (-2.0 * ln(uniform(w[2 * pair][lane]))).sqrt();
            let (cos, sin) = cos_sin_turn(uniform(w[2 * pair + 1][lane]));
            z[4 * lane + 2 * pair] = radius * cos;
            z[4 * lane + 2 * pair + 1] = radius * sin;
        }
    }
    z
}
