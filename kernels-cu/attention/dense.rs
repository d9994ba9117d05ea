//! Softmax attention of one head over all of its keys: keys by blocks with the online softmax, queries by blocks.
//!
//! Every query is summed in the same order whatever the split over threads, so results do not depend on it.

use super::layout::{RowsMut, blocks, with_scratch, write};
use super::tiles::{Rows, Sum, TILE, WIDTH, copy, pack, pack_transposed, padded, product, product_transposed};
use crate::simd::{exp_decay, reduce, sum_by, vectorised};

/// Most keys of a block: keys, values and scores of a block stay in the second-level cache.
const KEYS: usize = 256;
/// Widest head for which so many keys do.
const WIDTH_OF_KEYS: usize = 128;
/// Most queries of a block.
const QUERIES: usize = 60;

/// A score that does not count. Finite, so that a block of nothing else makes no NaN: what it adds is lost in rounding
/// as soon as a score that counts comes.
pub const HIDDEN: f32 = -1e30;

/// Most keys of a block for a head of width `e`; the order of the sums of a query follows from it.
fn block_of_keys(e: usize) -> usize {
    match e {
        ..=WIDTH_OF_KEYS => KEYS,
        _ => (KEYS * WIDTH_OF_KEYS / e).max(WIDTH).next_multiple_of(WIDTH),
    }
}

/// For [`forward`] and [`backward`] where every key counts.
pub fn all(_query: usize, _first: usize, _scores: &mut [f32]) {}

