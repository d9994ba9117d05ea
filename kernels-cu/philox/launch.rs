//! Which kernel takes which shape.

use crate::generated::philox::GpuForward;
use crate::launch::{Element, Queue, Shape};
use crate::launchers::philox::PhiloxForward;

/// Blocks at the most; more numbers go round.
const GRID: usize = 1 << 14;
/// The same for rows.
const ROWS: usize = 1 << 10;

/// Launches the generator.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (b, l, p) = (a.dims.b, a.dims.l, a.params);
    // One block of four more where the offset cuts the first.
    let shape = Shape::new((l / 4 + 2).div_ceil(128).min(GRID), 128).y(b.min(ROWS));
    let (seed, stream, offset) = (p.seed, p.stream, p.offset);
    PhiloxForward { z: a.z, b: b as u64, l: l as u64, seed, stream, offset }.launch(queue, shape)
}
