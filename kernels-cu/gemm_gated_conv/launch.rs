//! Which kernel takes which shape.

use super::{gates, projection};
use crate::generated::gemm_gated_conv::{Dims, ForwardWay, GpuBackward, GpuForward, Params};
use crate::generated::{gated_conv, gemm};
use crate::launch::{Element, In, OrNull, Out, Queue, Shape, TensorMap};
use crate::launchers::gemm_gated_conv::{GemmGatedConvMma128x96, GemmGatedConvMma128x192, GemmGatedConvWgmma128x192};
use crate::ways;
use std::marker::PhantomData;

/// Rows of a tile of the projection.
const ROWS: usize = 128;
/// Taps that a tile's rows are worth at the most: an eighth of them is computed twice then.
const TAPS: usize = 17;

/// Channels of a tile.
fn channels(way: ForwardWay) -> usize {
    if way == ForwardWay::Mma128x96 { 32 } else { 64 }
}

/// Bytes of a tile of the projection: rows of words of two channels, and four words.
fn tile_bytes(channels: usize) -> usize {
    4 * ROWS * (3 * channels / 2 + 4)
}

/// Whether the fused ways take a shape.
fn fits(dims: &Dims, params: &Params) -> bool {
    dims.d.is_multiple_of(8) && dims.c.is_multiple_of(2) && params.reversed.is_multiple_of(2) && dims.k <= TAPS
}

/// Results of a tile: its rows less those that taps reach, on either side where channels of both directions meet in one.
fn tokens(Dims { c, k, .. }: Dims, Params { lead, reversed, .. }: Params, channels: usize) -> usize {
    let straight = c - reversed;
    let mixed = straight > 0 && reversed > 0 && !straight.is_multiple_of(channels);
    ROWS - if mixed { 2 * lead.max(k - 1 - lead) } else { k - 1 }
}

/// A matrix `[rows, columns]` of bf16 whose boxes are 64 columns, 128 bytes, by `height` rows.
fn map<T>(at: In<T>, rows: usize, columns: usize, height: u32) -> TensorMap {
    TensorMap {
        element: 9,
        swizzle: 3,
        address: at.address(),
        rank: 2,
        dims: [columns as u64, rows as u64, 1, 1, 1],
        strides: [2 * columns as u64, 0, 0, 0],
        block: [64, height, 1, 1, 1],
    }
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, d, c, k: taps } = a.dims;
    let Params { lead, reversed, .. } = a.params;
    let way = ways::choose(queue, T::TYPE, &a.dims, |way| way == ForwardWay::Apart || fits(&a.dims, &a.params));
    if way == ForwardWay::Apart {
        return apart(queue, a);
    }
    let (rows, channels) = (b * n, channels(way));
    let tokens = tokens(a.dims, a.params, channels);
    let tiles = rows.div_ceil(tokens) * c.div_ceil(channels);
    let (bias, short_weight, short_bias, y, p) = (a.bias.or_null(), a.short_weight, a.short_bias, a.y, a.p.or_null());
    // Three or four stages of 32 of the depth, of rows of the tile and of its channels.
    let ring = |stages: usize| 2 * 32 * stages * (ROWS + 3 * channels);
    macro_rules! launch {
        ($kernel:ident, $operands:expr, $shape:expr) => {{
            let (x, w) = $operands;
            let kernel =
                $kernel { x, w, bias, short_weight, short_bias, y, p, rows, n, d, c, taps, lead, reversed, tokens };
            kernel.launch(queue, $shape.dependent())
        }};
    }
    let mma = |threads: usize, stages: usize| Shape::new(tiles, threads).shared(&[ring(stages)]);
    match way {
        ForwardWay::Mma128x96 => launch!(GemmGatedConvMma128x96, (a.x, a.w), mma(128, 3)),
        ForwardWay::Mma128x192 => launch!(GemmGatedConvMma128x192, (a.x, a.w), mma(256, 4)),
        ForwardWay::Wgmma128x192 | ForwardWay::Apart => {
            let blocks = tiles.min(queue.properties().multiprocessors).max(1);
            // Four stages of 64 of the depth, and the tile.
            let shared = 2 * 64 * 4 * (ROWS + 3 * channels) + tile_bytes(channels);
            let operands = (map(a.x, rows, d, ROWS as u32), map(a.w, 3 * c, d, channels as u32));
            launch!(GemmGatedConvWgmma128x192, operands, Shape::new(blocks, 384).shared(&[shared]))
        }
    }
}

