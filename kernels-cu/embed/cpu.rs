//! CPU path: rows over threads; the gradient of the table adds the samples in the order of the batch.

use super::SILU;
use crate::generated::embed::{Backward, Dims, Forward};
use crate::simd::{sigmoid, vectorised};
use rayon::prelude::*;

/// Elements that one thread takes at a time at the least.
const GRAIN: usize = 1 << 14;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let d = a.dims.d;
    let rows = GRAIN.div_ceil(d.max(1));
    let (table, index, addend, act) = (a.table, a.index, a.addend, a.params.act);
    a.y.par_chunks_mut(d.max(1)).zip(a.pre.par_chunks_mut(d.max(1))).enumerate().with_min_len(rows).for_each(
        |(sample, (y, pre))| {
            let row = &table[index[sample] as usize * d..][..d];
            vectorised(
                #[inline(always)]
                || match addend {
                    Some(addend) => {
                        pre.iter_mut().zip(row.iter().zip(&addend[sample * d..])).for_each(|(p, (r, x))| *p = r + x)
                    }
                    None => pre.copy_from_slice(row),
                },
            );
            vectorised(
                #[inline(always)]
                || match act {
                    SILU => y.iter_mut().zip(&*pre).for_each(|(y, p)| *y = p * sigmoid(*p)),
                    _ => y.copy_from_slice(pre),
                },
            );
        },
    );
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let Dims { b, d, .. } = a.dims;
    let (dy, pre, act) = (a.dy, a.pre, a.params.act);
    if let Some(daddend) = a.daddend {
        daddend.par_chunks_mut(GRAIN).enumerate().for_each(|(i, out)| {
            let range = i * GRAIN..i * GRAIN + out.len();
            gradient::<false>(act, &dy[range.clone()], &pre[range], out);
        });
    }
    if let Some(dtable) = a.dtable {
        dtable.par_chunks_mut(GRAIN).for_each(|rows| rows.fill(0.0));
        // The batch in order: two samples of one row always add in the same order.
        for sample in 0..b {
            let row = &mut dtable[a.index[sample] as usize * d..][..d];
            let range = sample * d..(sample + 1) * d;
            gradient::<true>(act, &dy[range.clone()], &pre[range], row);
        }
    }
}

/// Writes the gradient of every pre-activation to `out`, or adds it there.
fn gradient<const ADD: bool>(act: usize, dy: &[f32], pre: &[f32], out: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || match act {
            SILU => each::<ADD>(dy, pre, out, silu_slope),
            _ => each::<ADD>(dy, pre, out, |_| 1.0),
        },
    );
}

#[inline(always)]
fn each<const ADD: bool>(dy: &[f32], pre: &[f32], out: &mut [f32], slope: impl Fn(f32) -> f32) {
    let n = out.len();
    let (dy, pre) = (&dy[..n], &pre[..n]);
    for i in 0..n {
        let kept = if ADD { out[i] } else { 0.0 };
        out[i] = dy[i].mul_add(slope(pre[i]), kept);
    }
}

/// d/dx of x·sigmoid(x).
#[inline(always)]
fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}
