//! Which kernel takes which shape.

use crate::attention::launch::{by_keys, by_queries, by_rows};
use crate::generated::relative_attention::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, OrNull, Queue, Shape};
use crate::launchers::relative_attention::{
    RelativeAttentionBackwardBias, RelativeAttentionBackwardDelta, RelativeAttentionBackwardDistances,
    RelativeAttentionBackwardKv, RelativeAttentionBackwardQ, RelativeAttentionForward,
};

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, h, e }, scale) = (a.dims, a.params.scale);
    let counts = a.counts.or_null();
    RelativeAttentionForward { qkv: a.qkv, bias: a.bias, counts, y: a.y, lse: a.lse, n, h, e, scale }
        .launch(queue, by_queries(n, b * h, e))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, h, e }, scale) = (a.dims, a.params.scale);
    let rows = b * n * h;
    let (dy, qkv, bias, counts, lse) = (a.dy, a.qkv, a.bias, a.counts.or_null(), a.lse);
    let delta = queue.scratch::<f32>(rows)?;
    RelativeAttentionBackwardDelta { y: a.y, dy, delta, rows: rows as u64, n, h, e }.launch(queue, by_rows(rows))?;
    let delta = delta.read();
    if let Some(dqkv) = a.dqkv {
        RelativeAttentionBackwardQ { dy, qkv, bias, counts, lse, delta, dqkv, n, h, e, scale }
            .launch(queue, by_queries(n, b * h, e))?;
        RelativeAttentionBackwardKv { dy, qkv, bias, counts, lse, delta, dqkv, n, h, e, scale }
            .launch(queue, by_keys(n, b * h, e))?;
    }
    let Some(dbias) = a.dbias else { return Ok(()) };
    // One block for each tile of queries and head, whatever the width: scores are sums over all of it.
    let shape = by_queries(n, b * h, 1);
    let slots = n.next_multiple_of(32) + 64;
    let partials = queue.scratch::<f32>(n.div_ceil(64) * b * h * slots)?;
    RelativeAttentionBackwardDistances { dy, qkv, bias, counts, lse, delta, partials, n, h, e, slots, scale }
        .launch(queue, shape)?;
    RelativeAttentionBackwardBias { partials: partials.read(), dbias, samples: b, n, h, slots }
        .launch(queue, Shape::new((2 * n - 1).div_ceil(128) * h, 128))
}
