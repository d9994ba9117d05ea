//! CPU path of causal sums: a head's state grows token by token and stays in the first-level cache; heads go over threads.

use super::cpu::{phi, slope};
use crate::attention::layout::{RowsMut, for_heads, of_head, packed, split_parts, with_scratch};
use crate::attention::tiles::Rows;
use crate::generated::attention::Dims as Heads;
use crate::generated::linear_attention::{Backward, Dims, Forward};
use crate::simd::{sum_by, vectorised};
use rayon::prelude::*;

/// What the forward pass writes of one head.
struct Results<'a> {
    y: RowsMut<'a>,
    norm: &'a mut [f32],
    state: &'a mut [f32],
    total: &'a mut [f32],
}

/// Forward pass.
pub(super) fn forward<const MAP: usize>(a: Forward<'_, f32>) {
    let Dims { b, n, h, e } = a.dims;
    let (of, qkv, eps) = (Heads { b, n, h, e }, a.qkv, a.params.eps);
    let sums = a.state.par_chunks_mut(h * e * e).zip(a.total.par_chunks_mut(h * e));
    let results = a.y.par_chunks_mut(n * h * e).zip(a.norm.par_chunks_mut(h * n));
    results.zip(sums).enumerate().for_each(|(sample, ((y, norm), (state, total)))| {
        let sums = state.chunks_exact_mut(e * e).zip(total.chunks_exact_mut(e));
        let rows = split_parts::<1>(y, h, e).into_iter().zip(norm.chunks_exact_mut(n));
        let results = rows.zip(sums).map(|(([y], norm), (state, total))| Results { y, norm, state, total });
        for_heads(b, &mut results.collect::<Vec<_>>(), |head, to| {
            head_forward::<MAP>(packed(qkv, of, sample, head), eps, to);
        });
    });
}

fn head_forward<const MAP: usize>([q, k, v]: [Rows<'_>; 3], eps: f32, to: &mut Results<'_>) {
    let e = q.width;
    to.state.fill(0.0);
    to.total.fill(0.0);
    with_scratch([e, e], |[phi_q, phi_k]| {
        for (i, y) in to.y.iter_mut().enumerate() {
            let (q, k, v, y) = (q.row(i), k.row(i), &v.row(i)[..e], &mut y[..e]);
            vectorised(
                #[inline(always)]
                || {
                    for d in 0..e {
                        phi_q[d] = phi::<MAP>(q[d]);
                        phi_k[d] = phi::<MAP>(k[d]);
                        to.total[d] += phi_k[d];
                    }
                    y.fill(0.0);
                    for (d, state) in to.state.chunks_exact_mut(e).enumerate() {
                        for c in 0..e {
                            state[c] = phi_k[d].mul_add(v[c], state[c]);
                            y[c] = phi_q[d].mul_add(state[c], y[c]);
                        }
                    }
                    to.norm[i] = sum_by(e, |d| phi_q[d] * to.total[d]) + eps;
                    let inverse = 1.0 / to.norm[i];
                    y.iter_mut().for_each(|y| *y *= inverse);
                },
            );
        }
    });
}

/// Backward pass.
pub(super) fn backward<const MAP: usize>(a: Backward<'_, f32>) {
    let Some(dqkv) = a.dqkv else { return };
    let Dims { b, n, h, e } = a.dims;
    let of = Heads { b, n, h, e };
    dqkv.par_chunks_mut(n * 3 * h * e).enumerate().for_each(|(sample, dqkv)| {
        for_heads(b, &mut split_parts::<3>(dqkv, h, e), |head, grads| {
            let [y, dy] = [a.y, a.dy].map(|x| of_head(x, of, sample, head));
            let norm = &a.norm[(sample * h + head) * n..][..n];
            head_backward::<MAP>(packed(a.qkv, of, sample, head), [y, dy], norm, grads);
        });
    });
}

/// See the oracle for the formulas: the state grows with the tokens for dq, then its gradient against them for dk and dv.
fn head_backward<const MAP: usize>(
    [q, k, v]: [Rows<'_>; 3],
    [y, dy]: [Rows<'_>; 2],
    norm: &[f32],
    [dq, dk, dv]: &mut [RowsMut<'_>; 3],
) {
    let (n, e) = (norm.len(), q.width);
    with_scratch([e * e, e, n * e, n, e, e], |[state, total, g, fall, phi_q, phi_k]| {
        state.fill(0.0);
        total.fill(0.0);
        for i in 0..n {
            let (q, k, v, g) = (q.row(i), k.row(i), &v.row(i)[..e], &mut g[i * e..][..e]);
            let (y, dy, dq) = (y.row(i), dy.row(i), &mut dq[i][..e]);
            vectorised(
                #[inline(always)]
                || {
                    let inverse = 1.0 / norm[i];
                    for d in 0..e {
                        g[d] = dy[d] * inverse;
                        phi_k[d] = phi::<MAP>(k[d]);
                        total[d] += phi_k[d];
                    }
                    fall[i] = -sum_by(e, |d| g[d] * y[d]);
                    for (d, state) in state.chunks_exact_mut(e).enumerate() {
                        for c in 0..e {
                            state[c] = phi_k[d].mul_add(v[c], state[c]);
                        }
                        let sum = sum_by(e, |c| state[c] * g[c]);
                        dq[d] = fall[i].mul_add(total[d], sum) * slope::<MAP>(q[d]);
                    }
                },
            );
        }
        state.fill(0.0);
        total.fill(0.0);
        for j in (0..n).rev() {
            let (q, k, v, g) = (q.row(j), k.row(j), &v.row(j)[..e], &g[j * e..][..e]);
            let (dk, dv) = (&mut dk[j][..e], &mut dv[j][..e]);
            vectorised(
                #[inline(always)]
                || {
                    for d in 0..e {
                        phi_q[d] = phi::<MAP>(q[d]);
                        phi_k[d] = phi::<MAP>(k[d]);
                        total[d] = phi_q[d].mul_add(fall[j], total[d]);
                    }
                    dv.fill(0.0);
                    for (d, state) in state.chunks_exact_mut(e).enumerate() {
                        for c in 0..e {
                            state[c] = phi_q[d].mul_add(g[c], state[c]);
                            dv[c] = phi_k[d].mul_add(state[c], dv[c]);
                        }
                        dk[d] = (sum_by(e, |c| state[c] * v[c]) + total[d]) * slope::<MAP>(k[d]);
                    }
                },
            );
        }
    });
}
