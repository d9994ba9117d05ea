//! Softmax attention of one head over all of its keys: keys by blocks with the online softmax, queries by blocks.
//!
//! A few blocks of keys are packed at a time; queries go past all of them before the next ones are packed. Every query
//! is summed in the same order whatever the split over threads, so results do not depend on it.

use super::layout::{Out, RowsMut, blocks, with_scratch, write_times};
use super::panels::{copy_times, gather};
use super::softmax::{HIDDEN, Scores, exponentials, log_sum, score_gradients};
use super::tiles::{Rows, Sum, TILE, WIDTH, pack, pack_transposed, padded, product, product_transposed};
use crate::simd::{exp_weight, sum_pairs, vectorised};

/// Most keys of a block.
const KEYS: usize = 256;
/// Blocks of keys that are packed at a time: they and a block of queries stay in the second-level cache.
const ROUND: usize = 2;
/// Widest head for which so many keys do.
const WIDTH_OF_KEYS: usize = 128;
/// Between the scores of two queries, so that those of one key do not all meet at the same place of the cache.
const GAP: usize = WIDTH;
/// Most queries of a block.
const QUERIES: usize = 60;

/// Most keys of a block for a head of width `e`; the order of the sums of a query follows from it.
fn block_of_keys(e: usize) -> usize {
    match e {
        ..=WIDTH_OF_KEYS => KEYS,
        _ => (KEYS * WIDTH_OF_KEYS / e).max(WIDTH).next_multiple_of(WIDTH),
    }
}

/// Queries `q` (as many as `lse`) over the first `keys` keys of one head. Without a key, `y` is zero and `lse` −∞.
pub fn forward(
    [q, k, v]: [Rows<'_>; 3],
    keys: usize,
    mut scores: impl Scores,
    scale: f32,
    mut y: Out<'_>,
    lse: &mut [f32],
) {
    let (queries, e) = (lse.len(), q.width);
    if keys == 0 {
        y.fill(queries, 0.0);
        lse.fill(f32::NEG_INFINITY);
        return;
    }
    let most = block_of_keys(e);
    let (wide_e, wide_keys) = (padded(e), padded(keys.min(most)));
    let (of_k, of_v) = (e * wide_keys, wide_keys * wide_e);
    let parts = keys.div_ceil(most).min(ROUND);
    // Queries and their sums are kept for the next round where there is one, else for a block.
    let waits = keys > ROUND * most;
    let kept = if waits { queries } else { queries.min(QUERIES) };
    let lengths = [parts * of_k, parts * of_v, QUERIES * (wide_keys + GAP), kept * wide_e, kept, kept, kept * e];
    with_scratch(lengths, |[packed_k, packed_v, weights, sums, max, total, near]| {
        for (index, round) in rounds(keys, most).enumerate() {
            for (part, (first, count)) in round.clone().enumerate() {
                pack_transposed(k.from(first), count, &mut packed_k[part * of_k..]);
                pack(v.from(first), count, &mut packed_v[part * of_v..]);
            }
            for (at, rows) in blocks(queries, QUERIES, TILE) {
                let place = if waits { at } else { 0 };
                let sums = &mut sums[place * wide_e..][..rows * wide_e];
                let (max, total) = (&mut max[place..][..rows], &mut total[place..][..rows]);
                let near = &mut near[place * e..][..rows * e];
                if index == 0 {
                    gather(q.from(at), rows, near);
                    max.fill(f32::NEG_INFINITY);
                }
                let near = Rows { data: near, stride: e, width: e };
                for (part, (first, count)) in round.clone().enumerate() {
                    let (wide, stride) = (padded(count), padded(count) + GAP);
                    let (packed_k, packed_v) = (&packed_k[part * of_k..], &packed_v[part * of_v..]);
                    product(near, rows, packed_k, count, Sum { data: weights, stride, add: false });
                    vectorised(
                        #[inline(always)]
                        || {
                            for r in 0..rows {
                                let row = &mut weights[r * stride..][..wide];
                                scores.alter(at + r, first, &mut row[..count]);
                                let (new, sum) = exponentials(row, count, scale, max[r]);
                                if first > 0 {
                                    let keep = exp_weight(max[r] - new);
                                    total[r] = total[r].mul_add(keep, sum);
                                    sums[r * wide_e..][..wide_e].iter_mut().for_each(|s| *s *= keep);
                                } else {
                                    total[r] = sum;
                                }
                                max[r] = new;
                            }
                        },
                    );
                    let weights = Rows { data: weights, stride, width: count };
                    product(weights, rows, packed_v, e, Sum { data: sums, stride: wide_e, add: first > 0 });
                }
                if is_last(index, keys, most) {
                    vectorised(
                        #[inline(always)]
                        || {
                            for r in 0..rows {
                                copy_times(&sums[r * wide_e..][..e], 1.0 / total[r], y.row(at + r));
                            }
                            for (lse, (max, total)) in lse[at..].iter_mut().zip(max.iter().zip(&*total)) {
                                *lse = log_sum(*max, *total);
                            }
                        },
                    );
                }
            }
        }
    });
}

/// Whether no key comes after a round.
fn is_last(round: usize, keys: usize, most: usize) -> bool {
    (round + 1) * ROUND * most >= keys
}

/// The blocks of keys by rounds.
fn rounds(keys: usize, most: usize) -> impl Iterator<Item = impl Iterator<Item = (usize, usize)> + Clone> {
    let count = blocks(keys, most, WIDTH).count();
    (0..count).step_by(ROUND).map(move |skipped| blocks(keys, most, WIDTH).skip(skipped).take(ROUND))
}

/// What the forward pass left of the queries of one head, and what came back for them.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// Output.
    pub y: Rows<'a>,
    /// Its gradient.
    pub dy: Rows<'a>,
    /// Log of the sum of the exponentials, one per query.
    pub lse: &'a [f32],
}

