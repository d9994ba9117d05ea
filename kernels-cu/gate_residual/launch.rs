//! Which kernel takes which shape.

use crate::generated::gate_residual::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, OrNull, Queue, Shape};
use crate::launchers::gate_residual::{
    GateResidualBackward, GateResidualBackwardAny, GateResidualBackwardTable, GateResidualForward,
    GateResidualForwardAny,
};

/// Threads of a block.
const THREADS: usize = 256;
/// Threads of a block along the columns, and along the tokens.
const TILE: [usize; 2] = [16, 16];
/// Blocks that share the sums of the backward pass: three on each multiprocessor of an H100 or H200. A constant, so that
/// the order of the sums is the same on every device.
const BLOCKS: usize = 396;

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, c, d } = a.dims;
    let (residual, modulation, branch, y) = (a.residual, a.modulation, a.branch, a.y);
    let (rows, gate) = (b * n, a.params.gate_row);
    let shape = Shape::new(rows.div_ceil(THREADS / 32), THREADS);
    if d.is_multiple_of(8) {
        GateResidualForward { residual, modulation, branch, y, rows, n, c, d, gate }.launch(queue, shape)
    } else {
        GateResidualForwardAny { residual, modulation, branch, y, rows, n, c, d, gate }.launch(queue, shape)
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, c, d } = a.dims;
    let (dy, modulation, branch, dbranch, gate) =
        (a.dy, a.modulation, a.branch, a.dbranch.or_null(), a.params.gate_row);
    let tiles = d.div_ceil(TILE[0] * if d.is_multiple_of(8) { 8 } else { 1 });
    let splits = (BLOCKS / (b * tiles)).clamp(1, n.div_ceil(2 * TILE[1]));
    let sums = a.dmodulation.map(|_| queue.scratch::<f32>(b * splits * d)).transpose()?;
    let (partials, shape) = (sums.or_null(), Shape::new(b * splits * tiles, THREADS));
    if d.is_multiple_of(8) {
        GateResidualBackward { dy, modulation, branch, dbranch, partials, n, c, d, gate, splits }
            .launch(queue, shape)?;
    } else {
        GateResidualBackwardAny { dy, modulation, branch, dbranch, partials, n, c, d, gate, splits }
            .launch(queue, shape)?;
    }
    let Some(dmodulation) = a.dmodulation else { return Ok(()) };
    GateResidualBackwardTable { partials: partials.read(), dmodulation, c, d, gate, splits }
        .launch(queue, Shape::new(b * c * d.div_ceil(32), 512))
}
