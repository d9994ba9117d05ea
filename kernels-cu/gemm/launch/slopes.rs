//! What the backward pass takes off dy and u before and beside its products: du, dbias, dgate.

use super::{BLOCKS, elementwise, parts};
use crate::generated::gemm::GpuBackward;
use crate::launch::{Element, In, OrNull, Out, Queue, Shape};
use crate::launchers::gemm::{
    GemmBackwardAdd, GemmBackwardBias, GemmBackwardColumns, GemmBackwardGate, GemmBackwardSlopes, GemmBackwardU,
};

/// Columns of a block of `gemm_backward_slopes`.
const COLUMNS: usize = 256;
/// Fewest rows of one of its blocks: one group of each of its warps.
const ROWS: usize = 32;
/// Blocks that a split of the rows aims at: several for each multiprocessor, whatever the device.
const MANY: usize = 3 * BLOCKS;

/// The gradient of u that the products read; dbias and dgate are written on the way.
///
/// # Errors
/// Those of the queue.
pub(super) fn slopes<T: Element, Q: Queue>(queue: &mut Q, a: &GpuBackward<T>) -> Result<In<T>, Q::Error> {
    // u equals y's gradient where nothing comes after it, and nobody asks for it where no product is wanted.
    let differs = (a.params.act != 0 || a.gate.is_some()) && (a.dx.is_some() || a.dw.is_some());
    let du = if differs { Some(queue.scratch::<T>(a.dims.b * a.dims.n * a.dims.f)?) } else { None };
    if differs || a.dbias.is_some() || a.dgate.is_some() {
        if a.dims.f.is_multiple_of(8) && a.params.act != 3 {
            by_vectors(queue, a, du)?;
        } else {
            by_elements(queue, a, du)?;
        }
    }
    Ok(du.map_or(a.dy, |du| du.read()))
}

/// Everything in one pass.
fn by_vectors<T: Element, Q: Queue>(queue: &mut Q, a: &GpuBackward<T>, du: Option<Out<T>>) -> Result<(), Q::Error> {
    let (d, gate_row, act) = (&a.dims, a.params.gate_row, a.params.act);
    // A block has one row of gates.
    let (segments, length) = if a.gate.is_some() { (d.b, d.n) } else { (1, d.b * d.n) };
    let tiles = d.f.div_ceil(COLUMNS);
    let parts = (MANY / (tiles * segments)).clamp(1, length.div_ceil(ROWS).max(1));
    let pieces = segments * parts;
    let mut sums = |wanted: bool| if wanted { queue.scratch::<f32>(pieces * d.f) } else { Ok(Out::at(0)) };
    let (bias_sums, gate_sums) = (sums(a.dbias.is_some())?, sums(a.dgate.is_some())?);
    let (dy, pre, gate, du) = (a.dy, a.pre.or_null(), a.gate.or_null(), du.or_null());
    GemmBackwardSlopes { dy, pre, gate, du, bias_sums, gate_sums, length, parts, f: d.f, c: d.c, gate_row, act }
        .launch(queue, Shape::new(tiles * pieces, 256))?;
    if let Some(to) = a.dbias {
        GemmBackwardBias { sums: bias_sums.read(), to, pieces, f: d.f }
            .launch(queue, Shape::new(d.f.div_ceil(32), 256))?;
    }
    if let Some(dgate) = a.dgate {
        GemmBackwardGate { partials: gate_sums.read(), dgate, b: d.b, c: d.c, f: d.f, gate_row, parts }
            .launch(queue, elementwise(d.b * d.c * d.f))?;
    }
    Ok(())
}

/// Any shape, a pass for each.
fn by_elements<T: Element, Q: Queue>(queue: &mut Q, a: &GpuBackward<T>, du: Option<Out<T>>) -> Result<(), Q::Error> {
    let (b, n, f, c, gate_row, act) = (a.dims.b, a.dims.n, a.dims.f, a.dims.c, a.params.gate_row, a.params.act);
    let (rows, dy, pre, gate) = (b * n, a.dy, a.pre.or_null(), a.gate.or_null());
    if let Some(du) = du {
        GemmBackwardU { dy, pre, gate, du, rows, n, f, c, gate_row, act }.launch(queue, elementwise(rows * f))?;
    }
    if let Some(dbias) = a.dbias {
        let parts = parts(f.div_ceil(32), rows);
        let partials = queue.scratch::<f32>(parts * f)?;
        GemmBackwardColumns { dy, pre, gate, partials, length: rows, parts, n, f, c, gate_row, act, of_u: 0 }
            .launch(queue, Shape::new(f.div_ceil(32) * parts, 128))?;
        GemmBackwardAdd { partials: partials.read(), to: dbias, count: f as u64, parts }
            .launch(queue, elementwise(f))?;
    }
    if let Some(dgate) = a.dgate {
        let parts = parts(b * f.div_ceil(32), n);
        let partials = queue.scratch::<f32>(b * parts * f)?;
        GemmBackwardColumns { dy, pre, gate, partials, length: n, parts, n, f, c, gate_row, act, of_u: 1 }
            .launch(queue, Shape::new(f.div_ceil(32) * b * parts, 128))?;
        GemmBackwardGate { partials: partials.read(), dgate, b, c, f, gate_row, parts }
            .launch(queue, elementwise(b * c * f))?;
    }
    Ok(())
}
