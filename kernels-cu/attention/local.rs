//! Softmax attention of one head where every query has a few keys of its own.
//!
//! One query at a time, vectors along the head width: with some ten keys a query, tiles over queries and keys would
//! compute several scores for each one that counts. Rows are copied to whole vectors first, by blocks of queries with
//! the keys that these read; within a block, a group of queries goes over one run of keys after the other, which
//! keeps these in the first-level cache. Where queries see at least half of all tokens, the tiles win, and hide the rest.

use super::dense::{self, Saved, deltas};
use super::layout::{
    self, Out, RowsMut, TASK, blocks, of_head, packed, sample, touch, widen, with_scratch, write, write_times,
};
use super::softmax::{All, HIDDEN, USUAL, exponentials, log_sum, score_gradients};
use super::tiles::{Rows, copy, padded};
use crate::generated::attention::Dims;
use crate::simd::arch;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Queries of a group.
const GROUP: usize = 16;

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

    /// Run `index` as (place in the list of keys, first token less `origin`).
    #[inline(always)]
    fn at(&self, index: usize, origin: usize) -> (usize, usize) {
        (index * self.run, self.first + index * self.stride - origin)
    }

    /// Hides the scores of all other tokens; `scores` are those of the tokens from `first` on.
    #[inline(always)]
    fn hide_others(&self, first: usize, scores: &mut [f32]) {
        let mut shown = 0;
        for index in 0..self.runs {
            let (_, token) = self.at(index, 0);
            let [start, end] = [token, token + self.run].map(|t| t.saturating_sub(first).min(scores.len()));
            scores[shown..start].fill(HIDDEN);
            shown = end;
        }
        scores[shown..].fill(HIDDEN);
    }
}

/// Which keys the queries have.
pub trait Neighbours: Copy + Sync {
    /// The keys of a query; every query has as many runs.
    fn keys(&self, query: usize) -> Keys;

    /// Tokens among which all keys of some consecutive queries are.
    fn span(&self, queries: Range<usize>) -> Range<usize>;

    /// Most keys of a query.
    fn most(&self) -> usize;
}

/// Forward pass of all heads of a packed projection.
pub fn attend(dims: Dims, scale: f32, keys: impl Neighbours, qkv: &[f32], y: &mut [f32], lse: &mut [f32]) {
    let (all, tiles) = (sees_all(dims, keys), tiles_win(dims, scale, keys));
    let begin = |index| touch(sample(qkv, dims.b, index));
    layout::forward(dims, y, lse, begin, |index, head, queries, y, lse| {
        let [q, k, v] = packed(qkv, dims, index, head);
        let (tile, start) = ([q.from(queries.start), k, v], queries.start);
        let hide = |row, first, scores: &mut [f32]| keys.keys(start + row).hide_others(first, scores);
        match (all, tiles) {
            (true, _) => dense::forward(tile, dims.n, All, scale, y, lse),
            (_, true) => dense::forward(tile, dims.n, hide, scale, y, lse),
            _ => forward([q, k, v], queries, keys, scale, y, lse),
        }
    });
}

/// Backward pass of [`attend`]; `given` is qkv, y, dy and lse.
pub fn attend_backward(
    dims: Dims,
    scale: f32,
    keys: impl Neighbours,
    [qkv, y, dy, lse]: [&[f32]; 4],
    dqkv: &mut [f32],
) {
    let (all, tiles) = (sees_all(dims, keys), tiles_win(dims, scale, keys));
    let begin = |index| [qkv, y, dy].into_iter().for_each(|x| touch(sample(x, dims.b, index)));
    layout::backward(dims, dqkv, begin, |index, head, grads| {
        let [y, dy] = [y, dy].map(|x| of_head(x, dims, index, head));
        let saved = Saved { y, dy, lse: &lse[(index * dims.h + head) * dims.n..][..dims.n] };
        let inputs = packed(qkv, dims, index, head);
        let hide = |query, first, scores: &mut [f32]| keys.keys(query).hide_others(first, scores);
        match (all, tiles) {
            (true, _) => dense::backward(inputs, dims.n, All, scale, saved, grads),
            (_, true) => dense::backward(inputs, dims.n, hide, scale, saved, grads),
            _ => backward(inputs, keys, scale, saved, grads),
        }
    });
}

/// Whether tiles over all tokens are the faster way: with a scale at which hidden scores stay far below the others.
fn tiles_win(dims: Dims, scale: f32, keys: impl Neighbours) -> bool {
    2 * keys.most() >= dims.n && USUAL.contains(&scale)
}

/// Whether every query sees every token.
fn sees_all(dims: Dims, keys: impl Neighbours) -> bool {
    (0..dims.n).all(|query| keys.keys(query).count() == dims.n)
}

