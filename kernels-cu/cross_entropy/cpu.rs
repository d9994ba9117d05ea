//! CPU path: one pass over each row with its largest logit taken out; a classifier's few classes stay in cache.

use crate::generated::cross_entropy::{Backward, Forward};
use crate::simd::{LANES, exp, sum_each, vectorised};
use rayon::prelude::*;

/// Logits of one unit of parallel work.
const WORK: usize = 1 << 14;

/// Samples of one unit of work: a matter of shape alone, so that results do not depend on the number of threads.
fn rows_at_once(classes: usize) -> usize {
    (WORK / classes).max(1)
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let k = a.dims.k;
    let rows = rows_at_once(k);
    a.lse.par_chunks_mut(rows).zip(a.logits.par_chunks(rows * k)).for_each(|(lse, logits)| {
        vectorised(
            #[inline(always)]
            || {
                for (lse, row) in lse.iter_mut().zip(logits.chunks_exact(k)) {
                    *lse = log_sum_exp(row);
                }
            },
        );
    });
    let losses = a.logits.chunks_exact(k).zip(a.labels).zip(a.lse.iter());
    let total: f64 = losses.map(|((row, &label), &lse)| f64::from(lse) - f64::from(row[label as usize])).sum();
    a.loss[0] = (total / a.dims.b as f64) as f32;
}

#[inline(always)]
fn log_sum_exp(row: &[f32]) -> f32 {
    let (vectors, rest) = row.as_chunks::<LANES>();
    let mut tops = [f32::NEG_INFINITY; LANES];
    for x in vectors {
        for lane in 0..LANES {
            tops[lane] = if x[lane] > tops[lane] { x[lane] } else { tops[lane] };
        }
    }
    let top = tops.iter().chain(rest).fold(f32::NEG_INFINITY, |top, x| top.max(*x));
    top + sum_each(row, |x| exp(x - top)).ln()
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let Some(dlogits) = a.dlogits else { return };
    let k = a.dims.k;
    let rows = rows_at_once(k);
    let scale = a.dloss[0] / a.dims.b as f32;
    let samples = a.logits.par_chunks(rows * k).zip(a.labels.par_chunks(rows)).zip(a.lse.par_chunks(rows));
    dlogits.par_chunks_mut(rows * k).zip(samples).for_each(|(out, ((logits, labels), lse))| {
        let each = out.chunks_exact_mut(k).zip(logits.chunks_exact(k)).zip(labels.iter().zip(lse));
        for ((out, row), (&label, &lse)) in each {
            vectorised(
                #[inline(always)]
                || out.iter_mut().zip(row).for_each(|(d, v)| *d = scale * exp(v - lse)),
            );
            out[label as usize] -= scale;
        }
    });
}
