//! CPU path: attention of few keys a query, a run of them in each row of its square.

use crate::attention::local::{Keys, attend, attend_backward};
use crate::generated::attention::Dims as Heads;
use crate::generated::neighborhood_attention::{Backward, Dims, Forward};

/// The square of a query, shifted inside at the borders.
fn keys(Dims { gh, gw, k, .. }: Dims, query: usize) -> Keys {
    let start = |i: usize, n: usize| i.saturating_sub(k / 2).min(n - k);
    Keys { first: start(query / gw, gh) * gw + start(query % gw, gw), run: k, runs: k, stride: gw }
}

fn heads(Dims { b, gh, gw, h, e, .. }: Dims) -> Heads {
    Heads { b, n: gh * gw, h, e }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    attend(heads(a.dims), a.params.scale, |query| keys(a.dims, query), a.qkv, a.y, a.lse);
}

/// Backward pass. Heads go over threads: each owns its rows of `dqkv`.
pub fn backward(a: Backward<'_, f32>) {
    let Some(dqkv) = a.dqkv else { return };
    attend_backward(heads(a.dims), a.params.scale, |query| keys(a.dims, query), [a.qkv, a.y, a.dy, a.lse], dqkv);
}
