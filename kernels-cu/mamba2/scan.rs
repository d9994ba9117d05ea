//! What both passes of the CPU path share: the chunks of a scan, and the decays within one.
//!
//! Within a chunk of [`CHUNK`] tokens the recurrence is a product of small matrices,
//! `y_i = Σ_{j ≤ i} L_ij (C_i·B_j) dt_j x_j + cum_i C_i·S`, with L_ij the product of the decays of j + 1 to i, cum_i that
//! of the first to i, and S the state before the chunk. C·Bᵀ is the same for all heads. Decays are multiplied up, not
//! taken as exponentials of differences: nothing can overflow, and no difference of large sums loses digits.

use crate::Order;
use crate::attention::layout::with_scratch;
use crate::attention::tiles::{Rows, Sum, copy, pack_transposed, padded, product};
use crate::generated::mamba2::{Dims, Params};
use crate::simd::{exp_decay, softplus, vectorised};
use rayon::prelude::*;

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

    /// Step sizes and decays of one head, for all times of all chunks.
    pub fn steps(&self, shared: &[f32], sample: usize, head: usize, dt: &mut [f32], decay: &mut [f32]) {
        let (n, h) = (self.dims.n, self.dims.h);
        for (chunk, dt) in dt.chunks_exact_mut(CHUNK).enumerate() {
            let raw = self.shared(shared, sample, chunk).raw;
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

    /// d(ln a)/d(dt) of a head, negative.
    pub fn rate(&self, head: usize) -> f32 {
        -f64::from(self.a_log[head]).exp() as f32
    }

    /// Copies the columns of a head of one chunk out of rows of `width` values, times a factor of each time; rows of
    /// padded length.
    pub fn load(&self, from: &[f32], width: usize, [sample, head, chunk]: [usize; 3], factor: &[f32], out: &mut [f32]) {
        let (e, live) = (self.dims.e, self.live(chunk));
        vectorised(
            #[inline(always)]
            || {
                for (i, out) in out.chunks_exact_mut(padded(e)).enumerate() {
                    if i < live {
                        let row = self.row(sample, chunk * CHUNK + i);
                        copy(&from[row * width + head * e..][..e], out);
                        for v in out.iter_mut() {
                            *v *= factor[i];
                        }
                    } else {
                        out.fill(0.0);
                    }
                }
            },
        );
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

/// Rows of `e` values, padded to whole vectors.
pub fn padded_rows(data: &[f32], e: usize) -> Rows<'_> {
    Rows { data, stride: padded(e), width: e }
}

#[inline(always)]
fn flushed(x: f32) -> f32 {
    if x < VANISHED { 0.0 } else { x }
}

/// Fills `within` with L (zero above the diagonal) and `since` with cum from the decays of a chunk. The last row of L
/// is what remains of each token at the end of the chunk, the last value of cum what remains of the state before it.
pub fn decays(decay: &[f32], within: &mut [f32], since: &mut [f32]) {
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

/// Multiplies each row of `rows` by its factor.
pub fn scale_rows(rows: &mut [f32], width: usize, factor: &[f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (row, f) in rows.chunks_exact_mut(width).zip(factor) {
                for v in row {
                    *v *= f;
                }
            }
        },
    );
}
