//! Which kernel takes which shape.

use crate::generated::upsample::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, Queue, Shape};
use crate::launchers::upsample::{UpsampleBackward, UpsampleBackwardAny, UpsampleForward, UpsampleForwardAny};

/// Threads of a block, each with 8 channels or one.
const THREADS: usize = 256;

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, h, w, c }, x, y) = (a.dims, a.x, a.y);
    let (rows, elements) = (b * h, b * h * w * c);
    if c.is_multiple_of(8) {
        UpsampleForward { x, y, rows, w, c }.launch(queue, Shape::new(elements.div_ceil(8 * THREADS), THREADS))
    } else {
        UpsampleForwardAny { x, y, rows, w, c }.launch(queue, Shape::new(elements.div_ceil(THREADS), THREADS))
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let (Dims { b, h, w, c }, dy, Some(dx)) = (a.dims, a.dy, a.dx) else { return Ok(()) };
    let (rows, elements) = (b * h, b * h * w * c);
    if c.is_multiple_of(8) {
        UpsampleBackward { dy, dx, rows, w, c }.launch(queue, Shape::new(elements.div_ceil(8 * THREADS), THREADS))
    } else {
        UpsampleBackwardAny { dy, dx, rows, w, c }.launch(queue, Shape::new(elements.div_ceil(THREADS), THREADS))
    }
}
