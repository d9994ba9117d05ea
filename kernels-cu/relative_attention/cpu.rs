//! CPU path: the softmax attention of one head (`attention/dense.rs`) with the bias added to the scores of each query,
//! heads and query ranges over threads.

use crate::attention::dense::{self, Saved};
use crate::attention::layout::{self, for_heads, of_head, packed, sample, split_parts, touch};
use crate::attention::softmax::Scores;
use crate::generated::attention::Dims as Heads;
use crate::generated::relative_attention::{Backward, Dims, Forward};
use rayon::prelude::*;

/// The biases of one head by distance, 2N − 1 of them, and the sums of their gradients where these are wanted.
struct Bias<'a> {
    scale: f32,
    /// First query that is asked about.
    start: usize,
    values: &'a [f32],
    sums: &'a mut [f32],
}

impl Bias<'_> {
    /// Where the biases of a query begin for the keys from `first` on.
    fn at(&self, query: usize, first: usize) -> usize {
        first + self.values.len() / 2 - (self.start + query)
    }
}

impl Scores for Bias<'_> {
    #[inline(always)]
    fn alter(&mut self, query: usize, first: usize, scores: &mut [f32]) {
        let bias = &self.values[self.at(query, first)..][..scores.len()];
        for j in 0..bias.len() {
            scores[j] = scores[j].mul_add(self.scale, bias[j]);
        }
    }

    #[inline(always)]
    fn gradients(&mut self, query: usize, first: usize, gradients: &[f32]) {
        let at = self.at(query, first);
        let sums = &mut self.sums[at..][..gradients.len()];
        for j in 0..sums.len() {
            sums[j] += gradients[j];
        }
    }
}

/// Biases `[2N − 1, H]` by head.
fn by_head(Dims { n, h, .. }: Dims, bias: &[f32]) -> Vec<f32> {
    let span = 2 * n - 1;
    (0..h * span).map(|i| bias[i % span * h + i / span]).collect()
}

/// Keys that count.
fn keys(n: usize, counts: Option<&[i32]>, sample: usize) -> usize {
    counts.map_or(n, |counts| (counts[sample].max(1) as usize).min(n))
}

fn heads(Dims { b, n, h, e }: Dims) -> Heads {
    Heads { b, n, h, e }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let (dims, span, scale, qkv) = (heads(a.dims), 2 * a.dims.n - 1, a.params.scale, a.qkv);
    let bias = by_head(a.dims, a.bias);
    let begin = |index| touch(sample(qkv, dims.b, index));
    layout::forward(dims, a.y, a.lse, begin, |index, head, queries, y, lse| {
        let [q, k, v] = packed(qkv, dims, index, head);
        let bias = Bias { scale, start: queries.start, values: &bias[head * span..][..span], sums: &mut [] };
        dense::forward([q.from(queries.start), k, v], keys(dims.n, a.counts, index), bias, 1.0, y, lse);
    });
}

/// Backward pass. Heads go over threads: each owns its rows of `dqkv`, and in every sample its sums of biases, which
/// are added in the order of the samples.
pub fn backward(a: Backward<'_, f32>) {
    let Dims { b, n, h, e } = a.dims;
    let (dims, span, scale) = (heads(a.dims), 2 * n - 1, a.params.scale);
    let bias = by_head(a.dims, a.bias);
    let mut sums = vec![0.0; b * h * span];
    let mut unwanted = Vec::new();
    let dqkv = a.dqkv.unwrap_or_else(|| {
        unwanted.resize(a.qkv.len(), 0.0);
        &mut unwanted
    });
    dqkv.par_chunks_mut(n * 3 * h * e).zip(sums.par_chunks_mut(h * span)).enumerate().for_each(
        |(index, (dqkv, sums))| {
            [a.qkv, a.y, a.dy].into_iter().for_each(|x| touch(sample(x, b, index)));
            let mut tasks: Vec<_> = split_parts::<3>(dqkv, h, e).into_iter().zip(sums.chunks_exact_mut(span)).collect();
            for_heads(b, &mut tasks, |head, (grads, sums)| {
                let lse = &a.lse[(index * h + head) * n..][..n];
                let saved = Saved { y: of_head(a.y, dims, index, head), dy: of_head(a.dy, dims, index, head), lse };
                let bias = Bias { scale, start: 0, values: &bias[head * span..][..span], sums };
                let inputs = packed(a.qkv, dims, index, head);
                dense::backward(inputs, keys(n, a.counts, index), bias, 1.0, saved, grads);
                if scale != 1.0 {
                    let [dq, dk, _] = grads;
                    dq.iter_mut().chain(dk).flat_map(|row| row.iter_mut()).for_each(|x| *x *= scale);
                }
            });
        },
    );
    if let Some(out) = a.dbias {
        for (at, out) in out.iter_mut().enumerate() {
            let place = at % h * span + at / h;
            *out = (0..b).map(|index| sums[index * h * span + place]).sum();
        }
    }
}
