//! Which kernel takes which shape.

use crate::generated::long_conv::{Dims, GpuBackward, GpuForward, Params};
use crate::launch::{Element, In, OrNull, Out, Queue, Shape};
use crate::launchers::long_conv::{
    LongConvBackwardAdd, LongConvBackwardFilter, LongConvBackwardGates, LongConvBackwardP, LongConvBackwardShort,
    LongConvForward, LongConvGates, LongConvTaps,
};

/// Times or lags of a block: four warps of a run each.
const BLOCK: usize = 4 * 16;
/// Tokens that a part of the sums over all tokens has at least, and parts at the most.
const PART: [usize; 2] = [256, 64];

fn elementwise(items: usize) -> Shape {
    Shape::new(items.div_ceil(256).clamp(1, 1 << 14), 256)
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, c, k, l }, Params { lead, centre, reversed }) = (a.dims, a.params);
    let (p, short_weight, short_bias) = (a.p, a.short_weight.or_null(), a.short_bias.or_null());
    let (u, taps) = (queue.scratch::<f32>(b * n * c)?, queue.scratch::<f32>(c * l)?);
    let (dy, dm) = (In::at(0), Out::at(0));
    LongConvGates { p, short_weight, short_bias, dy, u, dm, b, n, c, k, lead, reversed }
        .launch(queue, elementwise(b * n * c))?;
    LongConvTaps { filter: a.filter, taps, c, l }.launch(queue, elementwise(c * l))?;
    let (u, taps, skip, y) = (u.read(), taps.read(), a.skip, a.y);
    LongConvForward { p, short_weight, short_bias, u, taps, skip, y, n, c, k, l, lead, centre, reversed }
        .launch(queue, Shape::new(c.div_ceil(32) * n.div_ceil(BLOCK) * b, 128))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, c, k, l }, Params { lead, centre, reversed }) = (a.dims, a.params);
    let (dy, p, short_weight, short_bias) = (a.dy, a.p, a.short_weight.or_null(), a.short_bias.or_null());
    let (u, dm) = (queue.scratch::<f32>(b * n * c)?, queue.scratch::<f32>(b * n * c)?);
    LongConvGates { p, short_weight, short_bias, dy, u, dm, b, n, c, k, lead, reversed }
        .launch(queue, elementwise(b * n * c))?;
    let (u, dm) = (u.read(), dm.read());
    if a.dfilter.is_some() || a.dskip.is_some() {
        let (dfilter, dskip) = (a.dfilter.or_null(), a.dskip.or_null());
        LongConvBackwardFilter { u, dm, dfilter, dskip, b, n, c, l, centre, reversed }
            .launch(queue, Shape::new(c.div_ceil(32) * l.div_ceil(BLOCK), 128))?;
    }
    let short = a.dshort_weight.is_some() || a.dshort_bias.is_some();
    if !short && a.dp.is_none() {
        return Ok(());
    }
    let (d, taps) = (queue.scratch::<f32>(3 * b * n * c)?, queue.scratch::<f32>(c * l)?);
    LongConvTaps { filter: a.filter, taps, c, l }.launch(queue, elementwise(c * l))?;
    let (taps, skip) = (taps.read(), a.skip);
    LongConvBackwardGates { dy, p, short_weight, short_bias, u, dm, taps, skip, d, n, c, k, l, lead, centre, reversed }
        .launch(queue, Shape::new(c.div_ceil(32) * n.div_ceil(BLOCK) * b, 128))?;
    let d = d.read();
    if let Some(dp) = a.dp {
        LongConvBackwardP { d, short_weight, dp, b, n, c, k, lead, reversed }
            .launch(queue, elementwise(3 * b * n * c))?;
    }
    if short {
        let part = (b * n).div_ceil(PART[1]).max(PART[0]);
        let (parts, items) = ((b * n).div_ceil(part).max(1), 3 * c * (k + 1));
        let partials = queue.scratch::<f32>(parts * items)?;
        LongConvBackwardShort { d, p, partials, b, n, c, k, lead, reversed, part }
            .launch(queue, Shape::new(items.div_ceil(128), 128).y(parts))?;
        let (dshort_weight, dshort_bias) = (a.dshort_weight.or_null(), a.dshort_bias.or_null());
        LongConvBackwardAdd { partials: partials.read(), dshort_weight, dshort_bias, c, k, parts }
            .launch(queue, elementwise(items))?;
    }
    Ok(())
}
