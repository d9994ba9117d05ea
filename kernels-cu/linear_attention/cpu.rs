//! CPU path: the state of every head first, then its queries; products over tiles, tokens by blocks.

use super::RELU;
use crate::attention::layout::{
    self, Out, RowsMut, blocks, by_sample, of_head, packed, sample, touch, with_scratch, write,
};
use crate::attention::panels::{copy_times, map};
use crate::attention::tiles::{Rows, Sum, TILE, pack, pack_transposed, padded, product, product_transposed};
use crate::generated::attention::Dims as Heads;
use crate::generated::linear_attention::{Backward, Dims, Forward};
use crate::simd::{exp_decay, sum_pairs, vectorised};
use rayon::prelude::*;

/// Tokens of a block: features, products and the state stay in the second-level cache.
const TOKENS: usize = 240;

#[inline(always)]
pub(super) fn phi<const MAP: usize>(x: f32) -> f32 {
    let positive = if x > 0.0 { x } else { 0.0 };
    if MAP == RELU { positive } else { positive + exp_decay(x - positive) }
}

#[inline(always)]
pub(super) fn slope<const MAP: usize>(x: f32) -> f32 {
    let below = if MAP == RELU { 0.0 } else { exp_decay(if x > 0.0 { 0.0 } else { x }) };
    if x > 0.0 { 1.0 } else { below }
}

/// Features of `count` rows, one row after the other.
fn features<const MAP: usize>(rows: Rows<'_>, count: usize, out: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (i, out) in out.chunks_exact_mut(rows.width).take(count).enumerate() {
                map(rows.row(i), out, phi::<MAP>);
            }
        },
    );
}

/// Rows one after the other as the left factor of a product.
fn dense(data: &[f32], width: usize) -> Rows<'_> {
    Rows { data, stride: width, width }
}

fn heads(Dims { b, n, h, e }: Dims) -> Heads {
    Heads { b, n, h, e }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    if a.params.map == RELU { forward_by::<{ RELU }>(a) } else { forward_by::<{ super::ELU_PLUS_ONE }>(a) }
}

fn forward_by<const MAP: usize>(a: Forward<'_, f32>) {
    if a.params.causal {
        return super::causal::forward::<MAP>(a);
    }
    let (dims, qkv, eps, e) = (a.dims, a.qkv, a.params.eps, a.dims.e);
    let heads = heads(dims);
    let run = if by_sample(dims.b) { dims.h } else { 1 };
    let sums = a.state.par_chunks_mut(e * e).zip(a.total.par_chunks_mut(e));
    sums.enumerate().with_min_len(run).for_each(|(index, (state, total))| {
        if index % dims.h == 0 {
            touch(sample(qkv, dims.b, index / dims.h));
        }
        let [_, k, v] = packed(qkv, heads, index / dims.h, index % dims.h);
        sum_keys::<MAP>(k, v, dims.n, state, total);
    });
    let (state, total) = (&*a.state, &*a.total);
    let begin = |index| touch(sample(qkv, dims.b, index));
    layout::forward(heads, a.y, a.norm, begin, |sample, head, queries, y, norm| {
        let [q, ..] = packed(qkv, heads, sample, head);
        let index = sample * dims.h + head;
        let (state, total) = (&state[index * e * e..][..e * e], &total[index * e..][..e]);
        head_forward::<MAP>(q.from(queries.start), state, total, eps, y, norm);
    });
}

/// State and total of a head over its `n` tokens.
fn sum_keys<const MAP: usize>(k: Rows<'_>, v: Rows<'_>, n: usize, state: &mut [f32], total: &mut [f32]) {
    let (e, wide) = (k.width, padded(k.width));
    let rows = n.min(TOKENS).next_multiple_of(TILE);
    with_scratch([rows * e, rows * wide, e * wide], |[phi_k, values, sum]| {
        total.fill(0.0);
        for (at, count) in blocks(n, TOKENS, TILE) {
            features::<MAP>(k.from(at), count, phi_k);
            pack(v.from(at), count, values);
            product_transposed(dense(phi_k, e), count, values, e, Sum { data: sum, stride: wide, add: at > 0 });
            add_rows(&phi_k[..count * e], |_| 1.0, total);
        }
        state.chunks_exact_mut(e).zip(sum.chunks_exact(wide)).for_each(|(state, sum)| state.copy_from_slice(&sum[..e]));
    });
}

/// `sum += Σ_i factor(i) · row i`.
fn add_rows(rows: &[f32], factor: impl Fn(usize) -> f32, sum: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (i, row) in rows.chunks_exact(sum.len()).enumerate() {
                let factor = factor(i);
                for j in 0..sum.len() {
                    sum[j] = factor.mul_add(row[j], sum[j]);
                }
            }
        },
    );
}

fn head_forward<const MAP: usize>(
    q: Rows<'_>,
    state: &[f32],
    total: &[f32],
    eps: f32,
    mut y: Out<'_>,
    norm: &mut [f32],
) {
    let (e, wide) = (q.width, padded(q.width));
    let rows = norm.len().min(TOKENS).next_multiple_of(TILE);
    with_scratch([rows * e, e * wide, rows * wide], |[phi_q, packed_state, sum]| {
        pack(dense(state, e), e, packed_state);
        for (at, count) in blocks(norm.len(), TOKENS, TILE) {
            features::<MAP>(q.from(at), count, phi_q);
            product(dense(phi_q, e), count, packed_state, e, Sum { data: sum, stride: wide, add: false });
            let norm = &mut norm[at..][..count];
            vectorised(
                #[inline(always)]
                || {
                    for i in 0..count {
                        let (phi_q, sum) = (&phi_q[i * e..][..e], &sum[i * wide..][..e]);
                        norm[i] = sum_pairs(phi_q, total, |x, y| x * y) + eps;
                        copy_times(sum, 1.0 / norm[i], y.row(at + i));
                    }
                },
            );
        }
    });
}

