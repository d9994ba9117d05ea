//! Which kernel takes which shape.

use crate::attention::launch::{by_keys, by_queries, by_rows};
use crate::attention::mma::{by_tiles, by_width, fits, own_rows, stage_bytes, steps_of_block};
use crate::generated::cross_attention::{BackwardWay, Dims, ForwardWay, GpuBackward, GpuForward};
use crate::launch::{Element, OrNull, Queue, Shape};
use crate::launchers::cross_attention::{
    CrossAttentionBackwardDelta, CrossAttentionBackwardKv, CrossAttentionBackwardKv64x64E32,
    CrossAttentionBackwardKv64x64E64, CrossAttentionBackwardKv64x64E72, CrossAttentionBackwardKv64x64E128,
    CrossAttentionBackwardQ, CrossAttentionBackwardQ64x64E32, CrossAttentionBackwardQ64x64E64,
    CrossAttentionBackwardQ64x64E72, CrossAttentionBackwardQ64x64E128, CrossAttentionForward,
    CrossAttentionForward64x64E32, CrossAttentionForward64x64E64, CrossAttentionForward64x64E72,
    CrossAttentionForward64x64E128, CrossAttentionForwardResidentE64, CrossAttentionForwardResidentE72,
    CrossAttentionForwardResidentE128,
};
use crate::ways::choose;

/// Warps of a block with all keys in shared memory, by the width of a head; each takes 16 queries at a time.
fn warps(width: usize) -> usize {
    if width <= 72 { 6 } else { 8 }
}

/// A block for each `segment` queries, with stages of 64 for `m` keys and values, and eight rows for each warp's results.
fn resident(n: usize, m: usize, heads: usize, segment: usize, width: usize) -> Shape {
    let mut regions = vec![stage_bytes(64, width); 2 * m.div_ceil(64)];
    regions.push(own_rows(warps(width), width));
    Shape::new(n.div_ceil(segment) * heads, 32 * warps(width)).shared(&regions)
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, m, r, h, e }, scale) = (a.dims, a.params.scale);
    let (q, kv, counts, y, lse) = (a.q, a.kv, a.counts.or_null(), a.y, a.lse);
    let (most, multiprocessors) = (queue.properties().shared_per_block, queue.properties().multiprocessors);
    let width = [64, 72].into_iter().find(|width| e <= *width).unwrap_or(128);
    // A multiprocessor holds two blocks of narrow heads. All keys take the time of two steps of queries. No sum crosses
    // queries, so the device may say how many a block takes.
    let (rows, places) = (16 * warps(width), multiprocessors * if width <= 72 { 2 } else { 1 });
    let segment = rows * steps_of_block(n.div_ceil(rows), b * h, places, 2, 1);
    let way = choose(queue, T::TYPE, &a.dims, |way: ForwardWay| match way {
        ForwardWay::MmaResident => fits(e) && e > 32 && resident(n, m, b * h, segment, width).shared <= most,
        ForwardWay::Mma64x64 => fits(e),
        ForwardWay::CudaCores => true,
    });
    match way {
        ForwardWay::MmaResident => {
            by_width!(e, queue, [64 => CrossAttentionForwardResidentE64, 72 => CrossAttentionForwardResidentE72; 128 => CrossAttentionForwardResidentE128],
                { q, kv, counts, y, lse, n, m, r, h, e, segment, scale }, |width| resident(n, m, b * h, segment, width))
        }
        ForwardWay::Mma64x64 => {
            by_width!(e, queue, [32 => CrossAttentionForward64x64E32, 64 => CrossAttentionForward64x64E64, 72 => CrossAttentionForward64x64E72; 128 => CrossAttentionForward64x64E128],
                { q, kv, counts, y, lse, n, m, r, h, e, scale }, |width| by_tiles(n, b * h, 64, 128, width))
        }
        ForwardWay::CudaCores => {
            CrossAttentionForward { q, kv, counts, y, lse, n, m, r, h, e, scale }.launch(queue, by_queries(n, b * h, e))
        }
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, m, r, h, e }, scale) = (a.dims, a.params.scale);
    let rows = b * n * h;
    let (y, dy, q, kv, counts, lse) = (a.y, a.dy, a.q, a.kv, a.counts.or_null(), a.lse);
    let delta = queue.scratch::<f32>(rows)?;
    let way = choose(queue, T::TYPE, &a.dims, |way: BackwardWay| way == BackwardWay::CudaCores || fits(e));
    if let (Some(dq), true) = (a.dq, r > 1) {
        queue.zero(dq, rows * r * e)?;
    }
    // The kernel of dq on tensor cores makes delta on its way.
    match (way, a.dq) {
        (BackwardWay::Mma64x64, Some(dq)) => {
            by_width!(e, queue, [32 => CrossAttentionBackwardQ64x64E32, 64 => CrossAttentionBackwardQ64x64E64, 72 => CrossAttentionBackwardQ64x64E72; 128 => CrossAttentionBackwardQ64x64E128],
                { dy, q, kv, counts, y, lse, delta, dq, n, m, r, h, e, scale }, |width| by_tiles(n, b * h, 64, 128, width))?;
        }
        (_, dq) => {
            CrossAttentionBackwardDelta { y, dy, delta, rows: rows as u64, n, h, e }.launch(queue, by_rows(rows))?;
            if let Some(dq) = dq {
                CrossAttentionBackwardQ { dy, q, kv, counts, lse, delta: delta.read(), dq, n, m, r, h, e, scale }
                    .launch(queue, by_queries(n, b * h, e))?;
            }
        }
    }
    let (Some(dkv), delta) = (a.dkv, delta.read()) else { return Ok(()) };
    match way {
        BackwardWay::Mma64x64 => {
            by_width!(e, queue, [32 => CrossAttentionBackwardKv64x64E32, 64 => CrossAttentionBackwardKv64x64E64, 72 => CrossAttentionBackwardKv64x64E72; 128 => CrossAttentionBackwardKv64x64E128],
                { dy, q, kv, counts, lse, delta, dkv, n, m, r, h, e, scale }, |width| by_tiles(m, b * h, 64, 128, width))
        }
        BackwardWay::CudaCores => CrossAttentionBackwardKv { dy, q, kv, counts, lse, delta, dkv, n, m, r, h, e, scale }
            .launch(queue, by_keys(m, b * h, e)),
    }
}
