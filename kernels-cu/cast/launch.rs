//! Which kernel takes which shape.

use crate::generated::cast::{GpuBackward, GpuForward};
use crate::launch::{Element, Queue, Shape};
use crate::launchers::cast::{CastBackward, CastForward};

/// Elements of a block's first step.
const BLOCK: usize = 8 * 256;
/// Blocks at the most; more elements go round.
const GRID: usize = 1 << 14;

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let l = a.dims.l;
    CastForward { x: a.x, y: a.y, l: l as u64 }.launch(queue, shape(l))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let (l, Some(dx)) = (a.dims.l, a.dx) else { return Ok(()) };
    CastBackward { dy: a.dy, dx, l: l as u64 }.launch(queue, shape(l))
}

fn shape(l: usize) -> Shape {
    Shape::new(l.div_ceil(BLOCK).clamp(1, GRID), 256)
}
