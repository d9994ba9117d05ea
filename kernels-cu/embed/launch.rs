//! Which kernel takes which shape.

use crate::generated::embed::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, OrNull, Queue, Shape};
use crate::launchers::embed::{
    EmbedBackwardAddend, EmbedBackwardTable, EmbedBackwardTableAny, EmbedForward, EmbedForwardAny,
};

/// Blocks at the most; more elements go round.
const GRID: usize = 1 << 14;

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, v, d }, act) = (a.dims, a.params.act);
    let (table, index, addend, y, pre) = (a.table, a.index, a.addend.or_null(), a.y, a.pre);
    let shape = |items: usize| Shape::new(items.div_ceil(128).clamp(1, GRID), 128);
    if d.is_multiple_of(8) {
        EmbedForward { table, index, addend, y, pre, b, v, d, act }.launch(queue, shape(b * d / 8))
    } else {
        EmbedForwardAny { table, index, addend, y, pre, b, v, d, act }.launch(queue, shape(b * d))
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let (Dims { b, v, d }, act) = (a.dims, a.params.act);
    let (dy, index, pre) = (a.dy, a.index, a.pre);
    if let Some(daddend) = a.daddend {
        let shape = Shape::new((b * d).div_ceil(8 * 256).clamp(1, GRID), 256);
        EmbedBackwardAddend { dy, pre, daddend, count: (b * d) as u64, act }.launch(queue, shape)?;
    }
    let Some(dtable) = a.dtable else { return Ok(()) };
    let shape = Shape::new(v, 128);
    if d.is_multiple_of(8) {
        EmbedBackwardTable { dy, index, pre, dtable, b, d, act }.launch(queue, shape)
    } else {
        EmbedBackwardTableAny { dy, index, pre, dtable, b, d, act }.launch(queue, shape)
    }
}
