//! Which kernel takes which shape.

use crate::generated::cross_entropy::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, Queue, Shape};
use crate::launchers::cross_entropy::{CrossEntropyBackward, CrossEntropyFinish, CrossEntropyRows};

/// Blocks at the most; more rows or elements go round.
const GRID: usize = 1 << 14;

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, k } = a.dims;
    let terms = queue.scratch::<f32>(b)?;
    CrossEntropyRows { logits: a.logits, labels: a.labels, terms, lse: a.lse, b, k }
        .launch(queue, Shape::new(b.div_ceil(4).clamp(1, GRID), 128))?;
    let inverse = (1.0 / b as f64) as f32;
    CrossEntropyFinish { terms: terms.read(), loss: a.loss, b, inverse }.launch(queue, Shape::new(1, 256))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Some(dlogits) = a.dlogits else { return Ok(()) };
    let Dims { b, k } = a.dims;
    let (dloss, logits, labels, lse, inverse) = (a.dloss, a.logits, a.labels, a.lse, (1.0 / b as f64) as f32);
    let shape = Shape::new((b * k).div_ceil(256).clamp(1, GRID), 256);
    CrossEntropyBackward { dloss, logits, labels, lse, dlogits, b, k, inverse }.launch(queue, shape)
}
