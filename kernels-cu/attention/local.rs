//! Softmax attention of one head where every query has a few keys of its own.
//!
//! One query at a time, vectors along the head width: with some ten keys a query, tiles over queries and keys would
//! compute several scores for each one that counts. Rows are copied to whole vectors first, by blocks of queries with
//! the keys that these read.

use super::dense::{self, Saved, deltas, exponentials, score_gradients};
use super::layout::{self, RowsMut, TASK, blocks, of_head, packed, sample, touch, widen, with_scratch, write};
use super::tiles::{Rows, padded};
use crate::generated::attention::Dims;
use crate::simd::arch;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// The keys of a query: `runs` runs of `run` consecutive tokens, their first tokens `stride` apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keys {
    /// First token of the first run.
    pub first: usize,
    /// Tokens of a run.
    pub run: usize,
    /// Runs.
    pub runs: usize,
    /// Tokens from run to run.
    pub stride: usize,
}

impl Keys {
    fn count(&self) -> usize {
        self.run * self.runs
    }

    fn end(&self) -> usize {
        self.first + (self.runs - 1) * self.stride + self.run
    }

    /// The keys run by run, as (place in the list of keys, first token less `origin`).
    #[inline(always)]
    fn each(self, origin: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..self.runs).map(move |i| (i * self.run, self.first + i * self.stride - origin))
    }
}

/// Forward pass of all heads of a packed projection; `keys` is asked for every query.
pub fn attend(
    dims: Dims,
    scale: f32,
    keys: impl Fn(usize) -> Keys + Sync,
    qkv: &[f32],
    y: &mut [f32],
    lse: &mut [f32],
) {
    let whole = leave_nothing_out(dims, &keys);
    let begin = |index| touch(sample(qkv, dims.b, index));
    layout::forward(dims, y, lse, begin, |index, head, queries, y, lse| {
        let [q, k, v] = packed(qkv, dims, index, head);
        if whole {
            dense::forward([q.from(queries.start), k, v], dims.n, scale, y, lse);
        } else {
            forward([q, k, v], queries, &keys, scale, y, lse);
        }
    });
}

/// Backward pass of [`attend`]; `given` is qkv, y, dy and lse.
pub fn attend_backward(
    dims: Dims,
    scale: f32,
    keys: impl Fn(usize) -> Keys + Sync,
    [qkv, y, dy, lse]: [&[f32]; 4],
    dqkv: &mut [f32],
) {
    let whole = leave_nothing_out(dims, &keys);
    let begin = |index| [qkv, y, dy].into_iter().for_each(|x| touch(sample(x, dims.b, index)));
    layout::backward(dims, dqkv, begin, |index, head, grads| {
        let [y, dy] = [y, dy].map(|x| of_head(x, dims, index, head));
        let saved = Saved { y, dy, lse: &lse[(index * dims.h + head) * dims.n..][..dims.n] };
        let inputs = packed(qkv, dims, index, head);
        if whole {
            dense::backward(inputs, dims.n, scale, saved, grads);
        } else {
            backward(inputs, &keys, scale, saved, grads);
        }
    });
}

/// Whether every query sees every token: then tiles over queries and keys compute nothing in vain.
fn leave_nothing_out(dims: Dims, keys: &impl Fn(usize) -> Keys) -> bool {
    (0..dims.n).all(|query| keys(query).count() == dims.n)
}

/// The tokens that some queries read.
fn span(queries: Range<usize>, keys: &impl Fn(usize) -> Keys) -> Range<usize> {
    let ends = |range: Range<usize>, keys: Keys| range.start.min(keys.first)..range.end.max(keys.end());
    queries.map(keys).fold(usize::MAX..0, ends)
}

/// Blocks of queries, long enough that most rows copied for a block are its own.
fn query_blocks(queries: Range<usize>, keys: &impl Fn(usize) -> Keys) -> impl Iterator<Item = Range<usize>> {
    let reach = queries.clone().map(|query| keys(query).end() - keys(query).first).max().unwrap_or(1);
    blocks(queries.len(), TASK.max(reach), 1).map(move |(at, rows)| queries.start + at..queries.start + at + rows)
}

/// Most tokens that a block of queries reads, and most keys of a query.
fn most(queries: Range<usize>, keys: &impl Fn(usize) -> Keys) -> [usize; 3] {
    let blocks = || query_blocks(queries.clone(), keys);
    [
        blocks().map(|block| block.len()).max().unwrap_or(0),
        blocks().map(|block| span(block, keys).len()).max().unwrap_or(0),
        queries.clone().map(|query| keys(query).count()).max().unwrap_or(0),
    ]
}