/// Backward pass. Heads go over threads: each owns its rows of `dqkv`.
pub fn backward(a: Backward<'_, f32>) {
    if a.params.map == RELU { backward_by::<{ RELU }>(a) } else { backward_by::<{ super::ELU_PLUS_ONE }>(a) }
}

fn backward_by<const MAP: usize>(a: Backward<'_, f32>) {
    if a.params.causal {
        return super::causal::backward::<MAP>(a);
    }
    let Some(dqkv) = a.dqkv else { return };
    let (dims, e) = (a.dims, a.dims.e);
    let heads = heads(dims);
    let begin = |index| [a.qkv, a.y, a.dy].into_iter().for_each(|x| touch(sample(x, dims.b, index)));
    layout::backward(heads, dqkv, begin, |sample, head, grads| {
        let index = sample * dims.h + head;
        let [y, dy] = [a.y, a.dy].map(|x| of_head(x, heads, sample, head));
        let saved = Saved {
            y,
            dy,
            norm: &a.norm[index * dims.n..][..dims.n],
            state: &a.state[index * e * e..][..e * e],
            total: &a.total[index * e..][..e],
        };
        head_backward::<MAP>(packed(a.qkv, heads, sample, head), saved, grads);
    });
}

/// What the forward pass left of one head, and what came back for it.
struct Saved<'a> {
    y: Rows<'a>,
    dy: Rows<'a>,
    norm: &'a [f32],
    state: &'a [f32],
    total: &'a [f32],
}

/// See the oracle for the formulas; `g` is dy / norm and `fall` its product with −y.
fn head_backward<const MAP: usize>([q, k, v]: [Rows<'_>; 3], a: Saved<'_>, [dq, dk, dv]: &mut [RowsMut<'_>; 3]) {
    let (n, e, wide) = (a.norm.len(), q.width, padded(q.width));
    let rows = n.min(TOKENS).next_multiple_of(TILE);
    let (block, square) = (rows * wide, e * wide);
    let lengths = [rows * e, rows * e, block, block, square, square, square, rows, e];
    with_scratch(lengths, |[phi, g, packed_g, sum, state_t, dstate, packed_dstate, fall, dtotal]| {
        pack_transposed(dense(a.state, e), e, state_t);
        dtotal.fill(0.0);
        for (at, count) in blocks(n, TOKENS, TILE) {
            features::<MAP>(q.from(at), count, phi);
            vectorised(
                #[inline(always)]
                || {
                    for i in 0..count {
                        let (dy, y, g) = (a.dy.row(at + i), a.y.row(at + i), &mut g[i * e..][..e]);
                        let inverse = 1.0 / a.norm[at + i];
                        for j in 0..e {
                            g[j] = dy[j] * inverse;
                        }
                        fall[i] = -sum_pairs(g, y, |g, y| g * y);
                    }
                },
            );
            pack(dense(g, e), count, packed_g);
            product_transposed(dense(phi, e), count, packed_g, e, Sum { data: dstate, stride: wide, add: at > 0 });
            add_rows(&phi[..count * e], |i| fall[i], dtotal);
            product(dense(g, e), count, state_t, e, Sum { data: sum, stride: wide, add: false });
            through_features::<MAP>(q.from(at), sum, wide, |i| fall[i], a.total, &mut dq[at..at + count]);
        }
        let dstate_rows = Rows { data: dstate, stride: wide, width: e };
        pack(dstate_rows, e, packed_dstate);
        pack_transposed(dstate_rows, e, state_t);
        for (at, count) in blocks(n, TOKENS, TILE) {
            features::<MAP>(k.from(at), count, phi);
            product(dense(phi, e), count, packed_dstate, e, Sum { data: sum, stride: wide, add: false });
            write(sum, wide, &mut dv[at..at + count]);
            product(v.from(at), count, state_t, e, Sum { data: sum, stride: wide, add: false });
            through_features::<MAP>(k.from(at), sum, wide, |_| 1.0, dtotal, &mut dk[at..at + count]);
        }
    });
}

/// `out_i = (sum_i + factor(i)·addend) · phi'(x_i)`.
fn through_features<const MAP: usize>(
    x: Rows<'_>,
    sum: &[f32],
    stride: usize,
    factor: impl Fn(usize) -> f32,
    addend: &[f32],
    out: &mut [&mut [f32]],
) {
    vectorised(
        #[inline(always)]
        || {
            for (i, out) in out.iter_mut().enumerate() {
                let (x, sum, factor) = (x.row(i), &sum[i * stride..][..x.width], factor(i));
                let (addend, out) = (&addend[..sum.len()], &mut out[..sum.len()]);
                for j in 0..out.len() {
                    out[j] = factor.mul_add(addend[j], sum[j]) * slope::<MAP>(x[j]);
                }
            }
        },
    );
}
