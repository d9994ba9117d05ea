//! Which kernel takes which shape.

mod slopes;
mod split;
mod tensor;

use crate::generated::gemm::{BackwardWay, Dims, ForwardWay, GpuBackward, GpuForward};
use crate::launch::{Element, In, OrNull, Out, Queue, Shape};
use crate::launchers::gemm::{GemmBackwardAdd, GemmBackwardPos, GemmBackwardW, GemmBackwardX, GemmForward};
use crate::ways;

/// Rows and columns of a block's results.
const TILE: [usize; 2] = [128, 64];
/// Blocks that a split of the rows aims at: two for each multiprocessor of an H100, whatever the device, because the
/// order of the sums follows from it.
const BLOCKS: usize = 264;
/// Rows that a part has at least.
const PART: usize = 256;
/// Blocks of an elementwise kernel at the most; more elements go round.
const GRID: usize = 1 << 14;

fn tiles(rows: usize, columns: usize) -> usize {
    rows.div_ceil(TILE[0]) * columns.div_ceil(TILE[1])
}

fn elementwise(items: usize) -> Shape {
    Shape::new(items.div_ceil(256).clamp(1, GRID), 256)
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, k, f, c } = a.dims;
    let takes = |way| way == ForwardWay::CudaCores || tensor::fits(&a.dims, &a.params);
    let way = ways::choose(queue, T::TYPE, &a.dims, takes);
    if way != ForwardWay::CudaCores {
        return tensor::forward(queue, &a, way);
    }
    GemmForward {
        x: a.x,
        w: a.w,
        bias: a.bias.or_null(),
        pos: a.pos.or_null(),
        gate: a.gate.or_null(),
        residual: a.residual.or_null(),
        y: a.y,
        pre: a.pre.or_null(),
        rows: b * n,
        n,
        k,
        f,
        c,
        gate_row: a.params.gate_row,
        act: a.params.act,
        round: usize::from(a.params.bf16),
    }
    .launch(queue, Shape::new(tiles(b * n, f), 128))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, k, f, c } = a.dims;
    let (rows, gate_row, act, round) = (b * n, a.params.gate_row, a.params.act, usize::from(a.params.bf16));
    let takes = |way| way == BackwardWay::CudaCores || tensor::fits(&a.dims, &a.params);
    let way = ways::choose(queue, T::TYPE, &a.dims, takes);
    let du = slopes::slopes(queue, &a)?;
    if let Some(dx) = a.dx {
        if way == BackwardWay::CudaCores {
            GemmBackwardX { du, w: a.w, dx, rows, k, f, round }.launch(queue, Shape::new(tiles(rows, k), 128))?;
        } else {
            tensor::backward_x(queue, [du, a.w], dx, [rows, k, f], way)?;
        }
    }
    if let Some(dw) = a.dw {
        if way == BackwardWay::CudaCores {
            weight(queue, [du, a.x], dw, [rows, k, f], round)?;
        } else {
            tensor::backward_w(queue, [du, a.x], dw, [rows, k, f], way)?;
        }
    }
    if let Some(dpos) = a.dpos {
        let (dy, pre, gate) = (a.dy, a.pre.or_null(), a.gate.or_null());
        GemmBackwardPos { dy, pre, gate, dpos, b, n, f, c, gate_row, act }.launch(queue, elementwise(n * f))?;
    }
    Ok(())
}

/// Parts that `rows` are split into beside `blocks` blocks.
fn parts(blocks: usize, rows: usize) -> usize {
    (BLOCKS / blocks.max(1)).clamp(1, rows.div_ceil(PART).max(1))
}

/// dw = duᵀ·x, split over the rows where the tiles are few.
fn weight<T: Element, Q: Queue>(
    queue: &mut Q,
    [du, x]: [In<T>; 2],
    dw: Out<T>,
    [rows, k, f]: [usize; 3],
    round: usize,
) -> Result<(), Q::Error> {
    let tiles = tiles(f, k);
    let part = rows.div_ceil(parts(tiles, rows)).max(1);
    let parts = rows.div_ceil(part).max(1);
    if parts == 1 {
        let partials = Out::at(0);
        return GemmBackwardW { du, x, dw, partials, rows, k, f, part, round }.launch(queue, Shape::new(tiles, 128));
    }
    let partials = queue.scratch::<f32>(parts * f * k)?;
    GemmBackwardW { du, x, dw, partials, rows, k, f, part, round }.launch(queue, Shape::new(tiles, 128).y(parts))?;
    GemmBackwardAdd { partials: partials.read(), to: dw, count: (f * k) as u64, parts }
        .launch(queue, elementwise(f * k))
}
