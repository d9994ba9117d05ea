//! What both passes of the CPU path share: the chunks of a scan, and the decays within one.
//!
//! Within a chunk of [`CHUNK`] tokens the recurrence is a product of small matrices,
//! `y_i = Σ_{j ≤ i} L_ij (C_i·B_j) dt_j x_j + cum_i C_i·S`, with L_ij the product of the decays of j + 1 to i, cum_i that
//! of the first to i, and S the state before the chunk. C·Bᵀ is the same for all heads. Decays are multiplied up, not
//! taken as exponentials of differences: nothing can overflow, and no difference of large sums loses digits.

use crate::Order;
use crate::attention::layout::with_scratch;
use crate::attention::tiles::{Rows, Sum, WIDTH, copy, pack_transposed, padded, product};
use crate::generated::mamba2::{Dims, Params};
use crate::simd::{exp_decay, softplus, vectorised};
use rayon::prelude::*;
use std::ops::Range;

/// Tokens of a chunk: products within it cost as much as those with the state at twice the size of a usual head.
pub const CHUNK: usize = 32;

/// Below this a decay is zero: products of decays would end in denormal numbers, which are slow.
const VANISHED: f32 = 1e-30;

/// Inputs of a call, read in the order of the scan; times beyond the last token are steps of size zero.
#[derive(Clone, Copy)]
pub struct Scan<'a> {
    pub dims: Dims,
    pub order: Order,
    pub dt_offset: usize,
    pub xbc: &'a [f32],
    pub p: &'a [f32],
    pub dt_bias: &'a [f32],
    pub a_log: &'a [f32],
}

impl<'a> Scan<'a> {
    pub fn new(dims: Dims, params: Params, [xbc, p, dt_bias, a_log]: [&'a [f32]; 4]) -> Self {
        let order = Order { n: dims.n, reverse: params.reverse };
        Scan { dims, order, dt_offset: params.dt_offset, xbc, p, dt_bias, a_log }
    }

    pub fn chunks(&self) -> usize {
        self.dims.n.div_ceil(CHUNK)
    }

    /// Values of a row of `xbc`.
    pub fn width(&self) -> usize {
        self.dims.h * self.dims.e + 2 * self.dims.k
    }

    /// The row of a time in tensors over samples and tokens.
    #[inline(always)]
    pub fn row(&self, sample: usize, time: usize) -> usize {
        sample * self.dims.n + self.order.token(time)
    }

    /// Live times of a chunk.
    pub fn live(&self, chunk: usize) -> usize {
        CHUNK.min(self.dims.n - chunk * CHUNK)
    }

    /// Rows of B and C of a sample's chunk, and their products C·Bᵀ, from what [`Scan::prepare`] made.
    pub fn shared<'s>(&self, shared: &'s [f32], sample: usize, chunk: usize) -> Shared<'s> {
        let len = self.shared_len();
        let (bc, rest) = shared[(sample * self.chunks() + chunk) * len..][..len].split_at(CHUNK * 2 * self.dims.k);
        let (cb, raw) = rest.split_at(CHUNK * CHUNK);
        let rows = |at: usize| Rows { data: &bc[at..], stride: 2 * self.dims.k, width: self.dims.k };
        Shared { b: rows(0), c: rows(self.dims.k), cb, raw }
    }

    fn shared_len(&self) -> usize {
        CHUNK * (2 * self.dims.k + CHUNK + self.dims.h)
    }

    /// Gathers B, C and the raw step sizes of all samples in the order of the scan and multiplies C·Bᵀ, once for all
    /// heads.
    pub fn prepare(&self, shared: &mut Vec<f32>) {
        let (k, len) = (self.dims.k, self.shared_len());
        shared.resize(self.dims.b * self.chunks() * len, 0.0);
        shared.par_chunks_mut(len).enumerate().for_each(|(index, out)| {
            let (sample, chunk) = (index / self.chunks(), index % self.chunks());
            let (bc, rest) = out.split_at_mut(CHUNK * 2 * k);
            let (cb, raw) = rest.split_at_mut(CHUNK * CHUNK);
            let live = self.live(chunk);
            for (i, out) in bc.chunks_exact_mut(2 * k).enumerate() {
                if i < live {
                    let row = self.row(sample, chunk * CHUNK + i);
                    out.copy_from_slice(&self.xbc[row * self.width() + self.dims.h * self.dims.e..][..2 * k]);
                } else {
                    out.fill(0.0);
                }
            }
            for (i, out) in raw.chunks_exact_mut(self.dims.h).enumerate().take(live) {
                let row = self.row(sample, chunk * CHUNK + i);
                out.copy_from_slice(&self.p[row * self.dims.w + self.dt_offset..][..self.dims.h]);
            }
            let rows = |at: usize| Rows { data: &bc[at..], stride: 2 * k, width: k };
            with_scratch([k * padded(CHUNK)], |[columns]| {
                pack_transposed(rows(0), CHUNK, columns);
                product(rows(k), CHUNK, columns, CHUNK, Sum { data: cb, stride: CHUNK, add: false });
            });
        });
    }

    /// Step sizes and decays of some heads, for all times of all chunks, head by head.
    pub fn steps(&self, shared: &[f32], of: &Bundle, dt: &mut [f32], decay: &mut [f32]) {
        let (n, h, times) = (self.dims.n, self.dims.h, self.chunks() * CHUNK);
        let heads = dt.chunks_exact_mut(times).zip(decay.chunks_exact_mut(times));
        for (head, (dt, decay)) in of.heads.clone().zip(heads) {
            for (chunk, dt) in dt.chunks_exact_mut(CHUNK).enumerate() {
                let raw = self.shared(shared, of.sample, chunk).raw;
                for (i, dt) in dt.iter_mut().enumerate() {
                    *dt = raw[i * h + head];
                }
            }
            let (bias, rate) = (self.dt_bias[head], self.rate(head));
            vectorised(
                #[inline(always)]
                || {
                    for time in 0..n {
                        dt[time] = softplus(dt[time] + bias);
                        decay[time] = exp_decay(rate * dt[time]);
                    }
                },
            );
            dt[n..].fill(0.0);
            decay[n..].fill(1.0);
        }
    }

    /// Decays within a chunk, head by head: see [`decays`].
    pub fn decays(&self, chunk: usize, decay: &[f32], within: &mut [f32], since: &mut [f32]) {
        let heads = within.chunks_exact_mut(CHUNK * CHUNK).zip(since.chunks_exact_mut(CHUNK));
        for (decay, (within, since)) in decay.chunks_exact(self.chunks() * CHUNK).zip(heads) {
            decays(&decay[chunk * CHUNK..][..CHUNK], within, since);
        }
    }

    /// d(ln a)/d(dt) of a head, negative.
    pub fn rate(&self, head: usize) -> f32 {
        -f64::from(self.a_log[head]).exp() as f32
    }

    /// Copies the columns of some heads of one chunk out of rows of `width` values, each head padded to whole vectors;
    /// times the factor of head and time where there are factors, head by head over all times.
    pub fn load(&self, from: &[f32], width: usize, of: &Bundle, chunk: usize, factor: Option<&[f32]>, out: &mut [f32]) {
        let (e, wide, live) = (self.dims.e, padded(self.dims.e), self.live(chunk));
        let (first, times) = (chunk * CHUNK, self.chunks() * CHUNK);
        vectorised(
            #[inline(always)]
            || {
                for (i, out) in out.chunks_exact_mut(of.heads.len() * wide).enumerate() {
                    if i >= live {
                        out.fill(0.0);
                        continue;
                    }
                    let row = &from[self.row(of.sample, first + i) * width + of.heads.start * e..];
                    for (g, out) in out.chunks_exact_mut(wide).enumerate() {
                        copy(&row[g * e..][..e], out);
                        if let Some(factor) = factor {
                            let factor = factor[g * times + first + i];
                            for v in out.iter_mut() {
                                *v *= factor;
                            }
                        }
                    }
                }
            },
        );
    }
}

