//! CPU path: one pass; samples over threads.

use crate::generated::gate_residual::{Backward, Dims, Forward};
use crate::simd::vectorised;
use rayon::prelude::*;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { n, c, d, .. } = a.dims;
    let (table, row) = (a.modulation, a.params.gate_row);
    let inputs = a.residual.par_chunks(d).zip(a.branch.par_chunks(d));
    a.y.par_chunks_mut(d).zip(inputs).enumerate().with_min_len(16).for_each(|(token, (y, (residual, branch)))| {
        let gate = &table[(token / n * c + row) * d..][..d];
        vectorised(
            #[inline(always)]
            || {
                for (((y, r), b), g) in y.iter_mut().zip(residual).zip(branch).zip(gate) {
                    *y = g.mul_add(*b, *r);
                }
            },
        );
    });
}

/// Backward pass: each sample sums its own gate gradient, so no sum is shared.
pub fn backward(a: Backward<'_, f32>) {
    let Dims { n, c, d, .. } = a.dims;
    let (table, row, dy, branch) = (a.modulation, a.params.gate_row, a.dy, a.branch);
    if let Some(dbranch) = a.dbranch {
        dbranch.par_chunks_mut(d).zip(dy.par_chunks(d)).enumerate().with_min_len(16).for_each(|(token, (out, dy))| {
            let gate = &table[(token / n * c + row) * d..][..d];
            vectorised(
                #[inline(always)]
                || out.iter_mut().zip(dy).zip(gate).for_each(|((o, y), g)| *o = y * g),
            );
        });
    }
    if let Some(dmodulation) = a.dmodulation {
        dmodulation.par_chunks_mut(c * d).enumerate().for_each(|(sample, out)| {
            out.fill(0.0);
            let out = &mut out[row * d..][..d];
            for token in sample * n..(sample + 1) * n {
                let (dy, branch) = (&dy[token * d..][..d], &branch[token * d..][..d]);
                vectorised(
                    #[inline(always)]
                    || out.iter_mut().zip(dy).zip(branch).for_each(|((o, y), b)| *o = y.mul_add(*b, *o)),
                );
            }
        });
    }
}
