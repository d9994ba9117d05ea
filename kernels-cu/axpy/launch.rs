//! Which kernel takes which shape.

use crate::generated::axpy::GpuForward;
use crate::launch::{Element, Queue, Shape};
use crate::launchers::axpy::AxpyForward;

/// Elements of a block's first step.
const BLOCK: usize = 8 * 256;
/// Blocks at the most; more elements go round.
const GRID: usize = 1 << 14;

/// Launches the update.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let l = a.dims.l;
    let shape = Shape::new(l.div_ceil(BLOCK).clamp(1, GRID), 256);
    AxpyForward { x: a.x, y: a.y, l, alpha: a.params.alpha }.launch(queue, shape)
}
