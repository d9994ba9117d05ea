//! Which kernel takes which shape.

use crate::attention::launch::{by_keys, by_queries, by_rows};
use crate::generated::neighborhood_attention::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, Queue};
use crate::launchers::neighborhood_attention::{
    NeighborhoodAttentionBackwardDelta, NeighborhoodAttentionBackwardKv, NeighborhoodAttentionBackwardQ,
    NeighborhoodAttentionForward,
};

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, gh, gw, h, e, k } = a.dims;
    let n = gh * gw;
    NeighborhoodAttentionForward { qkv: a.qkv, y: a.y, lse: a.lse, gh, gw, k, h, e, scale: a.params.scale }
        .launch(queue, by_queries(n, b * h, e))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Some(dqkv) = a.dqkv else { return Ok(()) };
    let (Dims { b, gh, gw, h, e, k }, scale) = (a.dims, a.params.scale);
    let n = gh * gw;
    let rows = b * n * h;
    let (dy, qkv, lse, delta) = (a.dy, a.qkv, a.lse, queue.scratch::<f32>(rows)?);
    NeighborhoodAttentionBackwardDelta { y: a.y, dy, delta, rows: rows as u64, n, h, e }
        .launch(queue, by_rows(rows))?;
    let delta = delta.read();
    NeighborhoodAttentionBackwardQ { dy, qkv, lse, delta, dqkv, gh, gw, k, h, e, scale }
        .launch(queue, by_queries(n, b * h, e))?;
    NeighborhoodAttentionBackwardKv { dy, qkv, lse, delta, dqkv, gh, gw, k, h, e, scale }
        .launch(queue, by_keys(n, b * h, e))
}
