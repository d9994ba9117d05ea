//! Which kernel takes which shape.

use crate::attention::launch::{by_keys, by_queries, by_rows};
use crate::attention::mma::{by_tiles, by_width, fits};
use crate::generated::neighborhood_attention::{BackwardWay, Dims, ForwardWay, GpuBackward, GpuForward};
use crate::launch::{Element, Queue};
use crate::launchers::neighborhood_attention::{
    NeighborhoodAttentionBackwardDelta, NeighborhoodAttentionBackwardKv, NeighborhoodAttentionBackwardKv64x64E32,
    NeighborhoodAttentionBackwardKv64x64E64, NeighborhoodAttentionBackwardKv64x64E72,
    NeighborhoodAttentionBackwardKv64x64E128, NeighborhoodAttentionBackwardQ, NeighborhoodAttentionBackwardQ64x64E32,
    NeighborhoodAttentionBackwardQ64x64E64, NeighborhoodAttentionBackwardQ64x64E72,
    NeighborhoodAttentionBackwardQ64x64E128, NeighborhoodAttentionForward, NeighborhoodAttentionForward64x64E32,
    NeighborhoodAttentionForward64x64E64, NeighborhoodAttentionForward64x64E72, NeighborhoodAttentionForward64x64E128,
};
use crate::ways::choose;

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, gh, gw, h, e, k }, scale) = (a.dims, a.params.scale);
    let (n, qkv, y, lse) = (gh * gw, a.qkv, a.y, a.lse);
    match choose(queue, T::TYPE, &a.dims, |way: ForwardWay| way == ForwardWay::CudaCores || fits(e)) {
        ForwardWay::Mma64x64 => {
            by_width!(e, queue, [32 => NeighborhoodAttentionForward64x64E32, 64 => NeighborhoodAttentionForward64x64E64, 72 => NeighborhoodAttentionForward64x64E72; 128 => NeighborhoodAttentionForward64x64E128],
                { qkv, y, lse, gh, gw, k, h, e, scale }, |width| by_tiles(n, b * h, 64, 128, width))
        }
        ForwardWay::CudaCores => {
            NeighborhoodAttentionForward { qkv, y, lse, gh, gw, k, h, e, scale }.launch(queue, by_queries(n, b * h, e))
        }
    }
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
    let (y, dy, qkv, lse, delta) = (a.y, a.dy, a.qkv, a.lse, queue.scratch::<f32>(rows)?);
    match choose(queue, T::TYPE, &a.dims, |way: BackwardWay| way == BackwardWay::CudaCores || fits(e)) {
        BackwardWay::Mma64x64 => {
            let shape = |width| by_tiles(n, b * h, 64, 128, width);
            by_width!(e, queue, [32 => NeighborhoodAttentionBackwardQ64x64E32, 64 => NeighborhoodAttentionBackwardQ64x64E64, 72 => NeighborhoodAttentionBackwardQ64x64E72; 128 => NeighborhoodAttentionBackwardQ64x64E128],
                { dy, qkv, y, lse, delta, dqkv, gh, gw, k, h, e, scale }, shape)?;
            let delta = delta.read();
            by_width!(e, queue, [32 => NeighborhoodAttentionBackwardKv64x64E32, 64 => NeighborhoodAttentionBackwardKv64x64E64, 72 => NeighborhoodAttentionBackwardKv64x64E72; 128 => NeighborhoodAttentionBackwardKv64x64E128],
                { dy, qkv, lse, delta, dqkv, gh, gw, k, h, e, scale }, shape)
        }
        BackwardWay::CudaCores => {
            NeighborhoodAttentionBackwardDelta { y, dy, delta, rows: rows as u64, n, h, e }
                .launch(queue, by_rows(rows))?;
            let delta = delta.read();
            NeighborhoodAttentionBackwardQ { dy, qkv, lse, delta, dqkv, gh, gw, k, h, e, scale }
                .launch(queue, by_queries(n, b * h, e))?;
            NeighborhoodAttentionBackwardKv { dy, qkv, lse, delta, dqkv, gh, gw, k, h, e, scale }
                .launch(queue, by_keys(n, b * h, e))
        }
    }
}
