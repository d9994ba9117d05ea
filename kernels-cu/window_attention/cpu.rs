//! CPU path: attention of few keys a query.

use crate::attention::local::{Keys, attend, attend_backward};
use crate::generated::attention::Dims as Heads;
use crate::generated::window_attention::{Backward, Dims, Forward};

/// The window of a query, cut at the ends.
fn keys(Dims { n, w, .. }: Dims, query: usize) -> Keys {
    let first = query.saturating_sub(w);
    Keys { first, run: query.saturating_add(w).min(n - 1) + 1 - first, runs: 1, stride: 1 }
}

fn heads(Dims { b, n, h, e, .. }: Dims) -> Heads {
    Heads { b, n, h, e }
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
