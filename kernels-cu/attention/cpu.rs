//! CPU path: one head at a time in cache, heads and query ranges over threads.

use super::dense::{self, Saved};
use super::layout::{self, RowsMut, of_head, packed, sample, touch};
use super::softmax::All;
use super::tiles::Rows;
use crate::generated::attention::{Backward, Dims, Forward};
use crate::simd::vectorised;
use rayon::prelude::*;

/// Keys from which a head's are divided where heads are few.
const LONG: usize = 512;
/// Tasks that few heads of a sample are divided into.
const TASKS: usize = 4;

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let (dims, qkv, scale) = (a.dims, a.qkv, a.params.scale);
    let begin = |index| touch(sample(qkv, dims.b, index));
    layout::forward(dims, a.y, a.lse, begin, |index, head, queries, y, lse| {
        let [q, k, v] = packed(qkv, dims, index, head);
        dense::forward([q.from(queries.start), k, v], dims.n, All, scale, y, lse);
    });
}

/// Backward pass. Heads go over threads: each owns its rows of `dqkv`. Few heads of many keys are divided.
pub fn backward(a: Backward<'_, f32>) {
    let Some(dqkv) = a.dqkv else { return };
    let (dims, qkv, scale) = (a.dims, a.qkv, a.params.scale);
    let begin = |index| [qkv, a.y, a.dy].into_iter().for_each(|x| touch(sample(x, dims.b, index)));
    layout::backward(dims, dqkv, begin, |index, head, grads| {
        let lse = &a.lse[(index * dims.h + head) * dims.n..][..dims.n];
        let saved = Saved { y: of_head(a.y, dims, index, head), dy: of_head(a.dy, dims, index, head), lse };
        let qkv = packed(qkv, dims, index, head);
        match parts(dims) {
            1 => dense::backward(qkv, dims.n, All, scale, saved, grads),
            parts => by_keys(qkv, dims.n.div_ceil(parts), scale, saved, grads),
        }
    });
}

/// Ranges of keys of a head that are tasks of their own. The order of the sums follows from it, so it follows from the
/// shape of a sample alone.
fn parts(Dims { n, h, .. }: Dims) -> usize {
    if n < LONG { 1 } else { (TASKS / h).max(1) }
}

fn reborrow<'a>(rows: &'a mut [&mut [f32]]) -> RowsMut<'a> {
    rows.iter_mut().map(|row| &mut **row).collect()
}

/// Gradients of one head by ranges of `most` keys: each owns the rows of its keys, and what they add to the queries is
/// summed in the order of the ranges.
fn by_keys([q, k, v]: [Rows<'_>; 3], most: usize, scale: f32, saved: Saved<'_>, [dq, dk, dv]: &mut [RowsMut<'_>; 3]) {
    let (n, e) = (saved.lse.len(), q.width);
    let mut others = vec![0.0; (n.div_ceil(most) - 1) * n * e];
    let sums = std::iter::once(reborrow(dq))
        .chain(others.chunks_exact_mut(n * e).map(|sum| sum.chunks_exact_mut(e).collect()));
    let keys = dk.chunks_mut(most).zip(dv.chunks_mut(most));
    let mut tasks: Vec<[RowsMut<'_>; 3]> =
        sums.zip(keys).map(|(dq, (dk, dv))| [dq, reborrow(dk), reborrow(dv)]).collect();
    tasks.par_iter_mut().enumerate().for_each(|(index, grads)| {
        let (first, count) = (index * most, grads[1].len());
        dense::backward([q, k.from(first), v.from(first)], count, All, scale, saved, grads);
    });
    dq.par_iter_mut().enumerate().for_each(|(i, row)| {
        vectorised(
            #[inline(always)]
            || {
                for other in others.chunks_exact(n * e) {
                    row.iter_mut().zip(&other[i * e..]).for_each(|(sum, more)| *sum += more);
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::Tier;
    use crate::check::{Fill, Tolerance, compare, draw_f32};
    use crate::generated::attention::{CASES, INFO};

    #[test]
    fn agrees_with_the_oracle() {
        let tolerance = INFO.tolerance.unwrap_or(Tolerance::F32);
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
                let result = compare(got, want, tolerance);
                assert!(result.pass, "{} {name}: {result:?}", case.name);
            }
        }
    }
}