/// Queries `q` (as many as `lse`) over the first `keys` keys of one head; `y` has their rows one after the other.
/// Without a key, `y` is zero and `lse` −∞. `hide` is shown the scores of every query, as (row of `q`, first key,
/// scores), and sets to [`HIDDEN`] what must not count.
pub fn forward(
    [q, k, v]: [Rows<'_>; 3],
    keys: usize,
    hide: impl Fn(usize, usize, &mut [f32]),
    scale: f32,
    y: &mut [f32],
    lse: &mut [f32],
) {
    let (queries, e) = (lse.len(), q.width);
    if keys == 0 {
        y.fill(0.0);
        lse.fill(f32::NEG_INFINITY);
        return;
    }
    let most = block_of_keys(e);
    let (wide_e, wide_keys) = (padded(e), padded(keys.min(most)));
    // The queries are read once for every block of keys. Where they lie far apart, each on a page of its own, they are
    // drawn together first.
    let gathered = if keys > most && q.stride > e { queries * e } else { 0 };
    let lengths =
        [e * wide_keys, wide_keys * wide_e, QUERIES * wide_keys, queries * wide_e, queries, queries, gathered];
    with_scratch(lengths, |[packed_k, packed_v, scores, sums, max, total, near]| {
        max.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        near.chunks_exact_mut(e).enumerate().for_each(|(i, row)| copy(q.row(i), row));
        let q = if gathered > 0 { Rows { data: near, stride: e, width: e } } else { q };
        for (first, count) in blocks(keys, most, WIDTH) {
            let wide = padded(count);
            pack_transposed(k.from(first), count, packed_k);
            pack(v.from(first), count, packed_v);
            for (at, rows) in blocks(queries, QUERIES, TILE) {
                let sums = &mut sums[at * wide_e..][..rows * wide_e];
                product(q.from(at), rows, packed_k, count, Sum { data: scores, stride: wide, add: false });
                vectorised(
                    #[inline(always)]
                    || {
                        for r in 0..rows {
                            let row = &mut scores[r * wide..][..wide];
                            hide(at + r, first, &mut row[..count]);
                            row[count..].fill(f32::NEG_INFINITY);
                            let old = max[at + r];
                            let (new, sum) = exponentials(row, scale, old);
                            if first > 0 {
                                let keep = exp_decay(old - new);
                                total[at + r] = total[at + r].mul_add(keep, sum);
                                sums[r * wide_e..][..wide_e].iter_mut().for_each(|s| *s *= keep);
                            } else {
                                total[at + r] = sum;
                            }
                            max[at + r] = new;
                        }
                    },
                );
                let weights = Rows { data: scores, stride: wide, width: count };
                product(weights, rows, packed_v, e, Sum { data: sums, stride: wide_e, add: first > 0 });
            }
        }
        vectorised(
            #[inline(always)]
            || {
                for (i, row) in y.chunks_exact_mut(e).enumerate() {
                    let (sum, inverse) = (&sums[i * wide_e..][..e], 1.0 / total[i]);
                    for j in 0..e {
                        row[j] = sum[j] * inverse;
                    }
                }
            },
        );
        for i in 0..lse.len() {
            lse[i] = max[i] + total[i].ln();
        }
    });
}

/// Turns scores into exp(scale·score − max), max over `before` and the row; returns the maximum and the sum.
#[inline(always)]
pub fn exponentials(row: &mut [f32], scale: f32, before: f32) -> (f32, f32) {
    let mut max = [before; WIDTH];
    for x in row.chunks_exact_mut(WIDTH) {
        for lane in 0..WIDTH {
            // What is hidden stays so whatever the scale; a NaN stays one.
            x[lane] = if x[lane] <= HIDDEN { x[lane] } else { x[lane] * scale };
            max[lane] = if x[lane] > max[lane] { x[lane] } else { max[lane] };
        }
    }
    let max = maximum(max);
    let mut sum = [0.0f32; WIDTH];
    for x in row.chunks_exact_mut(WIDTH) {
        for lane in 0..WIDTH {
            x[lane] = exp_decay(x[lane] - max);
            sum[lane] += x[lane];
        }
    }
    (max, reduce(sum))
}

/// Largest lane, pairwise.
#[inline(always)]
fn maximum(mut lanes: [f32; WIDTH]) -> f32 {
    let mut half = WIDTH / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = if lanes[i + half] > lanes[i] { lanes[i + half] } else { lanes[i] };
        }
        half /= 2;
    }
    lanes[0]
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
/// is not computed, and keys and values that no query saw get zeros. `hide` is that of [`forward`].
pub fn backward(
    [q, k, v]: [Rows<'_>; 3],
    keys: usize,
    hide: impl Fn(usize, usize, &mut [f32]),
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
    let (wide_e, wide_keys) = (padded(e), padded(keys.min(KEYS)));
    let (all, block, tile) = (n * wide_e, wide_keys * wide_e, QUERIES * wide_keys);
    let lengths = [e * wide_keys, e * wide_keys, block, block, block, tile, tile, all, all, all, n];
    with_scratch(lengths, |[keys_t, values_t, packed_k, sum_k, sum_v, p, ds, queries, dys, sum_q, delta]| {
        for (at, rows) in blocks(n, QUERIES, TILE) {
            pack(q.from(at), rows, &mut queries[at * wide_e..]);
            pack(saved.dy.from(at), rows, &mut dys[at * wide_e..]);
        }
        deltas(saved, delta);
        for (first, count) in blocks(keys, KEYS, WIDTH) {
            let wide = padded(count);
            pack_transposed(k.from(first), count, keys_t);
            pack_transposed(v.from(first), count, values_t);
            pack(k.from(first), count, packed_k);
            for (at, rows) in blocks(n, QUERIES, TILE) {
                product(q.from(at), rows, keys_t, count, Sum { data: p, stride: wide, add: false });
                product(saved.dy.from(at), rows, values_t, count, Sum { data: ds, stride: wide, add: false });
                vectorised(
                    #[inline(always)]
                    || {
                        for r in 0..rows {
                            let (p, ds) = (&mut p[r * wide..][..wide], &mut ds[r * wide..][..wide]);
                            hide(at + r, first, &mut p[..count]);
                            score_gradients(p, ds, scale, saved.lse[at + r], delta[at + r]);
                        }
                    },
                );
                let (p, ds) =
                    (Rows { data: p, stride: wide, width: count }, Rows { data: ds, stride: wide, width: count });
                let (queries, dys) = (&queries[at * wide_e..], &dys[at * wide_e..]);
                let sum = |data, add| Sum { data, stride: wide_e, add };
                if !dv.is_empty() {
                    product_transposed(p, rows, dys, e, sum(sum_v, at > 0));
                }
                if !dk.is_empty() {
                    product_transposed(ds, rows, queries, e, sum(sum_k, at > 0));
                }
                if !dq.is_empty() {
                    product(ds, rows, packed_k, e, sum(&mut sum_q[at * wide_e..], first > 0));
                }
            }
            for (sum, rows) in [(&sum_k, &mut *dk), (&sum_v, &mut *dv)] {
                write(sum, wide_e, rows.get_mut(first..first + count).unwrap_or_default());
            }
        }
        write(sum_q, wide_e, dq);
    });
}

/// dy·y of every query: what the normalisation of the softmax takes from each of its score gradients.
pub fn deltas(saved: Saved<'_>, delta: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for i in 0..delta.len() {
                let (dy, y) = (saved.dy.row(i), saved.y.row(i));
                delta[i] = sum_by(y.len(), |j| dy[j] * y[j]);
            }
        },
    );
}

/// From scores in `p` and dy·v in `ds`: p = exp(scale·s − lse), ds = scale·p·(ds − delta).
#[inline(always)]
pub fn score_gradients(p: &mut [f32], ds: &mut [f32], scale: f32, lse: f32, delta: f32) {
    for i in 0..p.len() {
        p[i] = exp_decay(if p[i] <= HIDDEN { HIDDEN } else { p[i].mul_add(scale, -lse) });
        ds[i] = scale * p[i] * (ds[i] - delta);
    }
}
