//! Which kernel takes which shape.

use crate::generated::gated_conv::{Dims, GpuBackward, GpuForward, Params};
use crate::launch::{Element, In, OrNull, Out, Queue, Shape};
use crate::launchers::gated_conv::{
    GatedConvAnyBackwardGate, GatedConvAnyBackwardInput, GatedConvAnyBackwardProduct, GatedConvAnyBackwardSums,
    GatedConvAnyForward, GatedConvAnyProduct, GatedConvBackwardFilters, GatedConvSe3Backward, GatedConvSe3Forward,
    GatedConvSe4Backward, GatedConvSe4Forward, GatedConvSe7Backward, GatedConvSe7Forward, GatedConvX3Backward,
    GatedConvX3Forward, GatedConvX4Backward, GatedConvX4Forward, GatedConvX7Backward, GatedConvX7Forward,
    GatedConvY3Backward, GatedConvY3Forward, GatedConvY4Backward, GatedConvY4Forward, GatedConvY7Backward,
    GatedConvY7Forward,
};

/// Threads of a block of the fused kernels, each with two channels; of the others, which have 4 tokens by 32 channels.
const THREADS: usize = 32;
const ANY_THREADS: usize = 128;
/// Blocks of the fused kernels that an H100 or H200 holds at a time, forward and backward: all start together and end
/// together. Constants, so that the order of the backward sums is the same on every device.
const FORWARD_BLOCKS: usize = 132 * 20;
const BACKWARD_BLOCKS: usize = 132 * 12;
/// Blocks that share a sum where the filters are walked by loops.
const ANY_BLOCKS: usize = 528;

/// Which of the fused kernels takes a call.
#[derive(Clone, Copy)]
enum Fused {
    /// Both filters.
    Se,
    /// The short one.
    X,
    /// The inner one.
    Y,
}

/// The fused kernels for a call: two channels a thread, both of the same direction.
fn fused(dims: Dims, params: Params, short: bool, inner: bool) -> Option<Fused> {
    let Dims { b, n, c, k } = dims;
    let pairs = c.is_multiple_of(2) && params.reversed.is_multiple_of(2) && i32::try_from(b * n).is_ok();
    match (pairs && matches!(k, 3 | 4 | 7), short, inner) {
        (true, true, true) => Some(Fused::Se),
        (true, true, false) => Some(Fused::X),
        (true, false, true) => Some(Fused::Y),
        _ => None,
    }
}

/// Tokens of a segment and segments of a sample, for `blocks` blocks in all and at least `least` tokens a segment.
fn segments(Dims { b, n, c, .. }: Dims, blocks: usize, least: usize) -> [usize; 3] {
    let tiles = c.div_ceil(2 * THREADS);
    let length = n.div_ceil((blocks / (b * tiles)).max(1)).max(least);
    [length, n.div_ceil(length), b * n.div_ceil(length) * tiles]
}

