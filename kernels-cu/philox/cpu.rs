//! CPU path: blocks of four numbers over threads.

use super::{uniform, words};
use crate::generated::philox::{Forward, Params};
use rayon::prelude::*;
use std::f32::consts::TAU;

/// Numbers of a chunk.
const CHUNK: usize = 1 << 12;

/// The numbers.
pub fn forward(a: Forward<'_, f32>) {
    let params = a.params;
    a.z.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, z)| fill(params, (chunk * CHUNK) as u64, z));
}

/// Fills `z` with the numbers from `start` of the call on; the first block may begin in its middle.
fn fill(params: Params, start: u64, z: &mut [f32]) {
    let mut index = params.offset.wrapping_add(start);
    let mut rest = z;
    while !rest.is_empty() {
        let skip = (index % 4) as usize;
        let count = (4 - skip).min(rest.len());
        let (head, tail) = rest.split_at_mut(count);
        head.copy_from_slice(&normals(params, index / 4)[skip..skip + count]);
        (rest, index) = (tail, index.wrapping_add(count as u64));
    }
}

#[inline(always)]
fn normals(params: Params, block: u64) -> [f32; 4] {
    let [u0, u1, u2, u3] = words(params, block).map(uniform);
    let (r0, r1) = ((-2.0 * u0.ln()).sqrt(), (-2.0 * u2.ln()).sqrt());
    let ((sin0, cos0), (sin1, cos1)) = ((TAU * u1).sin_cos(), (TAU * u3).sin_cos());
    [r0 * cos0, r0 * sin0, r1 * cos1, r1 * sin1]
}
