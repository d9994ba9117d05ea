//! CPU path: attention of few keys a query, a run of them in each row of its square.

use crate::attention::local::{Keys, Neighbours, attend, attend_backward};
use crate::generated::attention::Dims as Heads;
use crate::generated::neighborhood_attention::{Backward, Dims, Forward};
use std::ops::Range;

/// Where a neighbourhood of `k` begins among `n`.
fn start(i: usize, n: usize, k: usize) -> usize {
    i.saturating_sub(k / 2).min(n - k)
}

impl Neighbours for Dims {
    /// The square, shifted inside at the borders.
    fn keys(&self, query: usize) -> Keys {
        let Dims { gh, gw, k, .. } = *self;
        Keys { first: start(query / gw, gh, k) * gw + start(query % gw, gw, k), run: k, runs: k, stride: gw }
    }

    /// Whole rows of the grid.
    fn span(&self, queries: Range<usize>) -> Range<usize> {
        let Dims { gh, gw, k, .. } = *self;
        start(queries.start / gw, gh, k) * gw..(start((queries.end - 1) / gw, gh, k) + k) * gw
    }

    fn most(&self) -> usize {
        self.k * self.k
    }
}

fn heads(Dims { b, gh, gw, h, e, .. }: Dims) -> Heads {
    Heads { b, n: gh * gw, h, e }
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
