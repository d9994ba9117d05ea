//! CPU path: sixteen blocks at a time in vector lanes, chunks over threads.

use crate::generated::philox::Forward;
use crate::rng::{Philox, box_muller};
use crate::simd::{LANES, vectorised};
use rayon::prelude::*;

/// Numbers of a chunk.
const CHUNK: usize = 1 << 12;
/// Numbers of a group, the four of each lane.
const GROUP: usize = 4 * LANES;

/// The numbers.
pub fn forward(a: Forward<'_, f32>) {
    for (row, z) in a.z.chunks_mut(a.dims.l.max(1)).enumerate() {
        let stream = Philox::new(a.params.seed.wrapping_add(row as u64), a.params.stream);
        z.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, z)| {
            let first = a.params.offset.wrapping_add((chunk * CHUNK) as u64);
            vectorised(
                #[inline(always)]
                || fill(&stream, first, z),
            );
        });
    }
}

/// Fills `z` with the numbers from index `first` of the stream on, which may lie inside a block.
#[inline(always)]
fn fill(stream: &Philox, first: u64, z: &mut [f32]) {
    let (mut index, mut rest) = (first, z);
    while !rest.is_empty() {
        let skip = (index % 4) as usize;
        let count = (GROUP - skip).min(rest.len());
        let (head, tail) = rest.split_at_mut(count);
        head.copy_from_slice(&group(stream, index / 4)[skip..skip + count]);
        (rest, index) = (tail, index.wrapping_add(count as u64));
    }
}

/// The numbers of [`LANES`] blocks from `first` on.
#[inline(always)]
fn group(stream: &Philox, first: u64) -> [f32; GROUP] {
    let mut words = [[0u32; LANES]; 4];
    for lane in 0..LANES {
        // The index of a number has 64 bits and wraps; that of a block has 62.
        let block = stream.block((first + lane as u64) & (u64::MAX >> 2));
        for k in 0..4 {
            words[k][lane] = block[k];
        }
    }
    let mut z = [0.0; GROUP];
    for lane in 0..LANES {
        for pair in 0..2 {
            let [x, y] = box_muller(words[2 * pair][lane], words[2 * pair + 1][lane]);
            z[4 * lane + 2 * pair] = x;
            z[4 * lane + 2 * pair + 1] = y;
        }
    }
    z
}