/// Gradients of the queries, and of the keys and values, of one head over its first `keys` keys; a list without rows
/// is not computed, and keys and values that no query saw get zeros.
pub fn backward(
    [q, k, v]: [Rows<'_>; 3],
    keys: usize,
    mut scores: impl Scores,
    scale: f32,
    saved: Saved<'_>,
    [dq, dk, dv]: &mut [RowsMut<'_>; 3],
) {
    let (n, e) = (saved.lse.len(), q.width);
    let unseen = dk.iter_mut().skip(keys).chain(dv.iter_mut().skip(keys));
    unseen.for_each(|row| row.fill(0.0));
    if keys == 0 {
        dq.iter_mut().for_each(|row| row.fill(0.0));
        return;
    }
    let most = block_of_keys(e);
    let (wide_e, wide_keys) = (padded(e), padded(keys.min(most)));
    let parts = keys.div_ceil(most).min(ROUND);
    let (turned, block, tile, few) = (e * wide_keys, wide_keys * wide_e, QUERIES * (wide_keys + GAP), QUERIES * wide_e);
    // The sums of a query wait for the next round where there is one.
    let waits = keys > ROUND * most;
    let all = if waits { n * wide_e } else { few };
    let [turned_all, block_all] = [parts * turned, parts * block];
    let lengths = [
        turned_all,
        turned_all,
        block_all,
        block_all,
        block_all,
        tile,
        tile,
        few,
        few,
        all,
        n,
        QUERIES * e,
        QUERIES * e,
    ];
    with_scratch(
        lengths,
        |[keys_t, values_t, packed_k, sum_k, sum_v, p, ds, queries, dys, sum_q, delta, near_q, near_dy]| {
            deltas(saved, delta);
            for (index, round) in rounds(keys, most).enumerate() {
                for (part, (first, count)) in round.clone().enumerate() {
                    pack_transposed(k.from(first), count, &mut keys_t[part * turned..]);
                    pack_transposed(v.from(first), count, &mut values_t[part * turned..]);
                    pack(k.from(first), count, &mut packed_k[part * block..]);
                }
                for (at, rows) in blocks(n, QUERIES, TILE) {
                    let near_q = gather(q.from(at), rows, near_q);
                    let near_dy = gather(saved.dy.from(at), rows, near_dy);
                    pack(near_q, rows, queries);
                    pack(near_dy, rows, dys);
                    let sum_q = &mut sum_q[if waits { at * wide_e } else { 0 }..][..rows * wide_e];
                    for (part, (first, count)) in round.clone().enumerate() {
                        let (wide, stride) = (padded(count), padded(count) + GAP);
                        let (keys_t, values_t) = (&keys_t[part * turned..], &values_t[part * turned..]);
                        product(near_q, rows, keys_t, count, Sum { data: p, stride, add: false });
                        product(near_dy, rows, values_t, count, Sum { data: ds, stride, add: false });
                        vectorised(
                            #[inline(always)]
                            || {
                                for r in 0..rows {
                                    let (p, ds) = (&mut p[r * stride..][..wide], &mut ds[r * stride..][..wide]);
                                    scores.alter(at + r, first, &mut p[..count]);
                                    p[count..].fill(HIDDEN);
                                    ds[count..].fill(0.0);
                                    score_gradients(p, ds, scale, saved.lse[at + r], delta[at + r]);
                                    scores.gradients(at + r, first, &ds[..count]);
                                }
                            },
                        );
                        let of_block = |data| Rows { data, stride, width: count };
                        let (p, ds) = (of_block(&p[..]), of_block(&ds[..]));
                        let sum = |data, add| Sum { data, stride: wide_e, add };
                        if !dv.is_empty() {
                            product_transposed(p, rows, dys, e, sum(&mut sum_v[part * block..], at > 0));
                        }
                        if !dk.is_empty() {
                            product_transposed(ds, rows, queries, e, sum(&mut sum_k[part * block..], at > 0));
                        }
                        if !dq.is_empty() {
                            product(ds, rows, &packed_k[part * block..], e, sum(&mut *sum_q, first > 0));
                        }
                    }
                    if is_last(index, keys, most) {
                        write_times(sum_q, wide_e, scale, dq.get_mut(at..at + rows).unwrap_or_default());
                    }
                }
                for (part, (first, count)) in round.enumerate() {
                    for (sum, factor, rows) in [(&*sum_k, scale, &mut *dk), (&*sum_v, 1.0, &mut *dv)] {
                        let rows = rows.get_mut(first..first + count).unwrap_or_default();
                        write_times(&sum[part * block..], wide_e, factor, rows);
                    }
                }
            }
        },
    );
}

/// dy·y of every query: what the normalisation of the softmax takes from each of its score gradients.
pub fn deltas(saved: Saved<'_>, delta: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for i in 0..delta.len() {
                let (dy, y) = (saved.dy.row(i), saved.y.row(i));
                delta[i] = sum_pairs(dy, y, |dy, y| dy * y);
            }
        },
    );
}
