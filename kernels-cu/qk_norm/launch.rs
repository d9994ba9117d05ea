//! Which kernel takes which shape.

use crate::generated::qk_norm::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, OrNull, Queue, Shape};
use crate::launchers::qk_norm::{
    QkNormBackward, QkNormBackwardAny, QkNormBackwardColumnsAny, QkNormBackwardMaps, QkNormForward, QkNormForwardAny,
};

/// Rows of a block, one for each of its warps.
const WARPS: usize = 4;
/// Blocks of each part of a token that share the sums of the backward pass: with those of the values three on each
/// multiprocessor of an H100 or H200. A constant, so that the order of the sums is the same on every device.
const BLOCKS: usize = 132;

/// Whether a warp can hold a row in registers, in aligned chunks.
fn in_registers(d: usize) -> bool {
    d.is_multiple_of(8) && d <= 1280
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, d }, eps) = (a.dims, a.params.eps);
    let (x, y, mean, rstd, rows) = (a.x, a.y, a.mean, a.rstd, 3 * b * n);
    let (q_gamma, q_beta, k_gamma, k_beta) = (a.q_gamma, a.q_beta, a.k_gamma, a.k_beta);
    let shape = Shape::new(rows.div_ceil(WARPS), 32 * WARPS);
    if in_registers(d) {
        QkNormForward { x, q_gamma, q_beta, k_gamma, k_beta, y, mean, rstd, rows, d, eps }.launch(queue, shape)
    } else {
        QkNormForwardAny { x, q_gamma, q_beta, k_gamma, k_beta, y, mean, rstd, rows, d, eps }.launch(queue, shape)
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, d } = a.dims;
    let (dy, x, q_gamma, k_gamma, mean, rstd) = (a.dy, a.x, a.q_gamma, a.k_gamma, a.mean, a.rstd);
    let tokens = b * n;
    let splits = BLOCKS.min(tokens.div_ceil(2 * WARPS));
    let maps = [a.dq_gamma, a.dq_beta, a.dk_gamma, a.dk_beta];
    let wanted = maps.iter().any(Option::is_some);
    let partials = if wanted { Some(queue.scratch::<f32>(2 * splits * 2 * d)?) } else { None };
    if in_registers(d) {
        let (dx, partials) = (a.dx.or_null(), partials.or_null());
        QkNormBackward { dy, x, q_gamma, k_gamma, mean, rstd, dx, partials, tokens, d, splits }
            .launch(queue, Shape::new(3 * splits, 32 * WARPS))?;
    } else {
        if let Some(dx) = a.dx {
            let rows = 3 * tokens;
            QkNormBackwardAny { dy, x, q_gamma, k_gamma, mean, rstd, dx, rows, d }
                .launch(queue, Shape::new(rows.div_ceil(WARPS), 32 * WARPS))?;
        }
        if let Some(partials) = partials {
            QkNormBackwardColumnsAny { dy, x, mean, rstd, partials, tokens, d, splits }
                .launch(queue, Shape::new(2 * splits * d.div_ceil(32 * WARPS), 32 * WARPS))?;
        }
    }
    let Some(partials) = partials else { return Ok(()) };
    let [dq_gamma, dq_beta, dk_gamma, dk_beta] = maps.map(OrNull::or_null);
    QkNormBackwardMaps { partials: partials.read(), dq_gamma, dq_beta, dk_gamma, dk_beta, d, splits }
        .launch(queue, Shape::new(4 * d.div_ceil(32), 512))
}