/// Groups of K steps in flight.
fn ahead(k: usize) -> usize {
    match k {
        3 => 4,
        4 => 3,
        _ => 2,
    }
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, c, k } = a.dims;
    let Params { lead, reversed } = a.params;
    let (p, y, short_weight, short_bias) = (a.p, a.y, a.short_weight.or_null(), a.short_bias.or_null());
    let (inner_weight, inner_bias) = (a.inner_weight.or_null(), a.inner_bias.or_null());
    let kind = fused(a.dims, a.params, a.short_weight.is_some(), a.inner_weight.is_some());
    let [length, segments, blocks] = segments(a.dims, FORWARD_BLOCKS, 16);
    let ring = (ahead(k) + 1) * k * 3 * THREADS * 2 * size_of::<T>();
    let shape = Shape::new(blocks, THREADS).shared(&[ring]);
    macro_rules! se {
        ($kernel:ident) => {
            $kernel { p, short_weight, short_bias, inner_weight, inner_bias, y, n, c, lead, reversed, length, segments }
                .launch(queue, shape)
        };
    }
    macro_rules! x {
        ($kernel:ident) => {
            $kernel { p, short_weight, short_bias, y, n, c, lead, reversed, length, segments }.launch(queue, shape)
        };
    }
    macro_rules! y {
        ($kernel:ident) => {
            $kernel { p, inner_weight, inner_bias, y, n, c, lead, reversed, length, segments }.launch(queue, shape)
        };
    }
    match (kind, k) {
        (Some(Fused::Se), 3) => se!(GatedConvSe3Forward),
        (Some(Fused::Se), 4) => se!(GatedConvSe4Forward),
        (Some(Fused::Se), _) => se!(GatedConvSe7Forward),
        (Some(Fused::X), 3) => x!(GatedConvX3Forward),
        (Some(Fused::X), 4) => x!(GatedConvX4Forward),
        (Some(Fused::X), _) => x!(GatedConvX7Forward),
        (Some(Fused::Y), 3) => y!(GatedConvY3Forward),
        (Some(Fused::Y), 4) => y!(GatedConvY4Forward),
        (Some(Fused::Y), _) => y!(GatedConvY7Forward),
        (None, taps) => {
            let kv: Out<f32> = queue.scratch(b * n * c)?;
            let shape = Shape::new(b * n.div_ceil(4) * c.div_ceil(32), ANY_THREADS);
            GatedConvAnyProduct { p, short_weight, short_bias, kv, b, n, c, taps, lead, reversed }
                .launch(queue, shape)?;
            let kv = kv.read();
            GatedConvAnyForward {
                p,
                short_weight,
                short_bias,
                inner_weight,
                inner_bias,
                kv,
                y,
                b,
                n,
                c,
                taps,
                lead,
                reversed,
            }
            .launch(queue, shape)
        }
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Dims { c, k, .. } = a.dims;
    let has = [a.short_weight.is_some(), a.inner_weight.is_some()];
    let rows = (3 * usize::from(has[0]) + usize::from(has[1])) * (k + 1);
    let wanted =
        a.dshort_weight.is_some() || a.dshort_bias.is_some() || a.dinner_weight.is_some() || a.dinner_bias.is_some();
    let kind = fused(a.dims, a.params, has[0], has[1]);
    let (partials, groups) = match kind {
        Some(kind) => fused_backward(queue, &a, kind, if wanted { rows } else { 0 })?,
        None => any_backward(queue, &a, if wanted { rows } else { 0 })?,
    };
    if !wanted || rows == 0 {
        return Ok(());
    }
    GatedConvBackwardFilters {
        partials,
        dshort_weight: a.dshort_weight.or_null(),
        dshort_bias: a.dshort_bias.or_null(),
        dinner_weight: a.dinner_weight.or_null(),
        dinner_bias: a.dinner_bias.or_null(),
        c,
        taps: k,
        has_short: usize::from(has[0]),
        rows,
        groups,
    }
    .launch(queue, Shape::new(rows * c.div_ceil(32), 512))
}