/// The `queries` of one head; `y` has their rows one after the other, `lse` one number for each.
fn forward(
    [q, k, v]: [Rows<'_>; 3],
    queries: Range<usize>,
    keys: &impl Fn(usize) -> Keys,
    scale: f32,
    y: &mut [f32],
    lse: &mut [f32],
) {
    let (start, e) = (queries.start, q.width);
    let (wide, [rows, tokens, most]) = (padded(e), most(queries.clone(), keys));
    with_scratch([rows * wide, tokens * wide, tokens * wide, padded(most), wide], |[qs, ks, vs, scores, sum]| {
        for block in query_blocks(queries, keys) {
            let span = span(block.clone(), keys);
            let task = Queries::new([q, k, v], &block, &span, scale);
            let (y, lse) = (&mut y[(block.start - start) * e..], &mut lse[block.start - start..][..block.len()]);
            arch().dispatch(Forward { task, block, keys, qs, ks, vs, scores, sum, y, lse });
        }
    });
}

/// Rows of a block of queries and of the tokens that it reads.
struct Queries<'a> {
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    /// Token of the first row of `k` and `v`.
    origin: usize,
    /// Rows of `k` and `v`.
    tokens: usize,
    scale: f32,
}

impl<'a> Queries<'a> {
    fn new([q, k, v]: [Rows<'a>; 3], block: &Range<usize>, span: &Range<usize>, scale: f32) -> Self {
        let [q, k, v] = [q.from(block.start), k.from(span.start), v.from(span.start)];
        Queries { q, k, v, origin: span.start, tokens: span.len(), scale }
    }
}

struct Forward<'a, K> {
    task: Queries<'a>,
    block: Range<usize>,
    keys: &'a K,
    qs: &'a mut [f32],
    ks: &'a mut [f32],
    vs: &'a mut [f32],
    scores: &'a mut [f32],
    sum: &'a mut [f32],
    y: &'a mut [f32],
    lse: &'a mut [f32],
}

impl<K: Fn(usize) -> Keys> WithSimd for Forward<'_, K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Forward { task, block, keys, qs, ks, vs, scores, sum, y, lse } = self;
        let (e, wide) = (task.q.width, sum.len());
        widen(task.q, block.len(), qs);
        widen(task.k, task.tokens, ks);
        widen(task.v, task.tokens, vs);
        for (i, query) in block.enumerate() {
            let keys = keys(query);
            let (count, q) = (keys.count(), &qs[i * wide..][..wide]);
            let scores = &mut scores[..padded(count)];
            scores[count..].fill(f32::NEG_INFINITY);
            for (place, token) in keys.each(task.origin) {
                dots(simd, q, &ks[token * wide..], &mut scores[place..][..keys.run]);
            }
            let (max, total) = exponentials(scores, task.scale, f32::NEG_INFINITY);
            sum.fill(0.0);
            for (place, token) in keys.each(task.origin) {
                combine(simd, &scores[place..][..keys.run], &vs[token * wide..], sum);
            }
            let (y, inverse) = (&mut y[i * e..][..e], 1.0 / total);
            for j in 0..e {
                y[j] = sum[j] * inverse;
            }
            lse[i] = max + total.ln();
        }
    }
}

/// Gradients of queries, keys and values of one head with as many tokens as `saved` has rows.
fn backward(
    [q, k, v]: [Rows<'_>; 3],
    keys: &impl Fn(usize) -> Keys,
    scale: f32,
    saved: Saved<'_>,
    [dq, dk, dv]: &mut [RowsMut<'_>; 3],
) {
    let n = saved.lse.len();
    let (wide, [rows, tokens, most]) = (padded(q.width), most(0..n, keys));
    let (own, read, scores) = (rows * wide, tokens * wide, padded(most));
    let lengths = [own, own, own, read, read, scores, scores, n * wide, n * wide, n];
    with_scratch(lengths, |[qs, dys, sum_q, ks, vs, p, ds, sum_k, sum_v, delta]| {
        deltas(saved, delta);
        sum_k.fill(0.0);
        sum_v.fill(0.0);
        for block in query_blocks(0..n, keys) {
            let span = span(block.clone(), keys);
            let task = Queries::new([q, k, v], &block, &span, scale);
            let dq = &mut dq[block.clone()];
            let seen = span.start * wide..span.end * wide;
            let (sum_k, sum_v) = (&mut sum_k[seen.clone()], &mut sum_v[seen]);
            let (dy, lse, delta) = (saved.dy.from(block.start), &saved.lse[block.clone()], &delta[block.clone()]);
            arch().dispatch(Backward {
                task,
                block,
                keys,
                dy,
                lse,
                delta,
                qs,
                dys,
                ks,
                vs,
                p,
                ds,
                sum_q,
                sum_k,
                sum_v,
            });
            write(sum_q, wide, dq);
        }
        write(sum_k, wide, dk);
        write(sum_v, wide, dv);
    });
}

struct Backward<'a, K> {
    task: Queries<'a>,
    block: Range<usize>,
    keys: &'a K,
    dy: Rows<'a>,
    lse: &'a [f32],
    delta: &'a [f32],
    qs: &'a mut [f32],
    dys: &'a mut [f32],
    ks: &'a mut [f32],
    vs: &'a mut [f32],
    p: &'a mut [f32],
    ds: &'a mut [f32],
    sum_q: &'a mut [f32],
    sum_k: &'a mut [f32],
    sum_v: &'a mut [f32],
}

impl<K: Fn(usize) -> Keys> WithSimd for Backward<'_, K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Backward { task, block, keys, dy, lse, delta, qs, dys, ks, vs, p, ds, sum_q, sum_k, sum_v } = self;
        let wide = padded(task.q.width);
        widen(task.q, block.len(), qs);
        widen(dy, block.len(), dys);
        widen(task.k, task.tokens, ks);
        widen(task.v, task.tokens, vs);
        for (i, query) in block.enumerate() {
            let keys = keys(query);
            let (count, rows) = (keys.count(), i * wide..(i + 1) * wide);
            let (q, dy, sum_q) = (&qs[rows.clone()], &dys[rows.clone()], &mut sum_q[rows]);
            let (p, ds) = (&mut p[..padded(count)], &mut ds[..padded(count)]);
            // Any finite number: the padding is never read again.
            p[count..].fill(0.0);
            ds[count..].fill(0.0);
            for (place, token) in keys.each(task.origin) {
                dots(simd, q, &ks[token * wide..], &mut p[place..][..keys.run]);
                dots(simd, dy, &vs[token * wide..], &mut ds[place..][..keys.run]);
            }
            score_gradients(p, ds, task.scale, lse[i], delta[i]);
            sum_q.fill(0.0);
            for (place, token) in keys.each(task.origin) {
                let (p, ds) = (&p[place..][..keys.run], &ds[place..][..keys.run]);
                combine(simd, ds, &ks[token * wide..], sum_q);
                spread(simd, ds, q, &mut sum_k[token * wide..]);
                spread(simd, p, dy, &mut sum_v[token * wide..]);
            }
        }
    }
}

