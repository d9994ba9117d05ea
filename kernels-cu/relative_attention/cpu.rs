//! CPU path: a head at a time. Keys and values lie transposed in scratch memory, so that a query's scores are sums over
//! rows of keys in vector lanes; heads go over threads, in the backward pass with all their samples, so that each owns
//! its column of the bias.

use crate::attention::layout::with_scratch;
use crate::generated::relative_attention::{Backward, Dims, Forward};
use crate::simd::{exp, sum_by, vectorised};
use rayon::prelude::*;

/// One head of one sample.
struct Head<'a> {
    dims: Dims,
    qkv: &'a [f32],
    bias: &'a [f32],
    scale: f32,
    head: usize,
    keys: usize,
}

impl<'a> Head<'a> {
    fn new(dims: Dims, (qkv, bias): (&'a [f32], &'a [f32]), counts: Option<&[i32]>, scale: f32, at: usize) -> Self {
        let Dims { n, h, e, .. } = dims;
        let (sample, head) = (at / h, at % h);
        let keys = counts.map_or(n, |counts| (counts[sample].max(1) as usize).min(n));
        Head { dims, qkv: &qkv[sample * n * 3 * h * e..][..n * 3 * h * e], bias, scale, head, keys }
    }

    /// A part (q 0, k 1, v 2) of a token.
    #[inline(always)]
    fn part(&self, token: usize, part: usize) -> &'a [f32] {
        let Dims { h, e, .. } = self.dims;
        &self.qkv[((token * 3 + part) * h + self.head) * e..][..e]
    }

    /// Keys as `[E, keys]`.
    fn turned(&self, part: usize, out: &mut [f32]) {
        for j in 0..self.keys {
            for (c, value) in self.part(j, part).iter().enumerate() {
                out[c * self.keys + j] = *value;
            }
        }
    }

    /// Scores of a query.
    #[inline(always)]
    fn scores(&self, i: usize, turned: &[f32], s: &mut [f32]) {
        let Dims { n, h, .. } = self.dims;
        combine(self.part(i, 0), turned, self.scale, s);
        for (j, s) in s.iter_mut().enumerate() {
            *s += self.bias[(j + n - 1 - i) * h + self.head];
        }
    }
}

/// out[j] = scale · Σ_c weights[c] · rows[c][j].
#[inline(always)]
fn combine(weights: &[f32], rows: &[f32], scale: f32, out: &mut [f32]) {
    let len = out.len();
    out.fill(0.0);
    for (weight, row) in weights.iter().zip(rows.chunks_exact(len)) {
        let weight = weight * scale;
        for j in 0..len {
            out[j] = weight.mul_add(row[j], out[j]);
        }
    }
}

/// target += weight · row.
#[inline(always)]
fn add(weight: f32, row: &[f32], target: &mut [f32]) {
    let len = target.len();
    let row = &row[..len];
    for c in 0..len {
        target[c] = weight.mul_add(row[c], target[c]);
    }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { n, h, e, .. } = a.dims;
    let (dims, scale, counts, inputs) = (a.dims, a.params.scale, a.counts, (a.qkv, a.bias));
    let mut heads = vec![0.0f32; a.y.len()];
    heads.par_chunks_mut(n * e).zip(a.lse.par_chunks_mut(n)).enumerate().for_each(|(at, (y, lse))| {
        let head = Head::new(dims, inputs, counts, scale, at);
        with_scratch([e * head.keys, head.keys], |[turned, s]| {
            head.turned(1, turned);
            vectorised(
                #[inline(always)]
                || {
                    for (i, (y, lse)) in y.chunks_exact_mut(e).zip(lse.iter_mut()).enumerate() {
                        head.scores(i, turned, s);
                        let largest = s.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                        for s in s.iter_mut() {
                            *s = exp(*s - largest);
                        }
                        let sum = sum_by(s.len(), |j| s[j]);
                        *lse = largest + sum.ln();
                        y.fill(0.0);
                        for (j, p) in s.iter().enumerate() {
                            add(p / sum, head.part(j, 2), y);
                        }
                    }
                },
            );
        });
    });
    // [B, H, N, E] to [B, N, H, E].
    a.y.par_chunks_mut(e).enumerate().with_min_len(64).for_each(|(row, y)| {
        let (head, token, sample) = (row % h, row / h % n, row / (h * n));
        y.copy_from_slice(&heads[((sample * h + head) * n + token) * e..][..e]);
    });
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let Dims { b, n, h, e } = a.dims;
    let (dims, scale, counts, inputs) = (a.dims, a.params.scale, a.counts, (a.qkv, a.bias));
    let (dy, y, lse) = (a.dy, a.y, a.lse);
    // Of every head: gradients of q, k and v of all samples `[B, 3, N, E]`, and of its biases.
    let own = b * 3 * n * e;
    let mut found: Vec<(Vec<f32>, Vec<f32>)> = (0..h).map(|_| (vec![0.0; own], vec![0.0; 2 * n - 1])).collect();
    found.par_iter_mut().enumerate().for_each(|(index, (parts, d_bias))| {
        for (sample, parts) in parts.chunks_exact_mut(3 * n * e).enumerate() {
            let head = Head::new(dims, inputs, counts, scale, sample * h + index);
            let (d_q, rest) = parts.split_at_mut(n * e);
            let (d_k, d_v) = rest.split_at_mut(n * e);
            with_scratch([e * head.keys, e * head.keys, head.keys, head.keys], |[keys, values, p, ds]| {
                head.turned(1, keys);
                head.turned(2, values);
                vectorised(
                    #[inline(always)]
                    || {
                        for i in 0..n {
                            let row = ((sample * n + i) * h + index) * e;
                            let (dy, y) = (&dy[row..][..e], &y[row..][..e]);
                            let lse = lse[(sample * h + index) * n + i];
                            let mean = sum_by(e, |c| dy[c] * y[c]);
                            head.scores(i, keys, p);
                            combine(dy, values, 1.0, ds);
                            for j in 0..p.len() {
                                p[j] = exp(p[j] - lse);
                                ds[j] = p[j] * (ds[j] - mean);
                                d_bias[j + n - 1 - i] += ds[j];
                            }
                            for j in 0..p.len() {
                                let (weight, place) = (scale * ds[j], j * e);
                                add(weight, head.part(j, 1), &mut d_q[i * e..][..e]);
                                add(weight, head.part(i, 0), &mut d_k[place..][..e]);
                                add(p[j], dy, &mut d_v[place..][..e]);
                            }
                        }
                    },
                );
            });
        }
    });
    if let Some(out) = a.dqkv {
        out.par_chunks_mut(e).enumerate().with_min_len(64).for_each(|(row, out)| {
            let (head, part, token, sample) = (row % h, row / h % 3, row / (3 * h) % n, row / (3 * h * n));
            out.copy_from_slice(&found[head].0[((sample * 3 + part) * n + token) * e..][..e]);
        });
    }
    if let Some(out) = a.dbias {
        for (at, out) in out.iter_mut().enumerate() {
            *out = found[at % h].1[at / h];
        }
    }
}
