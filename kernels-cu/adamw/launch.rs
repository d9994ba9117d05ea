//! Which kernel takes which shape.

use crate::generated::adamw::GpuForward;
use crate::launch::{Element, OrNull, Queue, Shape};
use crate::launchers::adamw::AdamwForward;

/// Elements of a block's first step.
const BLOCK: usize = 4 * 256;
/// Blocks at the most; more elements go round.
const GRID: usize = 1 << 14;

/// Launches the step.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (l, p) = (a.dims.l, a.params);
    let shape = Shape::new(l.div_ceil(BLOCK).clamp(1, GRID), 256);
    let [lr, decay, bias1, bias2] = [p.lr, p.weight_decay, p.bias1, p.bias2].map(f64::from);
    AdamwForward {
        grad: a.grad,
        param: a.param,
        m: a.m,
        v: a.v,
        ema: a.ema.or_null(),
        l,
        keep: (1.0 - lr * decay) as f32,
        rate: (lr / bias1) as f32,
        rate1: p.rate1,
        rate2: p.rate2,
        eps: p.eps,
        root: (1.0 / bias2.sqrt()) as f32,
        grad_scale: p.grad_scale,
        ema_rate: p.ema_rate,
    }
    .launch(queue, shape)
}
