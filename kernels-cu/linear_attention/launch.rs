//! Which kernel takes which shape.

use crate::attention::launch::by_rows;
use crate::attention::mma::{MULTIPROCESSORS, steps_of_block};
use crate::generated::linear_attention::{BackwardWay, Dims, ForwardWay, GpuBackward, GpuForward};
use crate::launch::{Element, Out, Queue, Shape};
use crate::launchers::linear_attention::*;
use crate::ways::choose;

/// Blocks that a split of the tokens aims at: two for each multiprocessor of an H100, whatever the device, because the
/// order of the sums follows from it.
const BLOCKS: usize = 2 * MULTIPROCESSORS;
/// Tokens that a part has at least.
const PART: usize = 128;

/// Parts of the tokens, and the shape of the sums over them.
fn by_parts(Dims { b, n, h, e }: Dims) -> (usize, Shape) {
    let tiles = e.div_ceil(64) * (e + 1).div_ceil(32);
    let parts = (BLOCKS / (b * h * tiles).max(1)).clamp(1, n.div_ceil(PART).max(1));
    (parts, Shape::new(b * h * parts, 128).y(tiles))
}

fn by_tokens(Dims { b, n, h, e }: Dims) -> Shape {
    Shape::new(n.div_ceil(64) * b * h, 128).y(e.div_ceil(32))
}

/// Adds the parts: `to` is the state and the total.
fn add<T: Element, Q: Queue>(
    queue: &mut Q,
    Dims { b, h, e, .. }: Dims,
    partials: Out<f32>,
    parts: usize,
    [state, total]: [Out<f32>; 2],
) -> Result<(), Q::Error> {
    let shape = Shape::new(b * h * (e * (e + 1)).div_ceil(256), 256);
    LinearAttentionAdd { partials: partials.read(), state, total, e, parts }.launch(queue, shape, T::TYPE)
}

/// Puts in the kernel of the head's width, one of those that [`on_tensor_cores`] names.
macro_rules! by_width {
    ($e:expr, $queue:expr, $shape:expr, [$k32:ident, $k64:ident, $k72:ident], { $($fields:tt)* }) => {
        match $e {
            32 => $k32 { $($fields)* }.launch($queue, $shape),
            64 => $k64 { $($fields)* }.launch($queue, $shape),
            _ => $k72 { $($fields)* }.launch($queue, $shape),
        }
    };
}

/// Whether the tensor cores have kernels for heads of this width; offsets of a tile's rows have 32 bits.
fn on_tensor_cores(Dims { h, e, .. }: Dims) -> bool {
    [32, 64, 72].contains(&e) && h * e <= 1 << 22
}

/// Tokens of the tiles that parts are made of where sums go over them, and where they do not; bytes of a row of a tile.
const SUMMED: usize = 64;
const ROWS: usize = 128;
fn pitch(e: usize) -> usize {
    ((e / 8) | 1) * 16
}

/// Parts that a head's tokens are divided into for sums: `blocks` run at one time, a part has 6 tiles or more.
fn parts_of_sums(Dims { b, n, h, .. }: Dims, blocks: usize) -> usize {
    let tiles = n.div_ceil(SUMMED).max(1);
    tiles.div_ceil(steps_of_block(tiles, b * h, blocks, 2, 6))
}

/// Parts for results by token, `blocks` a multiprocessor of the device: no sum crosses tokens.
fn parts_of_rows<Q: Queue>(queue: &Q, Dims { b, n, h, .. }: Dims, blocks: usize) -> usize {
    let tiles = n.div_ceil(ROWS).max(1);
    tiles.div_ceil(steps_of_block(tiles, b * h, blocks * queue.properties().multiprocessors, 1, 2))
}

/// Regions of the kernels that hold a head's matrix and two stages of `tensors` tiles.
fn with_matrix(e: usize, scales: Option<usize>, tensors: usize, rows: usize) -> Vec<usize> {
    let (matrix, totals, tiles) = (2 * e * pitch(e), 4 * e, 2 * tensors * rows * pitch(e));
    [Some(matrix), Some(totals), scales, Some(tiles)].into_iter().flatten().collect()
}

