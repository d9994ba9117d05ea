//! Which kernel takes which shape.

use crate::generated::philox::GpuForward;
use crate::launch::{Element, Queue, Shape};
use crate::launchers::philox::PhiloxForward;

/// Blocks at the most; more numbers go round.
const GRID: usize = 1 << 14;

/// Launches the generator.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (l, p) = (a.dims.l, a.params);
    // One block of four more where the offset cuts the first.
    let shape = Shape::new((l / 4 + 2).div_ceil(128).min(GRID), 128);
    PhiloxForward { z: a.z, l: l as u64, seed: p.seed, stream: p.stream, offset: p.offset }.launch(queue, shape)
}
