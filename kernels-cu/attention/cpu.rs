//! CPU path: one head at a time in cache, keys by blocks with the online softmax, heads and query ranges over threads.
//!
//! Every query is summed in the same order whatever the split over threads, so results do not depend on it.

use super::tiles::{Rows, Sum, TILE, WIDTH, copy, pack, pack_transposed, padded, product, product_transposed};
use crate::generated::attention::{Backward, Dims, Forward};
use crate::simd::{exp_decay, reduce, sum_by, vectorised};
use rayon::prelude::*;
use std::cell::{Cell, RefCell};

/// Most keys of a block: keys, values and scores of a block stay in the second-level cache.
const KEYS: usize = 256;
/// Most queries of a block.
const QUERIES: usize = 60;
/// Queries of one task where heads alone are too few for the threads.
const TASK: usize = 192;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// Results by head, kept from call to call.
    static BY_HEAD: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Cuts this thread's scratch into pieces of the given lengths; contents are arbitrary.
pub(crate) fn with_scratch<const COUNT: usize>(lengths: [usize; COUNT], body: impl FnOnce([&mut [f32]; COUNT])) {
    SCRATCH.with_borrow_mut(|scratch| {
        let total = lengths.iter().sum();
        if scratch.len() < total {
            scratch.resize(total, 0.0);
        }
        let mut rest = &mut scratch[..];
        body(lengths.map(|length| rest.split_off_mut(..length).unwrap_or_default()));
    });
}

/// The blocks of `0..len`, as (start, length): at most `most` long, about even, whole steps but for the last.
fn blocks(len: usize, most: usize, step: usize) -> impl Iterator<Item = (usize, usize)> {
    let block = len.div_ceil(len.div_ceil(most)).next_multiple_of(step);
    (0..len).step_by(block).map(move |start| (start, block.min(len - start)))
}

/// Rows of one head in one part (q, k, v) of a sample's packed projection `[N, 3, H, E]`.
fn part<'a>(qkv: &'a [f32], dims: Dims, part: usize, head: usize) -> Rows<'a> {
    Rows { data: &qkv[(part * dims.h + head) * dims.e..], stride: 3 * dims.h * dims.e, width: dims.e }
}

/// Rows of one head in a sample's `[N, H, E]`.
fn of_head<'a>(x: &'a [f32], dims: Dims, head: usize) -> Rows<'a> {
    Rows { data: &x[head * dims.e..], stride: dims.h * dims.e, width: dims.e }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let dims @ Dims { b, n, h, e } = a.dims;
    let (qkv, scale) = (a.qkv, a.params.scale);
    let task = if b * h >= 2 * rayon::current_num_threads() { n } else { TASK };
    // [B, H, N, E]: every task writes one piece, and the rows are laid out as [B, N, H, E] afterwards. Taken out of its
    // cell, so that a call that this thread picks up while it waits finds an empty one.
    let mut by_head = BY_HEAD.take();
    if by_head.len() < a.y.len() {
        by_head.resize(a.y.len(), 0.0);
    }
    let results = &mut by_head[..b * h * n * e];
    results.par_chunks_mut(n * e).zip(a.lse.par_chunks_mut(n)).enumerate().for_each(|(index, (y, lse))| {
        let (sample, head) = (index / h, index % h);
        let qkv = &qkv[sample * n * 3 * h * e..][..n * 3 * h * e];
        y.par_chunks_mut(task * e).zip(lse.par_chunks_mut(task)).enumerate().for_each(|(i, (y, lse))| {
            let [q, k, v] = [0, 1, 2].map(|p| part(qkv, dims, p, head));
            head_forward(q.from(i * task), k, v, n, scale, y, lse);
        });
    });
    let results = &*results;
    a.y.par_chunks_mut(h * e).with_min_len(TASK).enumerate().for_each(|(row, y)| {
        let (sample, token) = (row / n, row % n);
        for (head, y) in y.chunks_exact_mut(e).enumerate() {
            y.copy_from_slice(&results[((sample * h + head) * n + token) * e..][..e]);
        }
    });
    BY_HEAD.set(by_head);
}

