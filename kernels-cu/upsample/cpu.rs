//! CPU path: a row of x makes two rows of y, the second a copy of the first in cache; rows over threads.

use crate::generated::upsample::{Backward, Forward};
use crate::simd::vectorised;
use rayon::prelude::*;

/// Values of y that one thread writes at a time at the least: about 20 µs.
const GRAIN: usize = 1 << 16;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let (c, line) = (a.dims.c, a.dims.w * a.dims.c);
    let rows = a.y.par_chunks_mut(4 * line).zip(a.x.par_chunks(line)).with_min_len(GRAIN.div_ceil(4 * line));
    rows.for_each(|(y, x)| {
        let (first, second) = y.split_at_mut(2 * line);
        for (square, pixel) in first.chunks_exact_mut(2 * c).zip(x.chunks_exact(c)) {
            square[..c].copy_from_slice(pixel);
            square[c..].copy_from_slice(pixel);
        }
        second.copy_from_slice(first);
    });
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let (c, line) = (a.dims.c, a.dims.w * a.dims.c);
    let Some(dx) = a.dx else { return };
    let rows = dx.par_chunks_mut(line).zip(a.dy.par_chunks(4 * line)).with_min_len(GRAIN.div_ceil(4 * line));
    rows.for_each(|(dx, dy)| {
        let (first, second) = dy.split_at(2 * line);
        vectorised(
            #[inline(always)]
            || {
                let squares = first.chunks_exact(2 * c).zip(second.chunks_exact(2 * c));
                for (dx, (above, below)) in dx.chunks_exact_mut(c).zip(squares) {
                    for i in 0..c {
                        dx[i] = (above[i] + above[c + i]) + (below[i] + below[c + i]);
                    }
                }
            },
        );
    });
}
