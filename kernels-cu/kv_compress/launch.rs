//! Which kernel takes which shape.

use crate::generated::kv_compress::{Dims, GpuBackward, GpuForward};
use crate::launch::{Element, OrNull, Out, Queue, Shape};
use crate::launchers::kv_compress::{
    KvCompressBackward, KvCompressBackwardAny, KvCompressBackwardParameters, KvCompressBackwardRest,
    KvCompressBackwardSums, KvCompressBackwardSumsAny, KvCompressForward, KvCompressForwardAny,
};

/// Threads of a block, and vectors where each of its warps has one.
const THREADS: usize = 128;
const WARPS: usize = THREADS / 32;
/// Channels and vectors of a block of the sums.
const TILE: [usize; 2] = [128, 8];
/// Blocks that share a sum. A constant, so that the order of the sums is the same on every device.
const BLOCKS: usize = 528;

/// Whether a warp can hold a vector in registers, with the taps in constant places.
fn in_registers(Dims { d, k, .. }: Dims) -> bool {
    k == 2 && d.is_multiple_of(8) && d <= 1280
}

/// Keys and values of the coarse grid.
fn vectors(Dims { b, gh, gw, k, .. }: Dims) -> usize {
    b * (gh / k) * (gw / k) * 2
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { gh, gw, r, d, k, .. }, first, eps) = (a.dims, a.params.first, a.params.eps);
    let (x, weight, bias, gamma, beta) = (a.x, a.weight, a.bias, a.gamma, a.beta);
    let (y, mean, rstd, vectors) = (a.y, a.mean, a.rstd, vectors(a.dims));
    let shape = Shape::new(vectors.div_ceil(WARPS), THREADS);
    if in_registers(a.dims) {
        KvCompressForward { x, weight, bias, gamma, beta, y, mean, rstd, vectors, gh, gw, r, d, first, eps }
            .launch(queue, shape)
    } else {
        KvCompressForwardAny { x, weight, bias, gamma, beta, y, mean, rstd, vectors, gh, gw, r, d, k, first, eps }
            .launch(queue, shape)
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let (Dims { b, gh, gw, r, d, k }, first) = (a.dims, a.params.first);
    let (dy, x, weight, bias, gamma, mean, rstd) = (a.dy, a.x, a.weight, a.bias, a.gamma, a.mean, a.rstd);
    let (dx, vectors, registers) = (a.dx.or_null(), vectors(a.dims), in_registers(a.dims));
    if let Some(dx) = a.dx {
        let all = b * gh * gw * r;
        KvCompressBackwardRest { dx, all, gh, gw, r, d, k, first }
            .launch(queue, Shape::new(all.div_ceil(WARPS), THREADS))?;
    }
    let [dc, norm]: [Out<f32>; 2] = [queue.scratch(vectors * d)?, queue.scratch(vectors * d)?];
    let shape = Shape::new(vectors.div_ceil(WARPS), THREADS);
    if registers {
        KvCompressBackward { dy, x, weight, bias, gamma, mean, rstd, dx, dc, norm, vectors, gh, gw, r, d, first }
            .launch(queue, shape)?;
    } else {
        KvCompressBackwardAny { dy, x, weight, bias, gamma, mean, rstd, dx, dc, norm, vectors, gh, gw, r, d, k, first }
            .launch(queue, shape)?;
    }
    let (dweight, dbias, dgamma, dbeta) =
        (a.dweight.or_null(), a.dbias.or_null(), a.dgamma.or_null(), a.dbeta.or_null());
    if [dweight, dbias, dgamma, dbeta].iter().all(|out| out.address() == 0) {
        return Ok(());
    }
    let (rows, dc, norm) = (k * k + 3, dc.read(), norm.read());
    let tiles = d.div_ceil(if registers { TILE[0] } else { THREADS });
    let at_most = vectors.div_ceil(if registers { 2 * TILE[1] } else { 8 });
    let splits = (BLOCKS / (tiles * if registers { 1 } else { rows })).clamp(1, at_most);
    let partials: Out<f32> = queue.scratch(splits * rows * d)?;
    if registers {
        KvCompressBackwardSums { dy, x, dc, norm, partials, vectors, gh, gw, r, d, first, splits }
            .launch(queue, Shape::new(splits * tiles, THREADS))?;
    } else {
        KvCompressBackwardSumsAny { dy, x, dc, norm, partials, vectors, gh, gw, r, d, k, first, splits }
            .launch(queue, Shape::new(splits * rows * tiles, THREADS))?;
    }
    KvCompressBackwardParameters { partials: partials.read(), dweight, dbias, dgamma, dbeta, d, k, splits }
        .launch(queue, Shape::new(rows * d.div_ceil(32), 512))
}
