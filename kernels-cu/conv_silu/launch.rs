//! Which kernel takes which shape.

use crate::generated::conv_silu::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, OrNull, Out, Queue, Shape};
use crate::launchers::conv_silu::{
    ConvSilu3Backward, ConvSilu3Forward, ConvSilu4Backward, ConvSilu4Forward, ConvSiluAnyBackwardGate,
    ConvSiluAnyBackwardInput, ConvSiluAnyBackwardSums, ConvSiluAnyForward, ConvSiluBackwardFilters,
    ConvSiluBackwardRest,
};

/// Threads of a block of the walks, each with 16 bytes of channels, and of the other kernels.
const THREADS: usize = 32;
const ANY_THREADS: usize = 128;
/// Blocks of the walks that an H100 or H200 holds at a time, forward and backward: constants, so that the order of the
/// backward sums is the same on every device.
const FORWARD_BLOCKS: usize = 132 * 16;
const BACKWARD_BLOCKS: usize = 132 * 8;
/// Blocks that share a sum where taps are walked by loops.
const ANY_BLOCKS: usize = 528;

/// Whether the walks take a call: filters of 3 or 4 taps, columns in aligned vectors of `v`.
fn walked(Dims { b, n, w, c, k }: Dims, offset: usize, v: usize) -> bool {
    let aligned = [w, c, offset].iter().all(|columns| columns.is_multiple_of(v));
    matches!(k, 3 | 4) && aligned && i32::try_from(b * n).is_ok()
}

/// Tokens of a segment, segments of a sample, blocks in all.
fn segments(Dims { b, n, c, .. }: Dims, v: usize, blocks: usize, least: usize) -> [usize; 3] {
    let tiles = (c / v).div_ceil(THREADS);
    let length = n.div_ceil((blocks / (b * tiles)).max(1)).max(least);
    [length, n.div_ceil(length), b * n.div_ceil(length) * tiles]
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, w: width, c, k } = a.dims;
    let (offset, reverse, v) = (a.params.offset, usize::from(a.params.reverse), 16 / size_of::<T>());
    let (p, weight, bias, y) = (a.p, a.weight, a.bias, a.y);
    if !walked(a.dims, offset, v) {
        return ConvSiluAnyForward { p, weight, bias, y, rows: b * n, n, width, c, k, offset, reverse }
            .launch(queue, Shape::new((b * n * c).div_ceil(ANY_THREADS), ANY_THREADS));
    }
    let [length, segments, blocks] = segments(a.dims, v, FORWARD_BLOCKS, 16);
    let shape = Shape::new(blocks, THREADS);
    if k == 3 {
        ConvSilu3Forward { p, weight, bias, y, n, width, c, offset, reverse, length, segments }.launch(queue, shape)
    } else {
        ConvSilu4Forward { p, weight, bias, y, n, width, c, offset, reverse, length, segments }.launch(queue, shape)
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, w: width, c, k } = a.dims;
    let (offset, reverse, v) = (a.params.offset, usize::from(a.params.reverse), 16 / size_of::<T>());
    let (dy, p, weight, bias, rows) = (a.dy, a.p, a.weight, a.bias, b * n);
    let wanted = a.dweight.is_some() || a.dbias.is_some();
    if let (Some(dp), true) = (a.dp, width > c) {
        ConvSiluBackwardRest { dp, rows, width, c, offset }
            .launch(queue, Shape::new(rows.div_ceil(ANY_THREADS / 32), ANY_THREADS))?;
    }
    let (partials, groups): (Out<f32>, usize);
    if walked(a.dims, offset, v) {
        let [length, segments, blocks] = segments(a.dims, v, BACKWARD_BLOCKS, 32);
        (groups, partials) =
            (b * segments, if wanted { queue.scratch(b * segments * (k + 1) * c)? } else { Out::at(0) });
        let (dp, shape) = (a.dp.or_null(), Shape::new(blocks, THREADS));
        if k == 3 {
            ConvSilu3Backward { dy, p, weight, bias, dp, partials, n, width, c, offset, reverse, length, segments }
                .launch(queue, shape)?;
        } else {
            ConvSilu4Backward { dy, p, weight, bias, dp, partials, n, width, c, offset, reverse, length, segments }
                .launch(queue, shape)?;
        }
    } else {
        let (du, shape): (Out<f32>, _) =
            (queue.scratch(rows * c)?, Shape::new((rows * c).div_ceil(ANY_THREADS), ANY_THREADS));
        ConvSiluAnyBackwardGate { dy, p, weight, bias, du, rows, n, width, c, k, offset, reverse }
            .launch(queue, shape)?;
        let du = du.read();
        if let Some(dp) = a.dp {
            ConvSiluAnyBackwardInput { du, weight, dp, rows, n, width, c, k, offset, reverse }.launch(queue, shape)?;
        }
        let tiles = c.div_ceil(ANY_THREADS);
        groups = (ANY_BLOCKS / ((k + 1) * tiles)).clamp(1, rows.div_ceil(8));
        partials = if wanted { queue.scratch(groups * (k + 1) * c)? } else { Out::at(0) };
        if wanted {
            ConvSiluAnyBackwardSums { du, p, partials, rows, n, width, c, k, offset, reverse, groups }
                .launch(queue, Shape::new(groups * (k + 1) * tiles, ANY_THREADS))?;
        }
    }
    if !wanted {
        return Ok(());
    }
    let (dweight, dbias) = (a.dweight.or_null(), a.dbias.or_null());
    ConvSiluBackwardFilters { partials: partials.read(), dweight, dbias, c, k, groups }
        .launch(queue, Shape::new((k + 1) * c.div_ceil(32), 512))
}
