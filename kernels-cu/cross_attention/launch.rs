//! Which kernel takes which shape.

use crate::attention::launch::{by_keys, by_queries, by_rows};
use crate::generated::cross_attention::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, OrNull, Queue};
use crate::launchers::cross_attention::{
    CrossAttentionBackwardDelta, CrossAttentionBackwardKv, CrossAttentionBackwardQ, CrossAttentionForward,
};

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, m, r, h, e }, scale) = (a.dims, a.params.scale);
    CrossAttentionForward { q: a.q, kv: a.kv, counts: a.counts.or_null(), y: a.y, lse: a.lse, n, m, r, h, e, scale }
        .launch(queue, by_queries(n, b * h, e))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, m, r, h, e }, scale) = (a.dims, a.params.scale);
    let rows = b * n * h;
    let (dy, q, kv, counts, lse) = (a.dy, a.q, a.kv, a.counts.or_null(), a.lse);
    let delta = queue.scratch::<f32>(rows)?;
    CrossAttentionBackwardDelta { y: a.y, dy, delta, rows: rows as u64, n, h, e }.launch(queue, by_rows(rows))?;
    let delta = delta.read();
    if let Some(dq) = a.dq {
        if r > 1 {
            queue.zero(dq, rows * r * e)?;
        }
        CrossAttentionBackwardQ { dy, q, kv, counts, lse, delta, dq, n, m, r, h, e, scale }
            .launch(queue, by_queries(n, b * h, e))?;
    }
    if let Some(dkv) = a.dkv {
        CrossAttentionBackwardKv { dy, q, kv, counts, lse, delta, dkv, n, m, r, h, e, scale }
            .launch(queue, by_keys(m, b * h, e))?;
    }
    Ok(())
}
