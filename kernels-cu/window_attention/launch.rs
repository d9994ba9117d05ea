//! Which kernel takes which shape.

use crate::attention::launch::{by_keys, by_queries, by_rows};
use crate::attention::mma::{by_tiles, by_width, fits, stage_bytes, steps_of_block};
use crate::generated::window_attention::{BackwardWay, Dims, ForwardWay, GpuBackward, GpuForward};
use crate::launch::{Element, Queue, Shape};
use crate::launchers::window_attention::{
    WindowAttentionBackwardDelta, WindowAttentionBackwardKv, WindowAttentionBackwardKv64x64E32,
    WindowAttentionBackwardKv64x64E64, WindowAttentionBackwardKv64x64E72, WindowAttentionBackwardKv64x64E128,
    WindowAttentionBackwardQ, WindowAttentionBackwardQ64x64E32, WindowAttentionBackwardQ64x64E64,
    WindowAttentionBackwardQ64x64E72, WindowAttentionBackwardQ64x64E128, WindowAttentionForward,
    WindowAttentionForward64x64E32, WindowAttentionForward64x64E64, WindowAttentionForward64x64E72,
    WindowAttentionForward64x64E128, WindowAttentionForwardRing32E32, WindowAttentionForwardRing32E64,
    WindowAttentionForwardRing32E72, WindowAttentionForwardRing80E32, WindowAttentionForwardRing80E64,
    WindowAttentionForwardRing80E72,
};
use crate::ways::choose;

/// Queries of a step of the ring, and blocks of it that a multiprocessor holds.
const STEP: usize = 64;
const RINGS: usize = 3;
/// Elements of a token's heads at the most: offsets in a ring have 32 bits.
const WIDEST_TOKEN: usize = 1 << 22;

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, h, e, w }, scale) = (a.dims, a.params.scale);
    let (qkv, y, lse) = (a.qkv, a.y, a.lse);
    // Farther than N is as far as N.
    let w = w.min(n);
    let way = choose(queue, T::TYPE, &a.dims, |way: ForwardWay| match way {
        ForwardWay::MmaRing => fits(e) && e <= 72 && w <= 32 && h * e <= WIDEST_TOKEN,
        ForwardWay::Mma64x64 => fits(e),
        ForwardWay::CudaCores => true,
    });
    // No sum crosses queries, so the device may say how many a block walks over.
    let places = RINGS * queue.properties().multiprocessors;
    let segment = STEP * steps_of_block(n.div_ceil(STEP), b * h, places, 1, 1);
    // Keys and values of a ring, queries of a step and its results.
    let ring = |rows, width| {
        let (keys, own) = (stage_bytes(rows, width), stage_bytes(STEP, width));
        Shape::new(n.div_ceil(segment) * b * h, 128).shared(&[keys, keys, own, own])
    };
    match way {
        ForwardWay::MmaRing if w <= 8 => {
            by_width!(e, queue, [32 => WindowAttentionForwardRing32E32, 64 => WindowAttentionForwardRing32E64; 72 => WindowAttentionForwardRing32E72],
                { qkv, y, lse, n, w, h, e, segment, scale }, |width| ring(144, width))
        }
        ForwardWay::MmaRing => {
            by_width!(e, queue, [32 => WindowAttentionForwardRing80E32, 64 => WindowAttentionForwardRing80E64; 72 => WindowAttentionForwardRing80E72],
                { qkv, y, lse, n, w, h, e, segment, scale }, |width| ring(192, width))
        }
        ForwardWay::Mma64x64 => {
            by_width!(e, queue, [32 => WindowAttentionForward64x64E32, 64 => WindowAttentionForward64x64E64, 72 => WindowAttentionForward64x64E72; 128 => WindowAttentionForward64x64E128],
                { qkv, y, lse, n, w, h, e, scale }, |width| by_tiles(n, b * h, 64, 128, width))
        }
        ForwardWay::CudaCores => {
            WindowAttentionForward { qkv, y, lse, n, w, h, e, scale }.launch(queue, by_queries(n, b * h, e))
        }
    }
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
    let (y, dy, qkv, lse, delta) = (a.y, a.dy, a.qkv, a.lse, queue.scratch::<f32>(rows)?);
    let way = choose(queue, T::TYPE, &a.dims, |way: BackwardWay| way == BackwardWay::CudaCores || fits(e));
    match way {
        BackwardWay::Mma64x64 => {
            let shape = |width| by_tiles(n, b * h, 64, 128, width);
            by_width!(e, queue, [32 => WindowAttentionBackwardQ64x64E32, 64 => WindowAttentionBackwardQ64x64E64, 72 => WindowAttentionBackwardQ64x64E72; 128 => WindowAttentionBackwardQ64x64E128],
                { dy, qkv, y, lse, delta, dqkv, n, w, h, e, scale }, shape)?;
            let delta = delta.read();
            by_width!(e, queue, [32 => WindowAttentionBackwardKv64x64E32, 64 => WindowAttentionBackwardKv64x64E64, 72 => WindowAttentionBackwardKv64x64E72; 128 => WindowAttentionBackwardKv64x64E128],
                { dy, qkv, lse, delta, dqkv, n, w, h, e, scale }, shape)
        }
        BackwardWay::CudaCores => {
            WindowAttentionBackwardDelta { y, dy, delta, rows: rows as u64, n, h, e }.launch(queue, by_rows(rows))?;
            let delta = delta.read();
            WindowAttentionBackwardQ { dy, qkv, lse, delta, dqkv, n, w, h, e, scale }
                .launch(queue, by_queries(n, b * h, e))?;
            WindowAttentionBackwardKv { dy, qkv, lse, delta, dqkv, n, w, h, e, scale }
                .launch(queue, by_keys(n, b * h, e))
        }
    }
}