/// Queries `q` (as many as `lse`) over all `n` keys of one head; `y` has their rows one after the other.
fn head_forward(q: Rows<'_>, k: Rows<'_>, v: Rows<'_>, n: usize, scale: f32, y: &mut [f32], lse: &mut [f32]) {
    let (queries, e) = (lse.len(), q.width);
    let (wide_e, wide_keys) = (padded(e), padded(n.min(KEYS)));
    let lengths = [e * wide_keys, wide_keys * wide_e, QUERIES * wide_keys, queries * wide_e, queries, queries];
    with_scratch(lengths, |[keys, values, scores, sums, max, total]| {
        max.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        for (first, count) in blocks(n, KEYS, WIDTH) {
            let wide = padded(count);
            pack_transposed(k.from(first), count, keys);
            pack(v.from(first), count, values);
            for (at, rows) in blocks(queries, QUERIES, TILE) {
                let sums = &mut sums[at * wide_e..][..rows * wide_e];
                product(q.from(at), rows, keys, count, Sum { data: scores, stride: wide, add: false });
                vectorised(
                    #[inline(always)]
                    || {
                        for r in 0..rows {
                            let row = &mut scores[r * wide..][..wide];
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
                product(weights, rows, values, e, Sum { data: sums, stride: wide_e, add: first > 0 });
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
fn exponentials(row: &mut [f32], scale: f32, before: f32) -> (f32, f32) {
    let mut max = [before; WIDTH];
    for x in row.chunks_exact_mut(WIDTH) {
        for lane in 0..WIDTH {
            x[lane] *= scale;
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

/// Backward pass. Heads go over threads: each owns its rows of `dqkv`.
pub fn backward(a: Backward<'_, f32>) {
    let Some(dqkv) = a.dqkv else { return };
    let dims @ Dims { n, h, e, .. } = a.dims;
    let (qkv, y, dy, lse, scale) = (a.qkv, a.y, a.dy, a.lse, a.params.scale);
    dqkv.par_chunks_mut(n * 3 * h * e).enumerate().for_each(|(sample, dqkv)| {
        let qkv = &qkv[sample * n * 3 * h * e..][..n * 3 * h * e];
        let (y, dy) = (&y[sample * n * h * e..][..n * h * e], &dy[sample * n * h * e..][..n * h * e]);
        let mut heads: Vec<[Vec<&mut [f32]>; 3]> = (0..h).map(|_| [0; 3].map(|_| Vec::with_capacity(n))).collect();
        dqkv.chunks_mut(e).enumerate().for_each(|(i, row)| heads[i % h][i / h % 3].push(row));
        heads.par_iter_mut().enumerate().for_each(|(head, grads)| {
            let inputs = [0, 1, 2].map(|p| part(qkv, dims, p, head));
            let lse = &lse[(sample * h + head) * n..][..n];
            head_backward(inputs, of_head(y, dims, head), of_head(dy, dims, head), n, scale, lse, grads);
        });
    });
}

fn head_backward(
    [q, k, v]: [Rows<'_>; 3],
    y: Rows<'_>,
    dy: Rows<'_>,
    n: usize,
    scale: f32,
    lse: &[f32],
    [dq, dk, dv]: &mut [Vec<&mut [f32]>; 3],
) {
    let e = q.width;
    let (wide_e, wide_keys) = (padded(e), padded(n.min(KEYS)));
    let (all, block, tile) = (n * wide_e, wide_keys * wide_e, QUERIES * wide_keys);
    let lengths = [e * wide_keys, e * wide_keys, block, block, block, tile, tile, all, all, all, n];
    with_scratch(lengths, |[keys_t, values_t, keys, sum_k, sum_v, p, ds, queries, dys, sum_q, delta]| {
        for (at, rows) in blocks(n, QUERIES, TILE) {
            pack(q.from(at), rows, &mut queries[at * wide_e..]);
            pack(dy.from(at), rows, &mut dys[at * wide_e..]);
        }
        vectorised(
            #[inline(always)]
            || {
                for i in 0..n {
                    let (dy, y) = (dy.row(i), y.row(i));
                    delta[i] = sum_by(e, |j| dy[j] * y[j]);
                }
            },
        );
        for (first, count) in blocks(n, KEYS, WIDTH) {
            let wide = padded(count);
            pack_transposed(k.from(first), count, keys_t);
            pack_transposed(v.from(first), count, values_t);
            pack(k.from(first), count, keys);
            for (at, rows) in blocks(n, QUERIES, TILE) {
                product(q.from(at), rows, keys_t, count, Sum { data: p, stride: wide, add: false });
                product(dy.from(at), rows, values_t, count, Sum { data: ds, stride: wide, add: false });
                vectorised(
                    #[inline(always)]
                    || {
                        for r in 0..rows {
                            let (p, ds) = (&mut p[r * wide..][..wide], &mut ds[r * wide..][..wide]);
                            score_gradients(p, ds, scale, lse[at + r], delta[at + r]);
                        }
                    },
                );
                let (p, ds) =
                    (Rows { data: p, stride: wide, width: count }, Rows { data: ds, stride: wide, width: count });
                let (queries, dys) = (&queries[at * wide_e..], &dys[at * wide_e..]);
                let sum = |data, add| Sum { data, stride: wide_e, add };
                product_transposed(p, rows, dys, e, sum(sum_v, at > 0));
                product_transposed(ds, rows, queries, e, sum(sum_k, at > 0));
                product(ds, rows, keys, e, sum(&mut sum_q[at * wide_e..], first > 0));
            }
            write(sum_k, wide_e, &mut dk[first..first + count]);
            write(sum_v, wide_e, &mut dv[first..first + count]);
        }
        write(sum_q, wide_e, dq);
    });
}

/// Copies padded rows to where they belong.
fn write(from: &[f32], stride: usize, to: &mut [&mut [f32]]) {
    vectorised(
        #[inline(always)]
        || {
            for i in 0..to.len() {
                let to = &mut *to[i];
                copy(&from[i * stride..][..to.len()], to);
            }
        },
    );
}

/// From scores in `p` and dy·v in `ds`: p = exp(scale·s − lse), ds = scale·p·(ds − delta).
#[inline(always)]
fn score_gradients(p: &mut [f32], ds: &mut [f32], scale: f32, lse: f32, delta: f32) {
    for i in 0..p.len() {
        p[i] = exp_decay(p[i].mul_add(scale, -lse));
        ds[i] = scale * p[i] * (ds[i] - delta);
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::Tier;
    use crate::check::{Fill, Tolerance, compare, draw_f32};
    use crate::generated::attention::CASES;

    #[test]
    fn agrees_with_the_oracle() {
        for case in CASES.iter().filter(|case| case.tier == Tier::Tiny) {
            let (dims @ Dims { b, n, h, e }, params) = (case.dims, case.params);
            let qkv = draw_f32(case.name, "qkv", b * n * 3 * h * e, Fill::Normal);
            let dy = draw_f32(case.name, "dy", b * n * h * e, Fill::Normal);
            let run = |forward: fn(Forward<'_, f32>), backward: fn(Backward<'_, f32>)| {
                let (mut y, mut lse) = (vec![f32::NAN; b * n * h * e], vec![f32::NAN; b * h * n]);
                let mut dqkv = vec![f32::NAN; qkv.len()];
                forward(Forward { dims, params, qkv: &qkv, y: &mut y, lse: &mut lse });
                backward(Backward { dims, params, dy: &dy, qkv: &qkv, y: &y, lse: &lse, dqkv: Some(&mut dqkv) });
                [("y", y), ("lse", lse), ("dqkv", dqkv)]
            };
            let (got, want) = (run(forward, backward), run(reference::forward, reference::backward));
            for ((name, got), (_, want)) in got.iter().zip(&want) {
                let result = compare(got, want, Tolerance::F32);
                assert!(result.pass, "{} {name}: {result:?}", case.name);
            }
        }
    }
}