fn forward_mma<T: Element, Q: Queue>(queue: &mut Q, a: &GpuForward<T>, blocks: usize) -> Result<(), Q::Error> {
    let (Dims { b, n, h, e }, map, qkv, eps) = (a.dims, a.params.map, a.qkv, a.params.eps);
    let parts = parts_of_sums(a.dims, blocks);
    let partials = queue.scratch::<f32>(b * h * parts * e * (e + 1))?;
    let sums = Shape::new(b * h * parts, 128).shared(&[3 * 2 * SUMMED * pitch(e)]);
    by_width!(e, queue, sums, [LinearAttentionMmaState32, LinearAttentionMmaState64, LinearAttentionMmaState72], {
        qkv, partials, n, h, map, parts
    })?;
    add::<T, Q>(queue, a.dims, partials, parts, [a.state, a.total])?;
    let (state, total, y, norm) = (a.state.read(), a.total.read(), a.y, a.norm);
    let parts = parts_of_rows(queue, a.dims, 3);
    let shape = Shape::new(b * h * parts, 128).shared(&with_matrix(e, None, 1, ROWS));
    by_width!(e, queue, shape, [LinearAttentionMmaForward32, LinearAttentionMmaForward64, LinearAttentionMmaForward72], {
        qkv, state, total, y, norm, n, h, map, eps, parts
    })
}

fn backward_mma<T: Element, Q: Queue>(
    queue: &mut Q,
    a: &GpuBackward<T>,
    dqkv: Out<T>,
    blocks: usize,
) -> Result<(), Q::Error> {
    let (Dims { b, n, h, e }, map) = (a.dims, a.params.map);
    let GpuBackward { dy, qkv, y, norm, state, total, .. } = *a;
    let parts = parts_of_sums(a.dims, blocks);
    let partials = queue.scratch::<f32>(b * h * parts * e * (e + 1))?;
    let (dstate, dtotal) = (queue.scratch::<f32>(b * h * e * e)?, queue.scratch::<f32>(b * h * e)?);
    let sums = Shape::new(b * h * parts, 128).shared(&with_matrix(e, Some(2 * SUMMED * 4), 3, SUMMED));
    by_width!(
        e, queue, sums,
        [LinearAttentionMmaBackwardQ32, LinearAttentionMmaBackwardQ64, LinearAttentionMmaBackwardQ72],
        { dy, qkv, y, norm, state, total, dqkv, partials, n, h, map, parts }
    )?;
    add::<T, Q>(queue, a.dims, partials, parts, [dstate, dtotal])?;
    let (dstate, dtotal) = (dstate.read(), dtotal.read());
    let parts = parts_of_rows(queue, a.dims, 2);
    let shape = Shape::new(b * h * parts, 128).shared(&with_matrix(e, None, 2, ROWS));
    by_width!(
        e, queue, shape,
        [LinearAttentionMmaBackwardKv32, LinearAttentionMmaBackwardKv64, LinearAttentionMmaBackwardKv72],
        { qkv, dstate, dtotal, dqkv, n, h, map, parts }
    )
}

/// Tokens of a chunk of causal sums, at the most.
const CHUNK: usize = 64;

/// Causal sums: those of chunks, those before each chunk, then the chunks themselves.
fn forward_causal<T: Element, Q: Queue>(queue: &mut Q, a: &GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, h, e }, map, eps, qkv) = (a.dims, a.params.map, a.params.eps, a.qkv);
    let (chunks, heads) = (n.div_ceil(CHUNK).max(1), b * h);
    let sums = queue.scratch::<f32>(heads * chunks * e * (e + 1))?;
    let tiles = e.div_ceil(64) * (e + 1).div_ceil(32);
    let shape = Shape::new(heads * chunks, 128);
    LinearAttentionState { qkv, partials: sums, n, h, e, map, parts: chunks }.launch(queue, shape.y(tiles))?;
    prefix::<T, Q>(queue, a.dims, sums, Some([a.state, a.total]))?;
    LinearAttentionCausalForward { qkv, before: sums.read(), y: a.y, norm: a.norm, n, h, e, map, eps, chunks }
        .launch(queue, shape)
}

/// The sums of chunks become those of what lies before each, and the whole; without the whole, of what lies behind.
fn prefix<T: Element, Q: Queue>(
    queue: &mut Q,
    Dims { b, n, h, e }: Dims,
    sums: Out<f32>,
    whole: Option<[Out<f32>; 2]>,
) -> Result<(), Q::Error> {
    let [state, total] = whole.unwrap_or([Out::at(0); 2]);
    let (heads, chunks, reverse) = ((b * h) as u64, n.div_ceil(CHUNK).max(1), usize::from(whole.is_none()));
    let shape = Shape::new((b * h * e * (e + 1)).div_ceil(256).clamp(1, 1 << 14), 256);
    LinearAttentionPrefix { sums, state, total, heads, e, chunks, reverse }.launch(queue, shape, T::TYPE)
}

