//! Which kernel takes which shape.

use crate::attention::launch::{by_keys, by_queries, by_rows};
use crate::attention::mma::{by_tiles, by_width, fits};
use crate::generated::relative_attention::{BackwardWay, Dims, ForwardWay, GpuBackward, GpuForward};
use crate::launch::{Element, OrNull, Queue, Shape};
use crate::launchers::relative_attention::{
    RelativeAttentionBackwardBias, RelativeAttentionBackwardDelta, RelativeAttentionBackwardDistances,
    RelativeAttentionBackwardKv, RelativeAttentionBackwardKv64x64E32, RelativeAttentionBackwardKv64x64E64,
    RelativeAttentionBackwardKv64x64E72, RelativeAttentionBackwardKv64x64E128, RelativeAttentionBackwardQ,
    RelativeAttentionBackwardQ64x64E32, RelativeAttentionBackwardQ64x64E64, RelativeAttentionBackwardQ64x64E72,
    RelativeAttentionBackwardQ64x64E128, RelativeAttentionForward, RelativeAttentionForward64x64E32,
    RelativeAttentionForward64x64E64, RelativeAttentionForward64x64E72, RelativeAttentionForward64x64E128,
};
use crate::ways::choose;

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, h, e }, scale) = (a.dims, a.params.scale);
    let (qkv, bias, counts, y, lse) = (a.qkv, a.bias, a.counts.or_null(), a.y, a.lse);
    match choose(queue, T::TYPE, &a.dims, |way: ForwardWay| way == ForwardWay::CudaCores || fits(e)) {
        ForwardWay::Mma64x64 => {
            by_width!(e, queue, [32 => RelativeAttentionForward64x64E32, 64 => RelativeAttentionForward64x64E64, 72 => RelativeAttentionForward64x64E72; 128 => RelativeAttentionForward64x64E128],
                { qkv, bias, counts, y, lse, n, h, e, scale }, |width| by_tiles(n, b * h, 64, 128, width))
        }
        ForwardWay::CudaCores => RelativeAttentionForward { qkv, bias, counts, y, lse, n, h, e, scale }
            .launch(queue, by_queries(n, b * h, e)),
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, h, e }, scale) = (a.dims, a.params.scale);
    let rows = b * n * h;
    let (y, dy, qkv, bias, counts, lse) = (a.y, a.dy, a.qkv, a.bias, a.counts.or_null(), a.lse);
    let delta = queue.scratch::<f32>(rows)?;
    let way = choose(queue, T::TYPE, &a.dims, |way: BackwardWay| way == BackwardWay::CudaCores || fits(e));
    match (way, a.dqkv) {
        (BackwardWay::Mma64x64, Some(dqkv)) => {
            let shape = |width| by_tiles(n, b * h, 64, 128, width);
            by_width!(e, queue, [32 => RelativeAttentionBackwardQ64x64E32, 64 => RelativeAttentionBackwardQ64x64E64, 72 => RelativeAttentionBackwardQ64x64E72; 128 => RelativeAttentionBackwardQ64x64E128],
                { dy, qkv, bias, counts, y, lse, delta, dqkv, n, h, e, scale }, shape)?;
            let delta = delta.read();
            by_width!(e, queue, [32 => RelativeAttentionBackwardKv64x64E32, 64 => RelativeAttentionBackwardKv64x64E64, 72 => RelativeAttentionBackwardKv64x64E72; 128 => RelativeAttentionBackwardKv64x64E128],
                { dy, qkv, bias, counts, lse, delta, dqkv, n, h, e, scale }, shape)?;
        }
        (_, dqkv) => {
            RelativeAttentionBackwardDelta { y, dy, delta, rows: rows as u64, n, h, e }.launch(queue, by_rows(rows))?;
            let delta = delta.read();
            if let Some(dqkv) = dqkv {
                RelativeAttentionBackwardQ { dy, qkv, bias, counts, lse, delta, dqkv, n, h, e, scale }
                    .launch(queue, by_queries(n, b * h, e))?;
                RelativeAttentionBackwardKv { dy, qkv, bias, counts, lse, delta, dqkv, n, h, e, scale }
                    .launch(queue, by_keys(n, b * h, e))?;
            }
        }
    }
    let (Some(dbias), delta) = (a.dbias, delta.read()) else { return Ok(()) };
    // One block for each tile of queries and head, whatever the width: scores are sums over all of it.
    let shape = by_queries(n, b * h, 1);
    let slots = n.next_multiple_of(32) + 64;
    let partials = queue.scratch::<f32>(n.div_ceil(64) * b * h * slots)?;
    RelativeAttentionBackwardDistances { dy, qkv, bias, counts, lse, delta, partials, n, h, e, slots, scale }
        .launch(queue, shape)?;
    RelativeAttentionBackwardBias { partials: partials.read(), dbias, samples: b, n, h, slots }
        .launch(queue, Shape::new((2 * n - 1).div_ceil(128) * h, 128))
}