/// Heads of one sample that are computed together: side by side they fill the columns of a product, whose left factor,
/// B or C, they share.
#[derive(Clone, Debug)]
pub struct Bundle {
    pub sample: usize,
    pub heads: Range<usize>,
}

impl Bundle {
    /// Heads of a bundle, at most: as many as fill four vectors.
    pub fn most(e: usize) -> usize {
        (4 * WIDTH / padded(e)).max(1)
    }
}

/// What the heads of a sample share in one chunk.
#[derive(Clone, Copy)]
pub struct Shared<'a> {
    /// What is written to the state.
    pub b: Rows<'a>,
    /// How it is read.
    pub c: Rows<'a>,
    /// `[CHUNK, CHUNK]`: C_i·B_j.
    pub cb: &'a [f32],
    /// `[CHUNK, H]`: what the step sizes are made of.
    pub raw: &'a [f32],
}

/// Whole rows.
pub fn rows(data: &[f32], width: usize) -> Rows<'_> {
    Rows { data, stride: width, width }
}

#[inline(always)]
fn flushed(x: f32) -> f32 {
    if x < VANISHED { 0.0 } else { x }
}

/// Fills `within` with L (zero above the diagonal) and `since` with cum from the decays of a chunk. The last row of L
/// is what remains of each token at the end of the chunk, the last value of cum what remains of the state before it.
fn decays(decay: &[f32], within: &mut [f32], since: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            let mut all = 1.0;
            within[..CHUNK].fill(0.0);
            for i in 0..CHUNK {
                if i > 0 {
                    let (done, row) = within.split_at_mut(i * CHUNK);
                    let above = &done[(i - 1) * CHUNK..];
                    for j in 0..CHUNK {
                        row[j] = flushed(above[j] * decay[i]);
                    }
                }
                within[i * CHUNK + i] = 1.0;
                all = flushed(all * decay[i]);
                since[i] = all;
            }
        },
    );
}

/// `out = a ∘ b`.
pub fn multiply(a: &[f32], b: &[f32], out: &mut [f32]) {
    let len = out.len();
    let (a, b) = (&a[..len], &b[..len]);
    vectorised(
        #[inline(always)]
        || {
            for i in 0..len {
                out[i] = a[i] * b[i];
            }
        },
    );
}

/// Multiplies the `wide` columns of each head by the head's factor of the row; factors of two heads are `stride` apart.
pub fn scale_rows(rows: &mut [f32], heads: usize, wide: usize, factor: &[f32], stride: usize) {
    vectorised(
        #[inline(always)]
        || {
            for (i, row) in rows.chunks_exact_mut(heads * wide).enumerate() {
                for (g, row) in row.chunks_exact_mut(wide).enumerate() {
                    let factor = factor[g * stride + i];
                    for v in row.iter_mut() {
                        *v *= factor;
                    }
                }
            }
        },
    );
}

/// Multiplies every row of the `wide` columns of each head by the head's decay over a whole chunk.
pub fn fade(state: &mut [f32], wide: usize, since: &[f32]) {
    vectorised(
        #[inline(always)]
        || {
            for row in state.chunks_exact_mut(since.len() / CHUNK * wide) {
                for (g, row) in row.chunks_exact_mut(wide).enumerate() {
                    let all = since[g * CHUNK + CHUNK - 1];
                    for v in row.iter_mut() {
                        *v *= all;
                    }
                }
            }
        },
    );
}
