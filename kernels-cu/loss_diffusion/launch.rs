//! Which kernel takes which shape.

use crate::generated::loss_diffusion::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, Queue, Shape};
use crate::launchers::loss_diffusion::{LossDiffusionBackward, LossDiffusionFinish, LossDiffusionPartial};

/// Elements of a sample that a block takes before a sample gets a second one.
const BLOCK: usize = 4 * 256;
/// Blocks of a sample at the most.
const PARTS: usize = 32;

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, c, s } = a.dims;
    let len = c * s;
    let parts = len.div_ceil(BLOCK).min(PARTS);
    let partials = queue.scratch::<f32>(2 * b * parts)?;
    let (model_output, x0, noise, coefs) = (a.model_output, a.x0, a.noise, a.coefs);
    LossDiffusionPartial { model_output, x0, noise, coefs, partials, len, parts }
        .launch(queue, Shape::new(b * parts, 256))?;
    let (inverse_len, inverse_b) = ((1.0 / len as f64) as f32, (1.0 / b as f64) as f32);
    let (partials, vlb_weight) = (partials.read(), a.params.vlb_weight);
    LossDiffusionFinish { partials, loss: a.loss, mse: a.mse, vb: a.vb, b, parts, inverse_len, inverse_b, vlb_weight }
        .launch(queue, Shape::new(1, 256))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Some(dmodel_output) = a.dmodel_output else { return Ok(()) };
    let Dims { b, c, s } = a.dims;
    let len = c * s;
    let (dloss, model_output, x0, noise, coefs) = (a.dloss, a.model_output, a.x0, a.noise, a.coefs);
    let (inverse, vlb_weight) = ((1.0 / (b * len) as f64) as f32, a.params.vlb_weight);
    let shape = Shape::new((b * len).div_ceil(256).clamp(1, 1 << 14), 256);
    LossDiffusionBackward { dloss, model_output, x0, noise, coefs, dmodel_output, b, len, inverse, vlb_weight }
        .launch(queue, shape)
}
