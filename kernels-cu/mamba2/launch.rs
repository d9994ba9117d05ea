//! Which kernel takes which shape.

use crate::generated::mamba2::{BackwardWay, Dims, ForwardWay, GpuBackward, GpuForward, Params};
use crate::launch::{Element, In, OrNull, Out, Queue, Shape};
use crate::launchers::mamba2::*;
use crate::ways::choose;

/// Times of a chunk.
const CHUNK: usize = 64;
/// Blocks that segments of the tensor-core kernels aim at: two for each multiprocessor of an H100, whatever the device,
/// because the order of the sums follows from it.
const BLOCKS: usize = 264;

/// What both passes begin with.
struct Scanned {
    chunks: usize,
    dt: In<f32>,
    states: In<f32>,
    decays: In<f32>,
}

/// The launch of one block for each chunk of each head of each sample, and tile of `columns` values.
fn by_chunk(Dims { b, n, h, .. }: Dims, columns: usize) -> Shape {
    Shape::new(b * n.div_ceil(CHUNK) * h, 128).y(columns.div_ceil(32))
}

/// The launch of the sums over a chunk: tiles of 64×32 of the state.
fn by_state(dims: Dims) -> Shape {
    by_chunk(dims, 1).y(dims.e.div_ceil(64) * dims.k.div_ceil(32))
}

fn scan<T: Element, Q: Queue>(
    queue: &mut Q,
    Dims { b, n, h, e, k, .. }: Dims,
    states: Out<f32>,
    decays: In<f32>,
    back: usize,
) -> Result<(), Q::Error> {
    let (count, chunks) = (b * h * e * k, n.div_ceil(CHUNK));
    let shape = Shape::new(count.div_ceil(128).clamp(1, 1 << 14), 128);
    Mamba2Scan { states, decays, count: count as u64, chunks, each: e * k, back }.launch(queue, shape, T::TYPE)
}

/// Step sizes, and the state before every chunk.
fn scanned<T: Element, Q: Queue>(
    queue: &mut Q,
    dims: Dims,
    params: Params,
    [xbc, p, dt_bias, a_log]: [In<T>; 4],
) -> Result<Scanned, Q::Error> {
    let Dims { b, n, w, h, e, k } = dims;
    let (dt_offset, reverse, chunks) = (params.dt_offset, usize::from(params.reverse), n.div_ceil(CHUNK));
    let dt = queue.scratch::<f32>(b * n * h)?;
    let (states, decays) = (queue.scratch::<f32>(b * h * chunks * e * k)?, queue.scratch::<f32>(b * h * chunks)?);
    Mamba2Steps { p, dt_bias, dt, b, n, w, h, dt_offset, reverse }
        .launch(queue, Shape::new((b * n * h).div_ceil(256).clamp(1, 1 << 14), 256))?;
    let dt = dt.read();
    Mamba2States { xbc, a_log, dt, states, decays, n, h, e, k, reverse }.launch(queue, by_state(dims))?;
    let decays = decays.read();
    scan::<T, Q>(queue, dims, states, decays, 0)?;
    Ok(Scanned { chunks, dt, states: states.read(), decays })
}

/// Whether the tensor cores have kernels for heads and states of these widths.
fn on_tensor_cores(Dims { e, k, .. }: Dims) -> bool {
    e == 16 && k == 64
}

/// Heads of a block of the tensor-core kernels.
const HEADS: usize = 8;

/// Regions of a walk: `stages` of them with `tensors` that the heads share beside the values, step sizes and their sums, and
/// the products of pairs where two are shared.
fn walk_regions(stages: usize, tensors: usize) -> Vec<usize> {
    let (stage, sizes, sums) = (CHUNK * (272 + 144 * tensors), 4 * HEADS * CHUNK, 4 * HEADS * 4 * 17);
    let pairs = (tensors == 2).then_some(4 * 4 * 16 * 18);
    [Some(stages * stage), Some(sizes), Some(sums), pairs].into_iter().flatten().collect()
}

/// Tensors that decays come from, and what else a walk needs to know.
struct Walk<T> {
    dims: Dims,
    params: Params,
    xbc: In<T>,
    p: In<T>,
    dt_bias: In<T>,
    a_log: In<T>,
    segments: usize,
}

