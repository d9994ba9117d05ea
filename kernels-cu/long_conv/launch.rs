//! Which kernel takes which shape.

use crate::generated::long_conv::{BackwardWay, Dims, ForwardWay, GpuBackward, GpuForward, Params};
use crate::launch::{Element, In, OrNull, Out, Queue, Shape};
use crate::launchers::long_conv::*;
use crate::ways::choose;

/// Times or lags of a block: four warps of a run each.
const BLOCK: usize = 4 * 16;
/// Tokens that a part of the sums over all tokens has at least, and parts at the most.
const PART: [usize; 2] = [256, 64];

fn elementwise(items: usize) -> Shape {
    Shape::new(items.div_ceil(256).clamp(1, 1 << 14), 256)
}

/// Bits of the places of the largest ring of the ways by transforms.
const RING: [u32; 2] = [14, 10];
/// Times from which transforms are preferred: below, the direct way has less to do.
const TRANSFORMED: usize = 64;

/// The rings of a call and what its blocks need of memory.
struct Rings {
    bits: usize,
    /// Spectra of a block forward and backward.
    slots: [usize; 2],
    blocks: usize,
    shape: Shape,
}

impl Rings {
    /// Rings of at most 2^`limit` places.
    fn new(Dims { n, c, l, .. }: Dims, centre: usize, limit: u32) -> Rings {
        let bits = n.next_power_of_two().ilog2().clamp(4, limit);
        let size = 1usize << bits;
        let times = n.div_ceil(size);
        let (before, after) = (centre.min(n.saturating_sub(1)), (l - 1 - centre).min(n.saturating_sub(1)));
        let reach = |lags: usize| lags.div_ceil(size).min(times.saturating_sub(1));
        let distances = reach(before) + reach(after) + 1;
        // A block takes a multiprocessor where its ring is the largest.
        let blocks = c.min(132 * (1 << (14 - bits)).min(8));
        let shape = Shape::new(blocks, (size / 16).clamp(32, 512)).shared(&[(size + size / 16) * 8]);
        Rings { bits: bits as usize, slots: [distances + times, 2 * (distances + times)], blocks, shape }
    }

    /// Tables of roots, and spectra of `slots` a block.
    fn memory<T: Element, Q: Queue>(&self, queue: &mut Q, slots: usize) -> Result<[Out<f32>; 2], Q::Error> {
        let (size, bits) = (1 << self.bits, self.bits);
        let (table, spectra) = (queue.scratch::<f32>(4 * size)?, queue.scratch::<f32>(2 * size * slots * self.blocks)?);
        LongConvRoots { table, bits }.launch(queue, elementwise(2 * size), T::TYPE)?;
        Ok([table, spectra])
    }
}

/// Squares of 32 tokens and channels.
fn by_squares(Dims { b, n, c, .. }: Dims) -> Shape {
    Shape::new(c.div_ceil(32) * n.div_ceil(32) * b, 256)
}

fn forward_transformed<T: Element, Q: Queue>(queue: &mut Q, a: &GpuForward<T>, limit: u32) -> Result<(), Q::Error> {
    let (Dims { b, n, c, k, l }, Params { lead, centre, reversed }) = (a.dims, a.params);
    let (p, short_weight, short_bias) = (a.p, a.short_weight.or_null(), a.short_bias.or_null());
    let rings = Rings::new(a.dims, centre, limit);
    let (u, (dy, dm)) = (queue.scratch::<f32>(b * n * c)?, (In::at(0), Out::at(0)));
    LongConvRows { p, short_weight, short_bias, dy, u, dm, n, c, k, lead, reversed }
        .launch(queue, by_squares(a.dims))?;
    let [table, spectra] = rings.memory::<T, Q>(queue, rings.slots[0])?;
    let (filter, skip, table, bits, slots) = (a.filter, a.skip, table.read(), rings.bits, rings.slots[0]);
    LongConvTransform { filter, skip, table, spectra, u, b, n, c, l, centre, bits, slots }
        .launch(queue, rings.shape)?;
    LongConvResults { p, short_weight, short_bias, m: u.read(), y: a.y, n, c, k, lead, reversed }
        .launch(queue, by_squares(a.dims))
}

