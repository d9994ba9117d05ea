//! CPU path: one head at a time in cache over the keys that count, heads and query ranges over threads.

use crate::attention::dense::{self, Saved};
use crate::attention::layout::{self, RowsMut, for_heads, of_head, part, sample, split_parts, touch};
use crate::attention::softmax::All;
use crate::attention::tiles::Rows;
use crate::generated::attention::Dims as Heads;
use crate::generated::cross_attention::{Backward, Dims, Forward};
use rayon::prelude::*;

/// Queries, keys and values of one head, and how many keys count.
struct Inputs<'a> {
    dims: Dims,
    q: &'a [f32],
    kv: &'a [f32],
    counts: Option<&'a [i32]>,
}

impl<'a> Inputs<'a> {
    fn heads(&self) -> Heads {
        let Dims { b, n, h, e, .. } = self.dims;
        Heads { b, n, h, e }
    }

    /// Queries, and keys and values, of one sample.
    fn sample(&self, index: usize) -> (&'a [f32], &'a [f32]) {
        (sample(self.q, self.dims.b, index), sample(self.kv, self.dims.b, index))
    }

    /// Has them in cache before the heads follow.
    fn begin(&self, index: usize) {
        let (q, kv) = self.sample(index);
        touch(q);
        touch(kv);
    }

    fn head(&self, index: usize, head: usize) -> ([Rows<'a>; 3], usize) {
        let Dims { m, r, h, e, .. } = self.dims;
        let (q, kv) = self.sample(index);
        let [k, v] = [0, 1].map(|p| part(kv, 2, p, h, e, head));
        ([part(q, r, 0, h, e, head), k, v], self.counts.map_or(m, |counts| counts[index] as usize))
    }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let inputs = Inputs { dims: a.dims, q: a.q, kv: a.kv, counts: a.counts };
    layout::forward(
        inputs.heads(),
        a.y,
        a.lse,
        |index| inputs.begin(index),
        |sample, head, queries, y, lse| {
            let ([q, k, v], keys) = inputs.head(sample, head);
            dense::forward([q.from(queries.start), k, v], keys, All, a.params.scale, y, lse);
        },
    );
}

/// Backward pass. Heads go over threads: each owns its rows of `dq` and `dkv`.
pub fn backward(a: Backward<'_, f32>) {
    let inputs = Inputs { dims: a.dims, q: a.q, kv: a.kv, counts: a.counts };
    let Dims { b, n, m, r, h, e } = a.dims;
    let (saved_y, dy, lse, scale) = (a.y, a.dy, a.lse, a.params.scale);
    let samples = samples(b, a.dq, n * r * h * e).into_par_iter().zip(samples(b, a.dkv, m * 2 * h * e));
    samples.enumerate().for_each(|(index, (dq, dkv))| {
        inputs.begin(index);
        [saved_y, dy].into_iter().for_each(|x| touch(sample(x, b, index)));
        let heads = queries(dq, h, e, r).into_iter().zip(keys(dkv, h, e));
        let mut heads: Vec<[RowsMut<'_>; 3]> = heads.map(|(dq, [dk, dv])| [dq, dk, dv]).collect();
        for_heads(b, &mut heads, |head, grads| {
            let [y, dy] = [saved_y, dy].map(|x| of_head(x, inputs.heads(), index, head));
            let saved = Saved { y, dy, lse: &lse[(index * h + head) * n..][..n] };
            let (parts, keys) = inputs.head(index, head);
            dense::backward(parts, keys, All, scale, saved, grads);
        });
    });
}

/// A gradient by sample, where it is wanted.
fn samples(b: usize, gradient: Option<&mut [f32]>, len: usize) -> Vec<Option<&mut [f32]>> {
    gradient.map_or_else(|| (0..b).map(|_| None).collect(), |x| x.chunks_exact_mut(len).map(Some).collect())
}

/// The rows of the queries of every head; the other `r` − 1 vectors of a token become zero.
fn queries(gradient: Option<&mut [f32]>, h: usize, e: usize, r: usize) -> Vec<RowsMut<'_>> {
    let Some(gradient) = gradient else { return (0..h).map(|_| Vec::new()).collect() };
    let mut heads: Vec<RowsMut<'_>> = (0..h).map(|_| Vec::with_capacity(gradient.len() / (r * h * e))).collect();
    for token in gradient.chunks_exact_mut(r * h * e) {
        let (query, others) = token.split_at_mut(h * e);
        others.fill(0.0);
        query.chunks_exact_mut(e).zip(&mut heads).for_each(|(row, head)| head.push(row));
    }
    heads
}

/// The rows of the keys and values of every head.
fn keys(gradient: Option<&mut [f32]>, h: usize, e: usize) -> Vec<[RowsMut<'_>; 2]> {
    gradient.map_or_else(|| (0..h).map(|_| [Vec::new(), Vec::new()]).collect(), |x| split_parts::<2>(x, h, e))
}