/// The state before every segment from `values` x, or with `back`, from the last segment to the first, the gradient of the
/// state after it from `values` dy; null where there is one segment.
fn segment_states<T: Element, Q: Queue>(
    queue: &mut Q,
    a: &Walk<T>,
    values: In<T>,
    back: usize,
) -> Result<In<f32>, Q::Error> {
    let Walk { dims: Dims { b, n, w, h, e, k }, params, xbc, p, dt_bias, a_log, segments } = *a;
    if segments == 1 {
        return Ok(In::at(0));
    }
    let (dt_offset, reverse) = (params.dt_offset, usize::from(params.reverse));
    let (states, decays) = (queue.scratch::<f32>(b * h * segments * e * k)?, queue.scratch::<f32>(b * h * segments)?);
    Mamba2MmaStates { values, xbc, p, dt_bias, a_log, states, decays, n, w, h, dt_offset, reverse, back, segments }
        .launch(queue, Shape::new(b * segments * h.div_ceil(HEADS), 256).shared(&walk_regions(2, 1)))?;
    let count = b * h * e * k;
    Mamba2Scan { states, decays: decays.read(), count: count as u64, chunks: segments, each: e * k, back: 0 }.launch(
        queue,
        Shape::new(count.div_ceil(128).clamp(1, 1 << 14), 128),
        T::TYPE,
    )?;
    Ok(states.read())
}

fn forward_mma<T: Element, Q: Queue>(queue: &mut Q, a: &GpuForward<T>, blocks: usize) -> Result<(), Q::Error> {
    let (dims @ Dims { b, n, w, h, .. }, params) = (a.dims, a.params);
    let GpuForward { xbc, p, dt_bias, a_log, skip, y, .. } = *a;
    let groups = h.div_ceil(HEADS);
    // At least four stages a segment.
    let segments = (blocks / (b * groups).max(1)).clamp(1, n.div_ceil(4 * CHUNK).max(1));
    let states = segment_states(queue, &Walk { dims, params, xbc, p, dt_bias, a_log, segments }, xbc, 0)?;
    let (residual, dt_offset, reverse) = (a.residual.or_null(), params.dt_offset, usize::from(params.reverse));
    Mamba2MmaWalk { xbc, p, dt_bias, a_log, skip, residual, states, y, n, w, h, dt_offset, reverse, segments }
        .launch(queue, Shape::new(b * segments * groups, 256).shared(&walk_regions(2, 2)))
}

fn backward_mma<T: Element, Q: Queue>(queue: &mut Q, a: &GpuBackward<T>) -> Result<(), Q::Error> {
    let (dims @ Dims { b, n, w, h, .. }, params) = (a.dims, a.params);
    let GpuBackward { dy, xbc, p, dt_bias, a_log, skip, .. } = *a;
    let (groups, chunks) = (h.div_ceil(HEADS), n.div_ceil(CHUNK));
    let walk = Walk { dims, params, xbc, p, dt_bias, a_log, segments: chunks };
    let states = segment_states(queue, &walk, xbc, 0)?;
    let dstates = segment_states(queue, &walk, dy, 1)?;
    if let Some(dp) = a.dp {
        queue.zero(dp, b * n * w)?;
    }
    let (shares, partials) = (queue.scratch::<f32>(groups * b * n * 128)?, queue.scratch::<f32>(3 * b * chunks * h)?);
    let (dxbc, dp, dt_offset, reverse) =
        (a.dxbc.or_null(), a.dp.or_null(), params.dt_offset, usize::from(params.reverse));
    let mut regions = walk_regions(1, 2);
    regions.extend([CHUNK * 272, 4 * HEADS * 16 * 128, 4 * HEADS * (16 * 17 + 48)]);
    Mamba2MmaBackward {
        dy,
        xbc,
        p,
        dt_bias,
        a_log,
        skip,
        states,
        dstates,
        dxbc,
        dp,
        shares,
        partials,
        b,
        n,
        w,
        h,
        dt_offset,
        reverse,
        chunks,
    }
    .launch(queue, Shape::new(b * chunks * groups, 256).shared(&regions))?;
    if let Some(dxbc) = a.dxbc {
        let (shares, rows) = (shares.read(), (b * n) as u64);
        Mamba2MmaShares { shares, dxbc, rows, h, groups }
            .launch(queue, Shape::new((b * n * 128).div_ceil(256).clamp(1, 1 << 14), 256))?;
    }
    head_sums(queue, a, partials.read())
}

