//! Which kernel takes which shape.

use crate::generated::rms_norm::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, OrNull, Queue, Shape};
use crate::launchers::rms_norm::{
    RmsNormBackward, RmsNormBackwardAny, RmsNormBackwardColumnsAny, RmsNormBackwardWeight, RmsNormBackwardWide,
    RmsNormForward, RmsNormForwardAny, RmsNormForwardWide,
};

/// Threads of a block, and rows where each of its warps has one.
const THREADS: usize = 128;
const ROWS: usize = THREADS / 32;
/// Blocks that share the sums of the backward pass: three on each multiprocessor of an H100 or H200. A constant, so that
/// the order of the sums is the same on every device.
const BLOCKS: usize = 396;

/// How a row lies.
enum Rows {
    /// In the registers of a warp.
    Narrow,
    /// In the registers of a block.
    Wide,
    /// In memory.
    Any,
}

fn rows_of(d: usize, gate: Option<[usize; 2]>) -> Rows {
    let aligned = d.is_multiple_of(8) && gate.is_none_or(|columns| columns.iter().all(|c| c.is_multiple_of(8)));
    match d {
        _ if !aligned => Rows::Any,
        0..=1280 => Rows::Narrow,
        1281..=4096 => Rows::Wide,
        _ => Rows::Any,
    }
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, d, w: width } = a.dims;
    let (rows, offset, eps) = (b * n, a.params.gate_offset, a.params.eps);
    let kind = rows_of(d, a.gate.map(|_| [width, offset]));
    let (x, gate, weight, y, rstd) = (a.x, a.gate.or_null(), a.weight, a.y, a.rstd);
    let by_warps = Shape::new(rows.div_ceil(ROWS), THREADS);
    match kind {
        Rows::Narrow => {
            RmsNormForward { x, gate, weight, y, rstd, rows, d, width, offset, eps }.launch(queue, by_warps)
        }
        Rows::Wide => RmsNormForwardWide { x, gate, weight, y, rstd, rows, d, width, offset, eps }
            .launch(queue, Shape::new(rows, THREADS)),
        Rows::Any => {
            RmsNormForwardAny { x, gate, weight, y, rstd, rows, d, width, offset, eps }.launch(queue, by_warps)
        }
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, d, w: width } = a.dims;
    let (rows, offset) = (b * n, a.params.gate_offset);
    let kind = rows_of(d, a.gate.map(|_| [width, offset]));
    let (dy, x, gate, weight, rstd) = (a.dy, a.x, a.gate.or_null(), a.weight, a.rstd);
    let (dx, dgate) = (a.dx.or_null(), a.dgate.or_null());
    let blocks = match kind {
        Rows::Wide => BLOCKS.min(rows.div_ceil(2)),
        Rows::Narrow | Rows::Any => BLOCKS.min(rows.div_ceil(2 * ROWS)),
    };
    let sums = a.dweight.map(|_| queue.scratch::<f32>(blocks * d)).transpose()?;
    let (partials, shape) = (sums.or_null(), Shape::new(blocks, THREADS));
    match kind {
        Rows::Narrow => RmsNormBackward { dy, x, gate, weight, rstd, dx, dgate, partials, rows, d, width, offset }
            .launch(queue, shape)?,
        Rows::Wide => RmsNormBackwardWide { dy, x, gate, weight, rstd, dx, dgate, partials, rows, d, width, offset }
            .launch(queue, shape)?,
        Rows::Any => {
            if a.dx.is_some() || a.dgate.is_some() {
                RmsNormBackwardAny { dy, x, gate, weight, rstd, dx, dgate, rows, d, width, offset }
                    .launch(queue, Shape::new(rows.div_ceil(ROWS), THREADS))?;
            }
            if a.dweight.is_some() {
                let splits = blocks;
                RmsNormBackwardColumnsAny { dy, x, gate, rstd, partials, rows, d, width, offset, splits }
                    .launch(queue, Shape::new(splits * d.div_ceil(THREADS), THREADS))?;
            }
        }
    }
    let Some(dweight) = a.dweight else { return Ok(()) };
    RmsNormBackwardWeight { partials: partials.read(), dweight, d, count: blocks }
        .launch(queue, Shape::new(d.div_ceil(32), 512))
}
