//! Which kernel takes which shape.

use crate::generated::branch_deltas::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, OrNull, Queue, Shape};
use crate::launchers::branch_deltas::{
    BranchDeltasBackward, BranchDeltasBackwardAny, BranchDeltasForward, BranchDeltasForwardAny,
};

/// Blocks at the most; more elements go round.
const GRID: usize = 1 << 14;

fn shape(items: usize) -> Shape {
    Shape::new(items.div_ceil(256).clamp(1, GRID), 256)
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { d, .. }, rows) = (a.dims, a.dims.b * a.dims.n);
    let (x, first, second, y) = (a.x, a.first, a.second, a.y);
    if d.is_multiple_of(8) {
        BranchDeltasForward { x, first, second, y, rows, d }.launch(queue, shape(rows * d / 8))
    } else {
        BranchDeltasForwardAny { x, first, second, y, rows, d }.launch(queue, shape(rows * d))
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let (Dims { d, .. }, rows, dy) = (a.dims, a.dims.b * a.dims.n, a.dy);
    let (dx, dfirst, dsecond) = (a.dx.or_null(), a.dfirst.or_null(), a.dsecond.or_null());
    if d.is_multiple_of(8) {
        BranchDeltasBackward { dy, dx, dfirst, dsecond, rows, d }.launch(queue, shape(rows * d / 8))
    } else {
        BranchDeltasBackwardAny { dy, dx, dfirst, dsecond, rows, d }.launch(queue, shape(rows * d))
    }
}