/// The gradients of the heads' parameters from their parts.
fn head_sums<T: Element, Q: Queue>(queue: &mut Q, a: &GpuBackward<T>, partials: In<f32>) -> Result<(), Q::Error> {
    let Dims { b, n, h, .. } = a.dims;
    let (ddt_bias, da_log, dskip) = (a.ddt_bias.or_null(), a.da_log.or_null(), a.dskip.or_null());
    Mamba2BackwardHeads { partials, ddt_bias, da_log, dskip, h, parts: b * n.div_ceil(CHUNK) }
        .launch(queue, Shape::new(h.div_ceil(128), 128))
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    match choose(queue, T::TYPE, &a.dims, |way: ForwardWay| way == ForwardWay::Tiles || on_tensor_cores(a.dims)) {
        ForwardWay::Mma264 => return forward_mma(queue, &a, BLOCKS),
        ForwardWay::Mma528 => return forward_mma(queue, &a, 2 * BLOCKS),
        ForwardWay::Tiles => {}
    }
    let Scanned { dt, states, .. } = scanned(queue, a.dims, a.params, [a.xbc, a.p, a.dt_bias, a.a_log])?;
    let (Dims { n, h, e, k, .. }, reverse) = (a.dims, usize::from(a.params.reverse));
    let (xbc, a_log, skip, residual, y) = (a.xbc, a.a_log, a.skip, a.residual.or_null(), a.y);
    Mamba2Forward { xbc, a_log, skip, residual, dt, states, y, n, h, e, k, reverse }.launch(queue, by_chunk(a.dims, e))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    match choose(queue, T::TYPE, &a.dims, |way: BackwardWay| way == BackwardWay::Tiles || on_tensor_cores(a.dims)) {
        BackwardWay::Mma => return backward_mma(queue, &a),
        BackwardWay::Tiles => {}
    }
    let (dy, xbc, p, dt_bias, a_log) = (a.dy, a.xbc, a.p, a.dt_bias, a.a_log);
    let Scanned { chunks, dt, states, decays } = scanned(queue, a.dims, a.params, [xbc, p, dt_bias, a_log])?;
    let Dims { b, n, w, h, e, k } = a.dims;
    let (dt_offset, reverse) = (a.params.dt_offset, usize::from(a.params.reverse));
    let dstates = queue.scratch::<f32>(b * h * chunks * e * k)?;
    Mamba2BackwardStates { dy, xbc, a_log, dt, dstates, n, h, e, k, reverse }.launch(queue, by_state(a.dims))?;
    scan::<T, Q>(queue, a.dims, dstates, decays, 1)?;
    let dstates = dstates.read();
    if let Some(dxbc) = a.dxbc {
        Mamba2BackwardX { dy, xbc, a_log, skip: a.skip, dt, dstates, dxbc, n, h, e, k, reverse }
            .launch(queue, by_chunk(a.dims, e))?;
        Mamba2BackwardBc { dy, xbc, a_log, dt, states, dstates, dxbc, n, h, e, k, reverse }
            .launch(queue, Shape::new(b * chunks, 128).y(k.div_ceil(32)))?;
    }
    if let Some(dp) = a.dp {
        queue.zero(dp, b * n * w)?;
    }
    let (dp, partials) = (a.dp.or_null(), queue.scratch::<f32>(3 * b * chunks * h)?);
    Mamba2BackwardSteps {
        dy,
        xbc,
        p,
        dt_bias,
        a_log,
        dt,
        states,
        dstates,
        dp,
        partials,
        n,
        w,
        h,
        e,
        k,
        dt_offset,
        reverse,
    }
    .launch(queue, by_chunk(a.dims, 1))?;
    head_sums(queue, &a, partials.read())
}
