//! CPU path: blocks over threads.

use crate::generated::axpy::Forward;
use crate::simd::vectorised;
use rayon::prelude::*;

/// Elements of a block.
const BLOCK: usize = 1 << 15;

/// The update.
pub fn forward(a: Forward<'_, f32>) {
    let alpha = a.params.alpha;
    a.y.par_chunks_mut(BLOCK).zip(a.x.par_chunks(BLOCK)).for_each(|(y, x)| {
        vectorised(
            #[inline(always)]
            || y.iter_mut().zip(x).for_each(|(y, x)| *y = alpha.mul_add(*x, *y)),
        );
    });
}
