//! Which kernel takes which shape.

use crate::generated::loss_regression::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, Queue, Shape};
use crate::launchers::loss_regression::{LossRegressionBackward, LossRegressionFinish, LossRegressionPartial};

/// Elements of a block's first step.
const BLOCK: usize = 8 * 256;
/// Blocks of the sum at the most, whatever the device: its order follows from the shape alone.
const GRID: usize = 2048;

fn count(Dims { b, n, d }: Dims) -> usize {
    b * n * d
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (count, kind, delta) = (count(a.dims), a.params.kind, a.params.delta);
    let blocks = count.div_ceil(BLOCK).clamp(1, GRID);
    let partials = queue.scratch::<f32>(blocks)?;
    LossRegressionPartial { pred: a.pred, target: a.target, partials, count: count as u64, kind, delta }
        .launch(queue, Shape::new(blocks, 256))?;
    let inverse = (1.0 / count as f64) as f32;
    LossRegressionFinish { partials: partials.read(), loss: a.loss, blocks, inverse }.launch(queue, Shape::new(1, 256))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Some(dpred) = a.dpred else { return Ok(()) };
    let (count, kind, delta) = (count(a.dims), a.params.kind, a.params.delta);
    let (dloss, pred, target, inverse) = (a.dloss, a.pred, a.target, (1.0 / count as f64) as f32);
    let shape = Shape::new(count.div_ceil(BLOCK).clamp(1, 1 << 14), 256);
    LossRegressionBackward { dloss, pred, target, dpred, count: count as u64, kind, delta, inverse }
        .launch(queue, shape)
}
