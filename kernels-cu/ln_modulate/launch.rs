//! Which kernel takes which shape.

use crate::generated::ln_modulate::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, OrNull, Queue, Shape};
use crate::launchers::ln_modulate::{
    LnModulateBackward, LnModulateBackward1280, LnModulateBackwardAny, LnModulateBackwardColumnsAny,
    LnModulateBackwardTable, LnModulateForward, LnModulateForwardAny,
};

/// Rows of a block, one for each of its warps.
const WARPS: usize = 4;
/// Blocks that share the sums of the backward pass: four on each multiprocessor of an H100 or H200. A constant, so that
/// the order of the sums is the same on every device.
const BLOCKS: usize = 528;
/// Rows of x and of dy that a warp of the backward pass has in shared memory.
const SLOTS: usize = 2;
/// Threads that add partial sums, and those of a column, at the most.
const SUM_THREADS: usize = 512;
const SUM_GROUPS: usize = 16;

/// Whether a warp can hold a row in registers, in aligned chunks.
fn in_registers(d: usize) -> bool {
    d.is_multiple_of(8) && d <= 1280
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, c, d } = a.dims;
    let (x, modulation, y, mean, rstd, rows) = (a.x, a.modulation, a.y, a.mean, a.rstd, b * n);
    let (shift, scale, eps) = (a.params.shift, a.params.scale, a.params.eps);
    let shape = Shape::new(rows.div_ceil(WARPS), 32 * WARPS);
    if in_registers(d) {
        LnModulateForward { x, modulation, y, mean, rstd, rows, n, c, d, shift, scale, eps }.launch(queue, shape)
    } else {
        LnModulateForwardAny { x, modulation, y, mean, rstd, rows, n, c, d, shift, scale, eps }.launch(queue, shape)
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, c, d } = a.dims;
    let (dy, x, modulation, mean, rstd) = (a.dy, a.x, a.modulation, a.mean, a.rstd);
    let (shift, scale) = (a.params.shift, a.params.scale);
    let splits = (BLOCKS / b).clamp(1, n.div_ceil(WARPS));
    let partials = a.dmodulation.map(|_| queue.scratch::<f32>(b * splits * 2 * d)).transpose()?;
    if in_registers(d) {
        let (dx, partials) = (a.dx.or_null(), partials.or_null());
        let width = d.next_multiple_of(128);
        let rows = WARPS * SLOTS * 2 * width * size_of::<T>();
        let shape = Shape::new(b * splits, 32 * WARPS).shared(&[4 * width, rows]);
        if d <= 1152 {
            LnModulateBackward { dy, x, modulation, mean, rstd, dx, partials, n, c, d, scale, splits }
                .launch(queue, shape)?;
        } else {
            LnModulateBackward1280 { dy, x, modulation, mean, rstd, dx, partials, n, c, d, scale, splits }
                .launch(queue, shape)?;
        }
    } else {
        if let Some(dx) = a.dx {
            let rows = b * n;
            LnModulateBackwardAny { dy, x, modulation, mean, rstd, dx, rows, n, c, d, scale }
                .launch(queue, Shape::new(rows.div_ceil(WARPS), 32 * WARPS))?;
        }
        if let Some(partials) = partials {
            LnModulateBackwardColumnsAny { dy, x, mean, rstd, partials, n, d, splits }
                .launch(queue, Shape::new(b * splits * d.div_ceil(32 * WARPS), 32 * WARPS))?;
        }
    }
    let (Some(dmodulation), Some(partials)) = (a.dmodulation, partials) else { return Ok(()) };
    // Eight partial sums a thread, unless there are too many.
    let groups = (splits / 8).next_power_of_two().clamp(1, SUM_GROUPS);
    LnModulateBackwardTable { partials: partials.read(), dmodulation, c, d, shift, scale, splits, groups }
        .launch(queue, Shape::new(b * 2 * d.div_ceil(SUM_THREADS / groups), SUM_THREADS).dependent())
}
