//! CPU path: a row at a time in cache, rows over threads; the gate is computed again where it is needed.

use crate::attention::layout::with_scratch;
use crate::generated::rms_norm::{Backward, Dims, Forward};
use crate::simd::{sigmoid, sum_by, vectorised};
use rayon::prelude::*;

/// Rows of a task of the backward pass; each task has its own sums of the weight's gradient.
const ROWS: usize = 64;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { d, w, .. } = a.dims;
    let (x, gate, weight, params) = (a.x, a.gate, a.weight, a.params);
    a.y.par_chunks_mut(d).zip(a.rstd.par_iter_mut()).enumerate().with_min_len(8).for_each(|(row, (y, rstd))| {
        let x = &x[row * d..][..d];
        let z = gate.map(|gate| &gate[row * w + params.gate_offset..][..d]);
        *rstd = vectorised(
            #[inline(always)]
            || {
                gated(x, z, y);
                let rstd = 1.0 / (sum_by(d, |i| y[i] * y[i]) / d as f32 + params.eps).sqrt();
                for i in 0..d {
                    y[i] *= rstd * weight[i];
                }
                rstd
            },
        );
    });
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let Dims { b, n, d, w } = a.dims;
    let tasks = (b * n).div_ceil(ROWS);
    let mut dx = pieces(a.dx, ROWS * d, tasks);
    let mut dgate = pieces(a.dgate, ROWS * w, tasks);
    let mut partial = vec![0.0f32; tasks * d];
    let (dy, x, gate, weight, rstd, offset) = (a.dy, a.x, a.gate, a.weight, a.rstd, a.params.gate_offset);
    dx.par_iter_mut().zip(&mut dgate).zip(partial.par_chunks_mut(d)).enumerate().for_each(
        |(task, ((dx, dgate), dweight))| {
            if let Some(dgate) = dgate {
                dgate.fill(0.0);
            }
            let first = task * ROWS;
            for row in first..(first + ROWS).min(b * n) {
                let inputs = Row {
                    dy: &dy[row * d..][..d],
                    x: &x[row * d..][..d],
                    z: gate.map(|gate| &gate[row * w + offset..][..d]),
                    weight,
                    rstd: rstd[row],
                };
                let dx = dx.as_mut().map(|dx| &mut dx[(row - first) * d..][..d]);
                let dz = dgate.as_mut().map(|dz| &mut dz[(row - first) * w + offset..][..d]);
                with_scratch([d, d], |[u, du]| {
                    vectorised(
                        #[inline(always)]
                        || inputs.backward(u, du, dx, dz, dweight),
                    );
                });
            }
        },
    );
    if let Some(out) = a.dweight {
        out.fill(0.0);
        for task in partial.chunks_exact(d) {
            out.iter_mut().zip(task).for_each(|(sum, x)| *sum += x);
        }
    }
}

/// `u = x·silu(z)`, or x without a gate.
#[inline(always)]
fn gated(x: &[f32], z: Option<&[f32]>, u: &mut [f32]) {
    let d = u.len();
    let Some(z) = z else { return u.copy_from_slice(x) };
    let (x, z) = (&x[..d], &z[..d]);
    for i in 0..d {
        u[i] = x[i] * (z[i] * sigmoid(z[i]));
    }
}

/// `count` pieces of a gradient, absent where it is.
fn pieces(x: Option<&mut [f32]>, len: usize, count: usize) -> Vec<Option<&mut [f32]>> {
    match x {
        Some(x) => x.chunks_mut(len).map(Some).collect(),
        None => (0..count).map(|_| None).collect(),
    }
}

/// What the gradients of a row are made of.
struct Row<'a> {
    dy: &'a [f32],
    x: &'a [f32],
    z: Option<&'a [f32]>,
    weight: &'a [f32],
    rstd: f32,
}

impl Row<'_> {
    #[inline(always)]
    fn backward(
        self,
        u: &mut [f32],
        du: &mut [f32],
        dx: Option<&mut [f32]>,
        dz: Option<&mut [f32]>,
        dweight: &mut [f32],
    ) {
        let Row { dy, x, z, weight, rstd } = self;
        let d = x.len();
        let (dy, weight) = (&dy[..d], &weight[..d]);
        gated(x, z, u);
        let mean = sum_by(d, |i| dy[i] * weight[i] * u[i]) / d as f32;
        let back = rstd * rstd * mean;
        for i in 0..d {
            dweight[i] += dy[i] * u[i] * rstd;
            du[i] = rstd * (-u[i]).mul_add(back, dy[i] * weight[i]);
        }
        if let Some(dx) = dx {
            gated(du, z, dx);
        }
        if let (Some(z), Some(dz)) = (z, dz) {
            for i in 0..d {
                let s = sigmoid(z[i]);
                dz[i] = du[i] * x[i] * (s * z[i].mul_add(1.0 - s, 1.0));
            }
        }
    }
}
