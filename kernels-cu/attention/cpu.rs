//! CPU path: one head at a time in cache, heads and query ranges over threads.

use super::dense::{self, Saved};
use super::layout::{self, of_head, packed, sample, touch};
use super::softmax::All;
use crate::generated::attention::{Backward, Forward};

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let (dims, qkv, scale) = (a.dims, a.qkv, a.params.scale);
    let begin = |index| touch(sample(qkv, dims.b, index));
    layout::forward(dims, a.y, a.lse, begin, |index, head, queries, y, lse| {
        let [q, k, v] = packed(qkv, dims, index, head);
        dense::forward([q.from(queries.start), k, v], dims.n, All, scale, y, lse);
    });
}

/// Backward pass. Heads go over threads: each owns its rows of `dqkv`.
pub fn backward(a: Backward<'_, f32>) {
    let Some(dqkv) = a.dqkv else { return };
    let (dims, qkv, scale) = (a.dims, a.qkv, a.params.scale);
    let begin = |index| [qkv, a.y, a.dy].into_iter().for_each(|x| touch(sample(x, dims.b, index)));
    layout::backward(dims, dqkv, begin, |index, head, grads| {
        let lse = &a.lse[(index * dims.h + head) * dims.n..][..dims.n];
        let saved = Saved { y: of_head(a.y, dims, index, head), dy: of_head(a.dy, dims, index, head), lse };
        dense::backward(packed(qkv, dims, index, head), dims.n, All, scale, saved, grads);
    });
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::Tier;
    use crate::check::{Fill, Tolerance, compare, draw_f32};
    use crate::generated::attention::{CASES, Dims, INFO};

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
