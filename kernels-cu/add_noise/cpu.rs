//! CPU path: samples over threads.

use crate::generated::add_noise::{Dims, Forward};
use crate::simd::vectorised;
use rayon::prelude::*;

/// Elements that one thread takes at the least.
const GRAIN: usize = 1 << 14;

/// The mixture.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { l, .. } = a.dims;
    let row = l.max(1);
    let inputs = a.x0.par_chunks(row).zip(a.noise.par_chunks(row)).zip(a.coefs.par_chunks(2));
    a.x_t.par_chunks_mut(row).zip(inputs).with_min_len(GRAIN.div_ceil(row)).for_each(|(x_t, ((x0, noise), coefs))| {
        let (signal, sigma) = (coefs[0], coefs[1]);
        vectorised(
            #[inline(always)]
            || {
                x_t.iter_mut()
                    .zip(x0.iter().zip(noise))
                    .for_each(|(x_t, (x0, noise))| *x_t = signal * x0 + sigma * noise)
            },
        );
    });
}
