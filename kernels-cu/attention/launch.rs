//! Which kernel takes which shape; and the shapes of the attention family.

use super::hopper;
use crate::generated::attention::{BackwardWay, Dims, ForwardWay, GpuBackward, GpuForward};
use crate::launch::{Element, Queue, Shape};
use crate::launchers::attention::{AttentionBackwardDelta, AttentionBackwardKv, AttentionBackwardQ, AttentionForward};
use crate::ways::choose;

/// Tokens that a block owns.
const ROWS: usize = 64;
/// Columns of a head that a block owns: forward and for dq, and for dk with dv.
const COLUMNS: [usize; 2] = [128, 96];

/// The launch of the forward pass and of dq: `tokens` queries of `heads` heads in all samples.
pub(crate) fn by_queries(tokens: usize, heads: usize, e: usize) -> Shape {
    Shape::new(tokens.div_ceil(ROWS) * heads, 128).y(e.div_ceil(COLUMNS[0]).max(1))
}

/// The launch of dk and dv: `tokens` keys.
pub(crate) fn by_keys(tokens: usize, heads: usize, e: usize) -> Shape {
    Shape::new(tokens.div_ceil(ROWS) * heads, 128).y(e.div_ceil(COLUMNS[1]).max(1))
}

/// The launch of delta: `rows` vectors of y.
pub(crate) fn by_rows(rows: usize) -> Shape {
    Shape::new(rows.div_ceil(4).clamp(1, 1 << 14), 128)
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let way = choose(queue, T::TYPE, &a.dims, |way| {
        way == ForwardWay::CudaCores || hopper::takes_forward(way, &a.dims, a.params.scale)
    });
    if way != ForwardWay::CudaCores {
        return hopper::forward(queue, &a, way);
    }
    let Dims { b, n, h, e } = a.dims;
    AttentionForward { qkv: a.qkv, y: a.y, lse: a.lse, n, h, e, scale: a.params.scale }
        .launch(queue, by_queries(n, b * h, e))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Some(dqkv) = a.dqkv else { return Ok(()) };
    let way = choose(queue, T::TYPE, &a.dims, |way| {
        way == BackwardWay::CudaCores || hopper::takes_backward(way, &a.dims, a.params.scale)
    });
    if way != BackwardWay::CudaCores {
        return hopper::backward(queue, &a, dqkv, way);
    }
    let (Dims { b, n, h, e }, scale) = (a.dims, a.params.scale);
    let rows = b * n * h;
    let (dy, qkv, lse, delta) = (a.dy, a.qkv, a.lse, queue.scratch::<f32>(rows)?);
    AttentionBackwardDelta { y: a.y, dy, delta, rows: rows as u64, n, h, e }.launch(queue, by_rows(rows))?;
    let delta = delta.read();
    AttentionBackwardQ { dy, qkv, lse, delta, dqkv, n, h, e, scale }.launch(queue, by_queries(n, b * h, e))?;
    AttentionBackwardKv { dy, qkv, lse, delta, dqkv, n, h, e, scale }.launch(queue, by_keys(n, b * h, e))
}
