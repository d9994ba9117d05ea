//! CPU path: attention of few keys a query.

use crate::attention::local::{Keys, Neighbours, attend, attend_backward};
use crate::generated::attention::Dims as Heads;
use crate::generated::window_attention::{Backward, Dims, Forward};
use std::ops::Range;

impl Neighbours for Dims {
    /// The window, cut at the ends.
    fn keys(&self, query: usize) -> Keys {
        let Range { start, end } = self.span(query..query + 1);
        Keys { first: start, run: end - start, runs: 1, stride: 1 }
    }

    fn span(&self, queries: Range<usize>) -> Range<usize> {
        queries.start.saturating_sub(self.w)..queries.end.saturating_add(self.w).min(self.n)
    }

    fn most(&self) -> usize {
        self.w.saturating_mul(2).saturating_add(1).min(self.n)
    }
}

fn heads(Dims { b, n, h, e, .. }: Dims) -> Heads {
    Heads { b, n, h, e }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    attend(heads(a.dims), a.params.scale, a.dims, a.qkv, a.y, a.lse);
}

/// Backward pass. Heads go over threads: each owns its rows of `dqkv`.
pub fn backward(a: Backward<'_, f32>) {
    let Some(dqkv) = a.dqkv else { return };
    attend_backward(heads(a.dims), a.params.scale, a.dims, [a.qkv, a.y, a.dy, a.lse], dqkv);
}
