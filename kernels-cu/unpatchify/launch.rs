//! Which kernel takes which shape.

use crate::generated::unpatchify::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, Queue, Shape};
use crate::launchers::unpatchify::{UnpatchifyBackward, UnpatchifyForward};

/// Elements of a block's first step.
const BLOCK: usize = 8 * 256;
/// Blocks at the most; more elements go round.
const GRID: usize = 1 << 14;

/// Elements of the image, and the shape that moves them.
fn shape(Dims { b, c, p, gh, gw }: Dims) -> (u64, Shape) {
    let count = b * c * p * p * gh * gw;
    (count as u64, Shape::new(count.div_ceil(BLOCK).clamp(1, GRID), 256))
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { c, p, gh, gw, .. }, (count, shape)) = (a.dims, shape(a.dims));
    UnpatchifyForward { tokens: a.tokens, x: a.x, count, c, p, gh, gw }.launch(queue, shape)
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Some(dtokens) = a.dtokens else { return Ok(()) };
    let (Dims { c, p, gh, gw, .. }, (count, shape)) = (a.dims, shape(a.dims));
    UnpatchifyBackward { dx: a.dx, dtokens, count, c, p, gh, gw }.launch(queue, shape)
}
