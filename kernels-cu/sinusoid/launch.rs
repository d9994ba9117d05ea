//! Which kernel takes which shape.

use crate::generated::sinusoid::{Dims, GpuForward};
use crate::launch::{Element, Queue, Shape};
use crate::launchers::sinusoid::SinusoidForward;

/// Blocks at the most; more elements go round.
const GRID: usize = 1 << 14;

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, d } = a.dims;
    let shape = Shape::new((b * d / 2).div_ceil(128).clamp(1, GRID), 128);
    SinusoidForward { t: a.t, y: a.y, b, d, denominator: a.params.denominator }.launch(queue, shape)
}
