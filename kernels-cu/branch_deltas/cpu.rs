//! CPU path: one pass; tokens over threads.

use crate::generated::branch_deltas::{Backward, Dims, Forward};
use crate::simd::vectorised;
use rayon::prelude::*;

/// Tokens that a thread takes at least.
const TOKENS: usize = 16;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { d, .. } = a.dims;
    let inputs = a.x.par_chunks(d).zip(a.first.par_chunks(d)).zip(a.second.par_chunks(d));
    a.y.par_chunks_mut(2 * d).zip(inputs).with_min_len(TOKENS).for_each(|(y, ((x, first), second))| {
        let (left, right) = y.split_at_mut(d);
        vectorised(
            #[inline(always)]
            || {
                left.iter_mut().zip(first).zip(x).for_each(|((y, f), x)| *y = f - x);
                right.iter_mut().zip(second).zip(x).for_each(|((y, s), x)| *y = s - x);
            },
        );
    });
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let Dims { d, .. } = a.dims;
    let dy = a.dy;
    let half = |out: &mut [f32], start: usize| {
        out.par_chunks_mut(d)
            .zip(dy.par_chunks(2 * d))
            .with_min_len(TOKENS)
            .for_each(|(out, dy)| out.copy_from_slice(&dy[start..start + d]));
    };
    if let Some(out) = a.dfirst {
        half(out, 0);
    }
    if let Some(out) = a.dsecond {
        half(out, d);
    }
    if let Some(out) = a.dx {
        out.par_chunks_mut(d).zip(dy.par_chunks(2 * d)).with_min_len(TOKENS).for_each(|(out, dy)| {
            let (left, right) = dy.split_at(d);
            vectorised(
                #[inline(always)]
                || out.iter_mut().zip(left).zip(right).for_each(|((o, l), r)| *o = -(l + r)),
            );
        });
    }
}