/// Partial sums of the filters' gradients (`rows` of them, or none where 0) and how many there are of each.
fn fused_backward<T: Element, Q: Queue>(
    queue: &mut Q,
    a: &GpuBackward<T>,
    kind: Fused,
    rows: usize,
) -> Result<(In<f32>, usize), Q::Error> {
    let Dims { b, n, c, k } = a.dims;
    let Params { lead, reversed } = a.params;
    let (dy, p, short_weight, short_bias) = (a.dy, a.p, a.short_weight.or_null(), a.short_bias.or_null());
    let (inner_weight, inner_bias) = (a.inner_weight.or_null(), a.inner_bias.or_null());
    let [length, segments, blocks] = segments(a.dims, BACKWARD_BLOCKS, 32);
    let dp = match a.dp {
        Some(dp) => dp,
        None => queue.scratch(b * n * 3 * c)?,
    };
    let partials = if rows > 0 { queue.scratch::<f32>(b * segments * rows * c)? } else { Out::at(0) };
    let both = matches!(kind, Fused::Se);
    let slots = ahead(k) + if both { 3 } else { 1 };
    let mut regions = vec![slots * k * 4 * THREADS * 2 * size_of::<T>()];
    if both {
        regions.push((2 * k + 8) * THREADS * 8);
    }
    // Taps, as kTapsInShared of the source says.
    let in_shared = match k {
        3 => 0,
        4 => usize::from(both),
        _ => 4,
    };
    if in_shared > 0 {
        regions.push(in_shared * k * THREADS * 8);
    }
    let shape = Shape::new(blocks, THREADS).shared(&regions);
    macro_rules! se {
        ($kernel:ident) => {
            $kernel {
                dy,
                p,
                short_weight,
                short_bias,
                inner_weight,
                inner_bias,
                dp,
                partials,
                n,
                c,
                lead,
                reversed,
                length,
                segments,
            }
            .launch(queue, shape)
        };
    }
    macro_rules! x {
        ($kernel:ident) => {
            $kernel { dy, p, short_weight, short_bias, dp, partials, n, c, lead, reversed, length, segments }
                .launch(queue, shape)
        };
    }
    macro_rules! y {
        ($kernel:ident) => {
            $kernel { dy, p, inner_weight, inner_bias, dp, partials, n, c, lead, reversed, length, segments }
                .launch(queue, shape)
        };
    }
    match (kind, k) {
        (Fused::Se, 3) => se!(GatedConvSe3Backward),
        (Fused::Se, 4) => se!(GatedConvSe4Backward),
        (Fused::Se, _) => se!(GatedConvSe7Backward),
        (Fused::X, 3) => x!(GatedConvX3Backward),
        (Fused::X, 4) => x!(GatedConvX4Backward),
        (Fused::X, _) => x!(GatedConvX7Backward),
        (Fused::Y, 3) => y!(GatedConvY3Backward),
        (Fused::Y, 4) => y!(GatedConvY4Backward),
        (Fused::Y, _) => y!(GatedConvY7Backward),
    }?;
    Ok((partials.read(), b * segments))
}

/// As [`fused_backward`], by kernels that go through memory between the steps.
fn any_backward<T: Element, Q: Queue>(
    queue: &mut Q,
    a: &GpuBackward<T>,
    rows: usize,
) -> Result<(In<f32>, usize), Q::Error> {
    let (Dims { b, n, c, k: taps }, Params { lead, reversed }) = (a.dims, a.params);
    let (dy, p, short_weight, short_bias) = (a.dy, a.p, a.short_weight.or_null(), a.short_bias.or_null());
    let (inner_weight, inner_bias) = (a.inner_weight.or_null(), a.inner_bias.or_null());
    let all = b * n * c;
    let [kv, dc, du]: [Out<f32>; 3] = [queue.scratch(all)?, queue.scratch(all)?, queue.scratch(3 * all)?];
    let shape = Shape::new(b * n.div_ceil(4) * c.div_ceil(32), ANY_THREADS);
    GatedConvAnyProduct { p, short_weight, short_bias, kv, b, n, c, taps, lead, reversed }.launch(queue, shape)?;
    let kv = kv.read();
    GatedConvAnyBackwardGate {
        dy,
        p,
        short_weight,
        short_bias,
        inner_weight,
        inner_bias,
        kv,
        dc,
        du,
        b,
        n,
        c,
        taps,
        lead,
        reversed,
    }
    .launch(queue, shape)?;
    let dc = dc.read();
    GatedConvAnyBackwardProduct { p, short_weight, short_bias, inner_weight, dc, du, b, n, c, taps, lead, reversed }
        .launch(queue, shape)?;
    let du = du.read();
    if let Some(dp) = a.dp {
        GatedConvAnyBackwardInput { short_weight, du, dp, b, n, c, taps, lead, reversed }.launch(queue, shape)?;
    }
    if rows == 0 {
        return Ok((In::at(0), 0));
    }
    let tiles = c.div_ceil(ANY_THREADS);
    let groups = (ANY_BLOCKS / (rows * tiles)).clamp(1, (b * n).div_ceil(8));
    let partials: Out<f32> = queue.scratch(groups * rows * c)?;
    let has_short = usize::from(a.short_weight.is_some());
    let has_inner = usize::from(a.inner_weight.is_some());
    GatedConvAnyBackwardSums { p, kv, dc, du, partials, b, n, c, taps, lead, reversed, has_short, has_inner, groups }
        .launch(queue, Shape::new(groups * rows * tiles, ANY_THREADS))?;
    Ok((partials.read(), groups))
}
