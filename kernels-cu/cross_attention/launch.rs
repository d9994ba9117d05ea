//! Which kernel takes which shape.

use crate::attention::launch::{by_keys, by_queries, by_rows};
use crate::attention::mma::{by_tiles, by_width, fits, own_rows, stage_bytes};
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

/// Queries that a block with all keys in shared memory takes.
const SEGMENT: usize = 1024;

/// A block for each segment of queries, with stages of 64 for `m` keys and values, and rows for eight warps' results.
fn resident(n: usize, m: usize, heads: usize, width: usize) -> Shape {
    let mut regions = vec![stage_bytes(64, width); 2 * m.div_ceil(64)];
    regions.push(own_rows(8, width));
    Shape::new(n.div_ceil(SEGMENT) * heads, 256).shared(&regions)
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, m, r, h, e }, scale) = (a.dims, a.params.scale);
    let (q, kv, counts, y, lse) = (a.q, a.kv, a.counts.or_null(), a.y, a.lse);
    let most = queue.properties().shared_per_block;
    let way = choose(queue, T::TYPE, &a.dims, |way: ForwardWay| match way {
        ForwardWay::MmaResident => {
            let width = [64, 72].into_iter().find(|width| e <= *width).unwrap_or(128);
            fits(e) && e > 32 && resident(n, m, b * h, width).shared <= most
        }
        ForwardWay::Mma64x64 => fits(e),
        ForwardWay::CudaCores => true,
    });
    match way {
        ForwardWay::MmaResident => {
            by_width!(e, queue, [64 => CrossAttentionForwardResidentE64, 72 => CrossAttentionForwardResidentE72; 128 => CrossAttentionForwardResidentE128],
                { q, kv, counts, y, lse, n, m, r, h, e, scale }, |width| resident(n, m, b * h, width))
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
