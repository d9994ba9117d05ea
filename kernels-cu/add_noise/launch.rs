//! Which kernel takes which shape.

use crate::generated::add_noise::{Dims, GpuForward};
use crate::launch::{Element, Queue, Shape};
use crate::launchers::add_noise::{AddNoiseForward, AddNoiseForwardAny};

/// Blocks at the most; more elements go round.
const GRID: usize = 1 << 14;

/// Launches the mixture.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, l } = a.dims;
    let (x0, noise, coefs, x_t) = (a.x0, a.noise, a.coefs, a.x_t);
    let shape = |items: usize| Shape::new(items.div_ceil(256).clamp(1, GRID), 256);
    if l.is_multiple_of(8) {
        AddNoiseForward { x0, noise, coefs, x_t, b, l }.launch(queue, shape(b * l / 8))
    } else {
        AddNoiseForwardAny { x0, noise, coefs, x_t, b, l }.launch(queue, shape(b * l))
    }
}
