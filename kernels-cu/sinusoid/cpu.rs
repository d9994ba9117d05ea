//! CPU path: frequencies once, then samples over threads.

use super::frequency;
use crate::generated::sinusoid::{Dims, Forward};
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
        for ((cos, sin), f) in cos.iter_mut().zip(sin).zip(&frequencies) {
            // The phase reaches thousands: reducing it in f64 keeps the f32 result right to the last bits.
            let (s, c) = f64::from(t * f).sin_cos();
            (*cos, *sin) = (c as f32, s as f32);
        }
    });
    FREQUENCIES.set(frequencies);
}