/// `out[c] = x · row c` for consecutive rows as long as `x`.
#[inline(always)]
fn dots<S: Simd>(simd: S, x: &[f32], rows: &[f32], out: &mut [f32]) {
    let mut c = 0;
    while c < out.len() {
        let (rows, out) = (&rows[c * x.len()..], &mut out[c..]);
        c += match out.len() {
            8.. => dots_of::<S, 8>(simd, x, rows, out),
            4.. => dots_of::<S, 4>(simd, x, rows, out),
            2.. => dots_of::<S, 2>(simd, x, rows, out),
            _ => dots_of::<S, 1>(simd, x, rows, out),
        };
    }
}

#[inline(always)]
fn dots_of<S: Simd, const G: usize>(simd: S, x: &[f32], rows: &[f32], out: &mut [f32]) -> usize {
    let (x, _) = S::as_simd_f32s(x);
    let (rows, _) = S::as_simd_f32s(&rows[..G * x.len() * S::F32_LANES]);
    let mut sum = [simd.splat_f32s(0.0); G];
    for i in 0..x.len() {
        for g in 0..G {
            sum[g] = simd.mul_add_f32s(x[i], rows[g * x.len() + i], sum[g]);
        }
    }
    for g in 0..G {
        out[g] = simd.reduce_sum_f32s(sum[g]);
    }
    G
}

/// `sum += Σ_c weights[c] · row c`, in the order of the rows.
#[inline(always)]
fn combine<S: Simd>(simd: S, weights: &[f32], rows: &[f32], sum: &mut [f32]) {
    let mut c = 0;
    while c < weights.len() {
        let (weights, rows) = (&weights[c..], &rows[c * sum.len()..]);
        c += match weights.len() {
            4.. => combine_of::<S, 4>(simd, weights, rows, sum),
            2.. => combine_of::<S, 2>(simd, weights, rows, sum),
            _ => combine_of::<S, 1>(simd, weights, rows, sum),
        };
    }
}

#[inline(always)]
fn combine_of<S: Simd, const G: usize>(simd: S, weights: &[f32], rows: &[f32], sum: &mut [f32]) -> usize {
    let (sum, _) = S::as_mut_simd_f32s(sum);
    let (rows, _) = S::as_simd_f32s(&rows[..G * sum.len() * S::F32_LANES]);
    let mut weight = [simd.splat_f32s(0.0); G];
    for g in 0..G {
        weight[g] = simd.splat_f32s(weights[g]);
    }
    for i in 0..sum.len() {
        for g in 0..G {
            sum[i] = simd.mul_add_f32s(weight[g], rows[g * sum.len() + i], sum[i]);
        }
    }
    G
}

/// `row c += weights[c] · x` for consecutive rows as long as `x`.
#[inline(always)]
fn spread<S: Simd>(simd: S, weights: &[f32], x: &[f32], rows: &mut [f32]) {
    let (x, _) = S::as_simd_f32s(x);
    let (rows, _) = S::as_mut_simd_f32s(&mut rows[..weights.len() * x.len() * S::F32_LANES]);
    for (weight, row) in weights.iter().zip(rows.chunks_exact_mut(x.len())) {
        let weight = simd.splat_f32s(*weight);
        for i in 0..x.len() {
            row[i] = simd.mul_add_f32s(weight, x[i], row[i]);
        }
    }
}