fn backward_causal<T: Element, Q: Queue>(queue: &mut Q, a: &GpuBackward<T>, dqkv: Out<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, h, e }, map) = (a.dims, a.params.map);
    let (dy, qkv, norm, rows) = (a.dy, a.qkv, a.norm, b * n * h);
    let delta = queue.scratch::<f32>(rows)?;
    LinearAttentionBackwardDelta { y: a.y, dy, delta, rows: rows as u64, n, h, e }.launch(queue, by_rows(rows))?;
    let delta = delta.read();
    let (chunks, heads) = (n.div_ceil(CHUNK).max(1), b * h);
    let [before, behind]: [Out<f32>; 2] =
        [queue.scratch(heads * chunks * e * (e + 1))?, queue.scratch(heads * chunks * e * (e + 1))?];
    let whole = [queue.scratch(heads * e * e)?, queue.scratch(heads * e)?];
    let shape = Shape::new(heads * chunks, 128);
    let tiles = shape.y(e.div_ceil(64) * (e + 1).div_ceil(32));
    LinearAttentionState { qkv, partials: before, n, h, e, map, parts: chunks }.launch(queue, tiles)?;
    prefix::<T, Q>(queue, a.dims, before, Some(whole))?;
    LinearAttentionBackwardState { dy, qkv, norm, delta, partials: behind, n, h, e, map, parts: chunks }
        .launch(queue, tiles)?;
    prefix::<T, Q>(queue, a.dims, behind, None)?;
    let (before, behind) = (before.read(), behind.read());
    LinearAttentionCausalBackward { dy, qkv, norm, delta, before, behind, dqkv, n, h, e, map, chunks }
        .launch(queue, shape)
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, h, e }, map, qkv) = (a.dims, a.params.map, a.qkv);
    match choose(queue, T::TYPE, &a.dims, |way: ForwardWay| {
        way == ForwardWay::Tiles || !a.params.causal && on_tensor_cores(a.dims)
    }) {
        ForwardWay::Mma396 => return forward_mma(queue, &a, 3 * MULTIPROCESSORS),
        ForwardWay::Mma792 => return forward_mma(queue, &a, 6 * MULTIPROCESSORS),
        ForwardWay::Tiles if a.params.causal => return forward_causal(queue, &a),
        ForwardWay::Tiles => {}
    }
    let (parts, shape) = by_parts(a.dims);
    let partials = queue.scratch::<f32>(b * h * parts * e * (e + 1))?;
    LinearAttentionState { qkv, partials, n, h, e, map, parts }.launch(queue, shape)?;
    add::<T, Q>(queue, a.dims, partials, parts, [a.state, a.total])?;
    let (rows, eps) = (b * n * h, a.params.eps);
    LinearAttentionNorm { qkv, total: a.total.read(), norm: a.norm, rows: rows as u64, n, h, e, map, eps }
        .launch(queue, by_rows(rows))?;
    LinearAttentionForward { qkv, state: a.state.read(), norm: a.norm.read(), y: a.y, n, h, e, map }
        .launch(queue, by_tokens(a.dims))
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Some(dqkv) = a.dqkv else { return Ok(()) };
    match choose(queue, T::TYPE, &a.dims, |way: BackwardWay| {
        way == BackwardWay::Tiles || !a.params.causal && on_tensor_cores(a.dims)
    }) {
        BackwardWay::Mma264 => return backward_mma(queue, &a, dqkv, BLOCKS),
        BackwardWay::Mma528 => return backward_mma(queue, &a, dqkv, 2 * BLOCKS),
        BackwardWay::Tiles if a.params.causal => return backward_causal(queue, &a, dqkv),
        BackwardWay::Tiles => {}
    }
    let (Dims { b, n, h, e }, map) = (a.dims, a.params.map);
    let (dy, qkv, norm, rows) = (a.dy, a.qkv, a.norm, b * n * h);
    let delta = queue.scratch::<f32>(rows)?;
    LinearAttentionBackwardDelta { y: a.y, dy, delta, rows: rows as u64, n, h, e }.launch(queue, by_rows(rows))?;
    let (delta, shape) = (delta.read(), by_tokens(a.dims));
    LinearAttentionBackwardQ { dy, qkv, norm, delta, state: a.state, total: a.total, dqkv, n, h, e, map }
        .launch(queue, shape)?;
    let (parts, sums) = by_parts(a.dims);
    let partials = queue.scratch::<f32>(b * h * parts * e * (e + 1))?;
    let (dstate, dtotal) = (queue.scratch::<f32>(b * h * e * e)?, queue.scratch::<f32>(b * h * e)?);
    LinearAttentionBackwardState { dy, qkv, norm, delta, partials, n, h, e, map, parts }.launch(queue, sums)?;
    add::<T, Q>(queue, a.dims, partials, parts, [dstate, dtotal])?;
    let (dstate, dtotal) = (dstate.read(), dtotal.read());
    LinearAttentionBackwardK { qkv, dstate, dtotal, dqkv, n, h, e, map }.launch(queue, shape)?;
    LinearAttentionBackwardV { qkv, dstate, dqkv, n, h, e, map }.launch(queue, shape)
}