/// The projection alone.
fn project<T: Element, Q: Queue>(
    queue: &mut Q,
    (dims, params): (Dims, Params),
    [x, w]: [In<T>; 2],
    bias: Option<In<T>>,
    y: Out<T>,
) -> Result<(), Q::Error> {
    let (dims, params) = projection(dims, params);
    let element = PhantomData;
    let of =
        gemm::GpuForward { dims, params, x, w, bias, pos: None, gate: None, residual: None, y, pre: None, element };
    crate::gemm::launch::forward(queue, of)
}

/// The product, then what follows it.
fn apart<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, c, .. } = a.dims;
    let p = match a.p {
        Some(p) => p,
        None => queue.scratch(b * n * 3 * c)?,
    };
    project(queue, (a.dims, a.params), [a.x, a.w], a.bias, p)?;
    let (dims, params) = gates(a.dims, a.params);
    let (short_weight, short_bias) = (Some(a.short_weight), Some(a.short_bias));
    crate::gated_conv::launch::forward(
        queue,
        gated_conv::GpuForward {
            dims,
            params,
            p: p.read(),
            short_weight,
            short_bias,
            inner_weight: None,
            inner_bias: None,
            y: a.y,
            element: PhantomData,
        },
    )
}

/// Launches the backward pass: by the kernels of the two operators.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Dims { b, n, c, .. } = a.dims;
    let p = match a.p {
        Some(p) => p,
        None => {
            let p = queue.scratch::<T>(b * n * 3 * c)?;
            project(queue, (a.dims, a.params), [a.x, a.w], a.bias, p)?;
            p.read()
        }
    };
    let wanted = a.dx.is_some() || a.dw.is_some() || a.dbias.is_some();
    let dp = if wanted { Some(queue.scratch::<T>(b * n * 3 * c)?) } else { None };
    let (dims, params) = gates(a.dims, a.params);
    crate::gated_conv::launch::backward(
        queue,
        gated_conv::GpuBackward {
            dims,
            params,
            dy: a.dy,
            p,
            short_weight: Some(a.short_weight),
            short_bias: Some(a.short_bias),
            inner_weight: None,
            inner_bias: None,
            dp,
            dshort_weight: a.dshort_weight,
            dshort_bias: a.dshort_bias,
            dinner_weight: None,
            dinner_bias: None,
            element: PhantomData,
        },
    )?;
    let Some(dp) = dp else { return Ok(()) };
    let (dims, params) = projection(a.dims, a.params);
    crate::gemm::launch::backward(
        queue,
        gemm::GpuBackward {
            dims,
            params,
            dy: dp.read(),
            x: a.x,
            w: a.w,
            gate: None,
            pre: None,
            dx: a.dx,
            dw: a.dw,
            dbias: a.dbias,
            dpos: None,
            dgate: None,
            element: PhantomData,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_taps_reach_are_no_results() {
        let dims = |c: usize, k: usize| Dims { b: 1, n: 1, d: 8, c, k };
        let params = |lead: usize, reversed: usize| Params { lead, reversed, bf16: false };
        assert_eq!(tokens(dims(1152, 4), params(3, 0), 64), 125);
        // Half of the channels, which ends where a tile does, and all of them.
        assert_eq!(tokens(dims(1152, 4), params(3, 576), 64), 125);
        assert_eq!(tokens(dims(72, 4), params(3, 72), 64), 125);
        assert_eq!(tokens(dims(72, 4), params(3, 36), 64), 122);
        assert_eq!(tokens(dims(72, 11), params(4, 36), 64), 116);
    }
}
