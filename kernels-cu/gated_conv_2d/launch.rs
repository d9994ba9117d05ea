//! Which kernel takes which shape.

use crate::generated::gated_conv_2d::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, OrNull, Out, Queue, Shape};
use crate::launchers::gated_conv_2d::{
    GatedConv2dBackwardFilters, GatedConv2dBackwardGate, GatedConv2dBackwardInput, GatedConv2dBackwardProduct,
    GatedConv2dBackwardSums, GatedConv2dForward, GatedConv2dProduct, GatedConv2dSe3Forward, GatedConv2dSe3Product,
    GatedConv2dX3Forward, GatedConv2dY3Forward,
};

/// Threads of a block: 4 tokens by 32 channels.
const THREADS: usize = 128;
/// Blocks that share a sum. A constant, so that the order of the sums is the same on every device.
const BLOCKS: usize = 528;

/// Blocks of 4 tokens of a sample by 32 channels.
fn places(Dims { b, gh, gw, c, .. }: Dims) -> Shape {
    Shape::new(b * (gh * gw).div_ceil(4) * c.div_ceil(32), THREADS)
}

/// Threads of a walk, each with two channels, and the columns that it has at the most.
const WALK_THREADS: usize = 32;
const WALK_COLUMNS: usize = 32;

/// Columns of a walk, walks of a row, and the launch of them all: a walk makes two rows of the grid, in f32 one.
fn walks<T: Element>(Dims { b, gh, gw, c, .. }: Dims) -> (usize, usize, Shape) {
    let rows = if size_of::<T>() == 2 { 2 } else { 1 };
    let length = gw.div_ceil(gw.div_ceil(WALK_COLUMNS).max(1)).max(1);
    let segments = gw.div_ceil(length);
    let blocks = b * gh.div_ceil(rows) * segments * c.div_ceil(2 * WALK_THREADS);
    (length, segments, Shape::new(blocks, WALK_THREADS))
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, gh, gw, c, k } = a.dims;
    let (p, y, short_weight, short_bias) = (a.p, a.y, a.short_weight.or_null(), a.short_bias.or_null());
    let (inner_weight, inner_bias) = (a.inner_weight.or_null(), a.inner_bias.or_null());
    let walked = k == 3 && c.is_multiple_of(2);
    let (length, segments, shape) = walks::<T>(a.dims);
    match (walked, a.short_weight.is_some(), a.inner_weight.is_some()) {
        (true, true, true) => {
            let kv: Out<f32> = queue.scratch(b * gh * gw * c)?;
            GatedConv2dSe3Product { p, short_weight, short_bias, kv, gh, gw, c, length, segments }
                .launch(queue, shape)?;
            let kv = kv.read();
            return GatedConv2dSe3Forward {
                p,
                short_weight,
                short_bias,
                inner_weight,
                inner_bias,
                kv,
                y,
                gh,
                gw,
                c,
                length,
                segments,
            }
            .launch(queue, shape);
        }
        (true, true, false) => {
            return GatedConv2dX3Forward { p, short_weight, short_bias, y, gh, gw, c, length, segments }
                .launch(queue, shape);
        }
        (true, false, true) => {
            return GatedConv2dY3Forward { p, inner_weight, inner_bias, y, gh, gw, c, length, segments }
                .launch(queue, shape);
        }
        _ => {}
    }
    let shape = places(a.dims);
    let kv: Out<f32> = queue.scratch(b * gh * gw * c)?;
    GatedConv2dProduct { p, short_weight, short_bias, kv, b, gh, gw, c, k }.launch(queue, shape)?;
    let kv = kv.read();
    GatedConv2dForward { p, short_weight, short_bias, inner_weight, inner_bias, kv, y, b, gh, gw, c, k }
        .launch(queue, shape)
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Dims { b, gh, gw, c, k } = a.dims;
    let (dy, p, short_weight, short_bias) = (a.dy, a.p, a.short_weight.or_null(), a.short_bias.or_null());
    let (inner_weight, inner_bias, shape) = (a.inner_weight.or_null(), a.inner_bias.or_null(), places(a.dims));
    let (has_short, has_inner) = (usize::from(a.short_weight.is_some()), usize::from(a.inner_weight.is_some()));
    let all = b * gh * gw * c;
    let [kv, dc, du]: [Out<f32>; 3] = [queue.scratch(all)?, queue.scratch(all)?, queue.scratch(3 * all)?];
    GatedConv2dProduct { p, short_weight, short_bias, kv, b, gh, gw, c, k }.launch(queue, shape)?;
    let kv = kv.read();
    GatedConv2dBackwardGate { dy, p, short_weight, short_bias, inner_weight, inner_bias, kv, dc, du, b, gh, gw, c, k }
        .launch(queue, shape)?;
    let dc = dc.read();
    GatedConv2dBackwardProduct { p, short_weight, short_bias, inner_weight, dc, du, b, gh, gw, c, k }
        .launch(queue, shape)?;
    let du = du.read();
    if let Some(dp) = a.dp {
        GatedConv2dBackwardInput { short_weight, du, dp, b, gh, gw, c, k }.launch(queue, shape)?;
    }
    let rows = (3 * has_short + has_inner) * (k * k + 1);
    let (dshort_weight, dshort_bias) = (a.dshort_weight.or_null(), a.dshort_bias.or_null());
    let (dinner_weight, dinner_bias) = (a.dinner_weight.or_null(), a.dinner_bias.or_null());
    let wanted = [dshort_weight, dshort_bias, dinner_weight, dinner_bias].iter().any(|out| out.address() != 0);
    if !wanted || rows == 0 {
        return Ok(());
    }
    let tiles = c.div_ceil(THREADS);
    let groups = (BLOCKS / (rows * tiles)).clamp(1, (b * gh * gw).div_ceil(8));
    let partials: Out<f32> = queue.scratch(groups * rows * c)?;
    GatedConv2dBackwardSums { p, kv, dc, du, partials, b, gh, gw, c, k, has_short, has_inner, groups }
        .launch(queue, Shape::new(groups * rows * tiles, THREADS))?;
    let partials = partials.read();
    GatedConv2dBackwardFilters {
        partials,
        dshort_weight,
        dshort_bias,
        dinner_weight,
        dinner_bias,
        c,
        k,
        has_short,
        rows,
        groups,
    }
    .launch(queue, Shape::new(rows * c.div_ceil(32), 512))
}
