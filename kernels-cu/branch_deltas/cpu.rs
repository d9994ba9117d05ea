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

/// Backward pass: one pass over dy, a token at a time.
pub fn backward(a: Backward<'_, f32>) {
    let Dims { d, .. } = a.dims;
    let tokens = a.dy.len() / (2 * d);
    let [first, second, dx] = [a.dfirst, a.dsecond, a.dx].map(|out| by_token(out, tokens, d));
    let outputs = first.into_par_iter().zip(second).zip(dx);
    outputs.zip(a.dy.par_chunks(2 * d)).with_min_len(TOKENS).for_each(|(((first, second), dx), dy)| {
        let (left, right) = dy.split_at(d);
        if let Some(first) = first {
            first.copy_from_slice(left);
        }
        if let Some(second) = second {
            second.copy_from_slice(right);
        }
        if let Some(dx) = dx {
            vectorised(
                #[inline(always)]
                || dx.iter_mut().zip(left).zip(right).for_each(|((o, l), r)| *o = -(l + r)),
            );
        }
    });
}

/// The rows of a gradient, where it is wanted.
fn by_token(gradient: Option<&mut [f32]>, tokens: usize, d: usize) -> Vec<Option<&mut [f32]>> {
    gradient.map_or_else(|| (0..tokens).map(|_| None).collect(), |x| x.chunks_exact_mut(d).map(Some).collect())
}
