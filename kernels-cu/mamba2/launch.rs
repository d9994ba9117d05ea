//! Which kernel takes which shape.

use crate::generated::mamba2::{Dims, GpuBackward, GpuForward, Params};
use crate::launch::{Element, In, OrNull, Out, Queue, Shape};
use crate::launchers::mamba2::{
    Mamba2BackwardBc, Mamba2BackwardHeads, Mamba2BackwardStates, Mamba2BackwardSteps, Mamba2BackwardX, Mamba2Forward,
    Mamba2Scan, Mamba2States, Mamba2Steps,
};

/// Times of a chunk.
const CHUNK: usize = 64;

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

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
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
    let (ddt_bias, da_log, dskip) = (a.ddt_bias.or_null(), a.da_log.or_null(), a.dskip.or_null());
    Mamba2BackwardHeads { partials: partials.read(), ddt_bias, da_log, dskip, h, parts: b * chunks }
        .launch(queue, Shape::new(h.div_ceil(128), 128))
}
