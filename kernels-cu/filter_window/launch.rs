//! One kernel each way.

use crate::generated::filter_window::{Dims, GpuBackward, GpuForward, Params};
use crate::launch::{Element, Queue, Shape};
use crate::launchers::filter_window::{FilterWindowBackward, FilterWindowForward};

/// Blocks of a tile of 32 by 32, 256 threads each.
fn tiles(Dims { l, c }: Dims) -> Shape {
    Shape::new(l.div_ceil(32) * c.div_ceil(32), 256)
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { l, c }, Params { centre, period, slow, fast }) = (a.dims, a.params);
    FilterWindowForward { x: a.x, y: a.y, l, c, centre, period, slow, fast }.launch(queue, tiles(a.dims))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let (Dims { l, c }, Params { centre, period, slow, fast }, Some(dx)) = (a.dims, a.params, a.dx) else {
        return Ok(());
    };
    FilterWindowBackward { dy: a.dy, dx, l, c, centre, period, slow, fast }.launch(queue, tiles(a.dims))
}
