//! Which kernel takes which shape.

use crate::generated::sum_squares::GpuForward;
use crate::launch::{Element, Queue, Shape};
use crate::launchers::sum_squares::{SumSquaresFinish, SumSquaresPartial};

/// Elements of a block's first step.
const BLOCK: usize = 8 * 256;
/// Blocks at the most, whatever the device: the order of the sum follows from the length alone.
const GRID: usize = 2048;

/// Launches the sum.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let l = a.dims.l;
    let blocks = l.div_ceil(BLOCK).clamp(1, GRID);
    let partials = queue.scratch::<f32>(2 * blocks)?;
    SumSquaresPartial { x: a.x, partials, l: l as u64 }.launch(queue, Shape::new(blocks, 256))?;
    SumSquaresFinish { partials: partials.read(), out: a.out, blocks }.launch(queue, Shape::new(1, 256))
}
