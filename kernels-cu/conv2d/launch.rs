//! Which kernel takes which shape.

use crate::generated::conv2d::{Dims, GpuForward, Params};
use crate::launch::{Element, OrNull, Queue, Shape};
use crate::launchers::conv2d::Conv2dForward;

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
#[rustfmt::skip]
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, h, w, c, f, kh, kw, oh, ow } = a.dims;
    let Params { stride, pad_h, pad_w, relu, bf16 } = a.params;
    let (relu, round) = (usize::from(relu), usize::from(bf16));
    let shape = Shape::new((b * oh * ow).div_ceil(128) * f.div_ceil(64), 128);
    Conv2dForward {
        x: a.x, filters: a.filters, bias: a.bias.or_null(), y: a.y,
        b, h, w, c, f, kh, kw, oh, ow, stride, pad_h, pad_w, relu, round,
    }
    .launch(queue, shape)
}
