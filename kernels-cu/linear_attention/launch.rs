//! Which kernel takes which shape.

use crate::attention::launch::by_rows;
use crate::generated::linear_attention::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, Out, Queue, Shape};
use crate::launchers::linear_attention::{
    LinearAttentionAdd, LinearAttentionBackwardDelta, LinearAttentionBackwardK, LinearAttentionBackwardQ,
    LinearAttentionBackwardState, LinearAttentionBackwardV, LinearAttentionForward, LinearAttentionNorm,
    LinearAttentionState,
};

/// Blocks that a split of the tokens aims at: two for each multiprocessor of an H100, whatever the device, because the
/// order of the sums follows from it.
const BLOCKS: usize = 264;
/// Tokens that a part has at least.
const PART: usize = 128;

/// Parts of the tokens, and the shape of the sums over them.
fn by_parts(Dims { b, n, h, e }: Dims) -> (usize, Shape) {
    let tiles = e.div_ceil(64) * (e + 1).div_ceil(32);
    let parts = (BLOCKS / (b * h * tiles).max(1)).clamp(1, n.div_ceil(PART).max(1));
    (parts, Shape::new(b * h * parts, 128).y(tiles))
}

fn by_tokens(Dims { b, n, h, e }: Dims) -> Shape {
    Shape::new(n.div_ceil(64) * b * h, 128).y(e.div_ceil(32))
}

/// Adds the parts: `to` is the state and the total.
fn add<T: Element, Q: Queue>(
    queue: &mut Q,
    Dims { b, h, e, .. }: Dims,
    partials: Out<f32>,
    parts: usize,
    [state, total]: [Out<f32>; 2],
) -> Result<(), Q::Error> {
    let shape = Shape::new((b * h * e * (e + 1)).div_ceil(256).clamp(1, 1 << 14), 256);
    LinearAttentionAdd { partials: partials.read(), state, total, heads: (b * h) as u64, e, parts }.launch(
        queue,
        shape,
        T::TYPE,
    )
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, h, e }, map, qkv) = (a.dims, a.params.map, a.qkv);
    let (parts, shape) = by_parts(a.dims);
    let partials = queue.scratch::<f32>(b * h * parts * e * (e + 1))?;
    LinearAttentionState { qkv, partials, n, h, e, map, parts }.launch(queue, shape)?;
    add::<T, Q>(queue, a.dims, partials, parts, [a.state, a.total])?;
    let (rows, eps) = (b * n * h, a.params.eps);
    LinearAttentionNorm { qkv, total: a.total.read(), norm: a.norm, rows: rows as u64, n, h, e, map, eps }
        .launch(queue, by_rows(rows))?;
    LinearAttentionForward { qkv, state: a.state.read(), norm: a.norm.read(), y: a.y, n, h, e, map }
        .launch(queue, by_tokens(a.dims))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Some(dqkv) = a.dqkv else { return Ok(()) };
    let (Dims { b, n, h, e }, map) = (a.dims, a.params.map);
    let (dy, qkv, norm, rows) = (a.dy, a.qkv, a.norm, b * n * h);
    let delta = queue.scratch::<f32>(rows)?;
    LinearAttentionBackwardDelta { y: a.y, dy, delta, rows: rows as u64, n, h, e }.launch(queue, by_rows(rows))?;
    let (delta, shape) = (delta.read(), by_tokens(a.dims));
    LinearAttentionBackwardQ { dy, qkv, norm, delta, state: a.state, total: a.total, dqkv, n, h, e, map }
        .launch(queue, shape)?;
    let (parts, sums) = by_parts(a.dims);
    let partials = queue.scratch::<f32>(b * h * parts * e * (e + 1))?;
    let (dstate, dtotal) = (queue.scratch::<f32>(b * h * e * e)?, queue.scratch::<f32>(b * h * e)?);
    LinearAttentionBackwardState { dy, qkv, norm, delta, partials, n, h, e, map, parts }.launch(queue, sums)?;
    add::<T, Q>(queue, a.dims, partials, parts, [dstate, dtotal])?;
    let (dstate, dtotal) = (dstate.read(), dtotal.read());
    LinearAttentionBackwardK { qkv, dstate, dtotal, dqkv, n, h, e, map }.launch(queue, shape)?;
    LinearAttentionBackwardV { qkv, dstate, dqkv, n, h, e, map }.launch(queue, shape)
}
