//! CPU path: frequencies once, then samples over threads.

use super::frequency;
use crate::generated::sinusoid::{Dims, Forward};
use crate::simd::{sin_cos_exact, vectorised};
use rayon::prelude::*;
use std::cell::Cell;

thread_local! {
    /// Kept from call to call.
    static FREQUENCIES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { d, .. } = a.dims;
    let half = d / 2;
    let mut frequencies = FREQUENCIES.take();
    frequencies.clear();
    frequencies.extend((0..half).map(|i| frequency(i, a.params.denominator)));
    a.y.par_chunks_mut(d.max(1)).zip(a.t).with_min_len(8).for_each(|(y, t)| {
        let (cos, sin) = y.split_at_mut(half);
        vectorised(
            #[inline(always)]
            || {
                // Bound in here, and of one length: what is captured would be read again for every element.
                let (t, len) = (*t, half);
                let (cos, sin, frequencies) = (&mut cos[..len], &mut sin[..len], &frequencies[..len]);
                for i in 0..len {
                    (sin[i], cos[i]) = sin_cos_exact(t * frequencies[i]);
                }
            },
        );
    });
    FREQUENCIES.set(frequencies);
}