/// Blocks of queries, long enough that most rows copied for a block are its own.
fn query_blocks(queries: Range<usize>, keys: impl Neighbours) -> impl Iterator<Item = Range<usize>> {
    let reach = keys.span(queries.start..queries.start + 1).len();
    blocks(queries.len(), TASK.max(reach), 1).map(move |(at, rows)| queries.start + at..queries.start + at + rows)
}

/// Most queries of a block, and most tokens that one reads.
fn most(queries: Range<usize>, keys: impl Neighbours) -> [usize; 2] {
    let sizes = query_blocks(queries, keys).map(|block| [block.len(), keys.span(block).len()]);
    sizes.fold([0, 0], |[rows, tokens], [r, t]| [rows.max(r), tokens.max(t)])
}

/// The `queries` of one head; `lse` has one number for each.
fn forward(
    [q, k, v]: [Rows<'_>; 3],
    queries: Range<usize>,
    keys: impl Neighbours,
    scale: f32,
    mut y: Out<'_>,
    lse: &mut [f32],
) {
    let start = queries.start;
    let (wide, most, [rows, tokens]) = (padded(q.width), padded(keys.most()), most(queries.clone(), keys));
    let (own, read) = (rows * wide, tokens * wide);
    with_scratch([own, read, read, rows * most, GROUP * wide], |[qs, ks, vs, scores, sums]| {
        for block in query_blocks(queries, keys) {
            let span = keys.span(block.clone());
            let task = Queries::new([q, k, v], &block, &span, scale);
            let (y, lse) = (y.from(block.start - start), &mut lse[block.start - start..][..block.len()]);
            let scores = &mut scores[..block.len() * most];
            arch().dispatch(Forward { task, block, keys, qs, ks, vs, scores, sums, y, lse });
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
    keys: K,
    qs: &'a mut [f32],
    ks: &'a mut [f32],
    vs: &'a mut [f32],
    scores: &'a mut [f32],
    sums: &'a mut [f32],
    y: Out<'a>,
    lse: &'a mut [f32],
}

impl<K: Neighbours> WithSimd for Forward<'_, K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Forward { task, block, keys, qs, ks, vs, scores, sums, mut y, lse } = self;
        let (e, wide) = (task.q.width, padded(task.q.width));
        widen(task.q, block.len(), qs);
        widen(task.k, task.tokens, ks);
        widen(task.v, task.tokens, vs);
        let stride = scores.len() / block.len();
        for first in (0..block.len()).step_by(GROUP) {
            let (list, len) = group(block.start + first..block.end, keys);
            let rows = &mut scores[first * stride..][..len * stride];
            for run in 0..list[0].runs {
                for (i, scores) in rows.chunks_exact_mut(stride).enumerate() {
                    let (place, token) = list[i].at(run, task.origin);
                    let q = &qs[(first + i) * wide..][..wide];
                    dots(simd, q, &ks[token * wide..], &mut scores[place..][..list[i].run]);
                }
            }
            for (i, scores) in rows.chunks_exact_mut(stride).enumerate() {
                let (max, total) = exponentials(scores, list[i].count(), task.scale, f32::NEG_INFINITY);
                lse[first + i] = log_sum(max, total);
                let inverse = 1.0 / total;
                for j in 0..stride {
                    scores[j] *= inverse;
                }
            }
            sums.fill(0.0);
            for run in 0..list[0].runs {
                for (i, scores) in rows.chunks_exact(stride).enumerate() {
                    let (place, token) = list[i].at(run, task.origin);
                    let sum = &mut sums[i * wide..][..wide];
                    combine(simd, &scores[place..][..list[i].run], &vs[token * wide..], sum);
                }
            }
            for i in 0..len {
                copy(&sums[i * wide..][..e], y.row(first + i));
            }
        }
    }
}

/// Gradients of queries, keys and values of one head with as many tokens as `saved` has rows.
fn backward(
    [q, k, v]: [Rows<'_>; 3],
    keys: impl Neighbours,
    scale: f32,
    saved: Saved<'_>,
    [dq, dk, dv]: &mut [RowsMut<'_>; 3],
) {
    let n = saved.lse.len();
    let (wide, most, [rows, tokens]) = (padded(q.width), padded(keys.most()), most(0..n, keys));
    let (own, read, scores) = (rows * wide, tokens * wide, rows * most);
    let lengths = [own, own, own, read, read, scores, scores, n * wide, n * wide, n];
    with_scratch(lengths, |[qs, dys, sum_q, ks, vs, p, ds, sum_k, sum_v, delta]| {
        deltas(saved, delta);
        sum_k.fill(0.0);
        sum_v.fill(0.0);
        for block in query_blocks(0..n, keys) {
            let span = keys.span(block.clone());
            let task = Queries::new([q, k, v], &block, &span, scale);
            let dq = &mut dq[block.clone()];
            let (p, ds) = (&mut p[..block.len() * most], &mut ds[..block.len() * most]);
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
            write_times(sum_q, wide, scale, dq);
        }
        write_times(sum_k, wide, scale, dk);
        write(sum_v, wide, dv);
    });
}

struct Backward<'a, K> {
    task: Queries<'a>,
    block: Range<usize>,
    keys: K,
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

impl<K: Neighbours> WithSimd for Backward<'_, K> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Backward { task, block, keys, dy, lse, delta, qs, dys, ks, vs, p, ds, sum_q, sum_k, sum_v } = self;
        let wide = padded(task.q.width);
        widen(task.q, block.len(), qs);
        widen(dy, block.len(), dys);
        widen(task.k, task.tokens, ks);
        widen(task.v, task.tokens, vs);
        let stride = p.len() / block.len();
        sum_q.fill(0.0);
        for first in (0..block.len()).step_by(GROUP) {
            let (list, len) = group(block.start + first..block.end, keys);
            let rows = |i: usize| (first + i) * wide..(first + i + 1) * wide;
            let (p, ds) = (&mut p[first * stride..][..len * stride], &mut ds[first * stride..][..len * stride]);
            for run in 0..list[0].runs {
                for (i, (p, ds)) in p.chunks_exact_mut(stride).zip(ds.chunks_exact_mut(stride)).enumerate() {
                    let (place, token) = list[i].at(run, task.origin);
                    dots(simd, &qs[rows(i)], &ks[token * wide..], &mut p[place..][..list[i].run]);
                    dots(simd, &dys[rows(i)], &vs[token * wide..], &mut ds[place..][..list[i].run]);
                }
            }
            for (i, (p, ds)) in p.chunks_exact_mut(stride).zip(ds.chunks_exact_mut(stride)).enumerate() {
                // Any finite number: the padding is never read again.
                p[list[i].count()..].fill(0.0);
                ds[list[i].count()..].fill(0.0);
                score_gradients(p, ds, task.scale, lse[first + i], delta[first + i]);
            }
            for run in 0..list[0].runs {
                for (i, (p, ds)) in p.chunks_exact(stride).zip(ds.chunks_exact(stride)).enumerate() {
                    let (place, token) = list[i].at(run, task.origin);
                    let (p, ds) = (&p[place..][..list[i].run], &ds[place..][..list[i].run]);
                    combine(simd, ds, &ks[token * wide..], &mut sum_q[rows(i)]);
                    spread(simd, ds, &qs[rows(i)], &mut sum_k[token * wide..]);
                    spread(simd, p, &dys[rows(i)], &mut sum_v[token * wide..]);
                }
            }
        }
    }
}

/// The keys of the first queries, and how many queries these are.
#[inline(always)]
fn group(queries: Range<usize>, keys: impl Neighbours) -> ([Keys; GROUP], usize) {
    let mut list = [keys.keys(queries.start); GROUP];
    let len = queries.len().min(GROUP);
    for (i, list) in list[..len].iter_mut().enumerate() {
        *list = keys.keys(queries.start + i);
    }
    (list, len)
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

/// `sum += Σ_c weights[c] · row c`, in the order of the rows, for consecutive rows as long as `sum`.
#[inline(always)]
fn combine<S: Simd>(simd: S, weights: &[f32], rows: &[f32], sum: &mut [f32]) {
    let (sum, _) = S::as_mut_simd_f32s(sum);
    let (rows, _) = S::as_simd_f32s(rows);
    let (vectors, mut at) = (sum.len(), 0);
    while at < vectors {
        let (rows, sum) = (&rows[at..], &mut sum[at..]);
        at += match sum.len() {
            4.. => combine_of::<S, 4>(simd, weights, rows, vectors, sum),
            2.. => combine_of::<S, 2>(simd, weights, rows, vectors, sum),
            _ => combine_of::<S, 1>(simd, weights, rows, vectors, sum),
        };
    }
}

/// The first `V` vectors of [`combine`], in registers; `rows` are `stride` vectors apart.
#[inline(always)]
fn combine_of<S: Simd, const V: usize>(
    simd: S,
    weights: &[f32],
    rows: &[S::f32s],
    stride: usize,
    out: &mut [S::f32s],
) -> usize {
    let mut sum = [simd.splat_f32s(0.0); V];
    sum.copy_from_slice(&out[..V]);
    for (c, weight) in weights.iter().enumerate() {
        let (row, weight) = (&rows[c * stride..][..V], simd.splat_f32s(*weight));
        for v in 0..V {
            sum[v] = simd.mul_add_f32s(weight, row[v], sum[v]);
        }
    }
    out[..V].copy_from_slice(&sum);
    V
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
