//! Which kernel takes which shape.

use crate::attention::launch::{by_keys, by_queries, by_rows};
use crate::generated::window_attention::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, Queue};
use crate::launchers::window_attention::{
    WindowAttentionBackwardDelta, WindowAttentionBackwardKv, WindowAttentionBackwardQ, WindowAttentionForward,
};

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, h, e, w } = a.dims;
    // Farther than N is as far as N.
    let w = w.min(n);
    WindowAttentionForward { qkv: a.qkv, y: a.y, lse: a.lse, n, w, h, e, scale: a.params.scale }
        .launch(queue, by_queries(n, b * h, e))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Some(dqkv) = a.dqkv else { return Ok(()) };
    let (Dims { b, n, h, e, w }, scale) = (a.dims, a.params.scale);
    // Farther than N is as far as N.
    let w = w.min(n);
    let rows = b * n * h;
    let (dy, qkv, lse, delta) = (a.dy, a.qkv, a.lse, queue.scratch::<f32>(rows)?);
    WindowAttentionBackwardDelta { y: a.y, dy, delta, rows: rows as u64, n, h, e }.launch(queue, by_rows(rows))?;
    let delta = delta.read();
    WindowAttentionBackwardQ { dy, qkv, lse, delta, dqkv, n, w, h, e, scale }.launch(queue, by_queries(n, b * h, e))?;
    WindowAttentionBackwardKv { dy, qkv, lse, delta, dqkv, n, w, h, e, scale }.launch(queue, by_keys(n, b * h, e))
}