/// The gradients of the filter and the skip, and those of q, k and v after their short filters.
fn backward_transformed<T: Element, Q: Queue>(
    queue: &mut Q,
    a: &GpuBackward<T>,
    limit: u32,
) -> Result<In<f32>, Q::Error> {
    let (Dims { b, n, c, k, l }, Params { lead, centre, reversed }) = (a.dims, a.params);
    let (dy, p, short_weight, short_bias) = (a.dy, a.p, a.short_weight.or_null(), a.short_bias.or_null());
    let rings = Rings::new(a.dims, centre, limit);
    let (u, dm) = (queue.scratch::<f32>(b * n * c)?, queue.scratch::<f32>(b * n * c)?);
    LongConvRows { p, short_weight, short_bias, dy, u, dm, n, c, k, lead, reversed }
        .launch(queue, by_squares(a.dims))?;
    let [table, spectra] = rings.memory::<T, Q>(queue, rings.slots[1])?;
    let taps = queue.scratch::<f32>(l * rings.blocks)?;
    let (filter, skip, table, bits, slots) = (a.filter, a.skip, table.read(), rings.bits, rings.slots[1]);
    let (dfilter, dskip) = (a.dfilter.or_null(), a.dskip.or_null());
    LongConvTransformBackward {
        filter,
        skip,
        table,
        spectra,
        u,
        dm,
        taps,
        dfilter,
        dskip,
        b,
        n,
        c,
        l,
        centre,
        bits,
        slots,
    }
    .launch(queue, rings.shape)?;
    let (m, du, d) = (u.read(), dm.read(), queue.scratch::<f32>(3 * b * n * c)?);
    LongConvBackwardResults { dy, p, short_weight, short_bias, m, du, d, n, c, k, lead, reversed }
        .launch(queue, by_squares(a.dims))?;
    Ok(d.read())
}

/// The gradients of `p` and the short filters from those behind the filters, `d`.
fn backward_short<T: Element, Q: Queue>(queue: &mut Q, a: &GpuBackward<T>, d: In<f32>) -> Result<(), Q::Error> {
    let (Dims { b, n, c, k, .. }, Params { lead, reversed, .. }) = (a.dims, a.params);
    let (p, short_weight) = (a.p, a.short_weight.or_null());
    if let Some(dp) = a.dp {
        LongConvBackwardP { d, short_weight, dp, b, n, c, k, lead, reversed }
            .launch(queue, elementwise(3 * b * n * c))?;
    }
    if a.dshort_weight.is_some() || a.dshort_bias.is_some() {
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

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let takes = |way| match way {
        ForwardWay::Transform16k => a.dims.n >= TRANSFORMED,
        ForwardWay::Transform1k => a.dims.n > 1 << RING[1],
        ForwardWay::Direct => true,
    };
    match choose(queue, T::TYPE, &a.dims, takes) {
        ForwardWay::Transform16k => return forward_transformed(queue, &a, RING[0]),
        ForwardWay::Transform1k => return forward_transformed(queue, &a, RING[1]),
        ForwardWay::Direct => {}
    }
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
    let takes = |way| match way {
        BackwardWay::Transform16k => a.dims.n >= TRANSFORMED,
        BackwardWay::Transform1k => a.dims.n > 1 << RING[1],
        BackwardWay::Direct => true,
    };
    let limit = match choose(queue, T::TYPE, &a.dims, takes) {
        BackwardWay::Transform16k => Some(RING[0]),
        BackwardWay::Transform1k => Some(RING[1]),
        BackwardWay::Direct => None,
    };
    if let Some(limit) = limit {
        let d = backward_transformed(queue, &a, limit)?;
        return backward_short(queue, &a, d);
    }
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
    backward_short(queue, &a, d.read())
}
