//! Which kernel takes which shape; and the shapes of the attention family.

use super::hopper;
use super::mma::{by_tiles, by_width, fits, own_rows, stage_bytes, steps_of_block};
use crate::generated::attention::{BackwardWay, Dims, ForwardWay, GpuBackward, GpuForward};
use crate::launch::{Element, Queue, Shape};
use crate::launchers::attention::{
    AttentionBackwardDelta, AttentionBackwardKv, AttentionBackwardKv64x64E32, AttentionBackwardKv64x64E64,
    AttentionBackwardKv64x64E72, AttentionBackwardKv64x64E96, AttentionBackwardKv64x64E128, AttentionBackwardQ,
    AttentionBackwardQ64x64E32, AttentionBackwardQ64x64E64, AttentionBackwardQ64x64E72, AttentionBackwardQ64x64E96,
    AttentionBackwardQ64x64E128, AttentionBackwardWholeE64, AttentionBackwardWholeE72, AttentionBackwardWholeE80,
    AttentionForward, AttentionForward64x64E32, AttentionForward64x64E64, AttentionForward64x64E72,
    AttentionForward64x64E96, AttentionForward64x64E128, AttentionForward128x64E64, AttentionForward128x64E72,
    AttentionForward128x64E80, AttentionForward128x64E96, AttentionForward128x64E128, AttentionForwardWholeE64,
    AttentionForwardWholeE72, AttentionForwardWide64x32, AttentionForwardWide64x64,
};
use crate::ways::{choose, choose_suited};

/// Tokens that a block owns.
const ROWS: usize = 64;
/// Columns of a head that a block owns: forward and for dq, and for dk with dv.
const COLUMNS: [usize; 2] = [128, 96];

/// Tokens of a head that a block holds as a whole.
const WHOLE: usize = 256;
/// The widest head on the tensor cores, and queries of a block that has it.
const WIDE: usize = 512;
const WIDE_ROWS: usize = 64;

/// A block for each [`WIDE_ROWS`] queries of `heads` heads in all samples, keys in stages of `keys`: `Wide` of
/// `attention_wide.cu`.
fn wide(tokens: usize, heads: usize, keys: usize) -> Shape {
    let stage = stage_bytes(keys, WIDE);
    let weights = WIDE_ROWS * 2 * (keys + 8);
    let regions = [stage_bytes(WIDE_ROWS, WIDE), stage, stage, weights, 3 * WIDE_ROWS * 4];
    Shape::new(tokens.div_ceil(WIDE_ROWS) * heads, 256).shared(&regions).dependent()
}

/// Bytes that a block of [`wide`] takes.
fn wide_bytes(keys: usize) -> usize {
    stage_bytes(WIDE_ROWS + 2 * keys, WIDE) + WIDE_ROWS * (2 * (keys + 8) + 3 * 4)
}

/// Whether a device whose blocks have `most` bytes of shared memory has the place for [`whole_backward`].
fn whole_fits(e: usize, most: usize) -> bool {
    let width = if e <= 72 { 72 } else { 80 };
    stage_bytes(2 * WHOLE + 4 * 32, width) + WHOLE * (80 + 2 * 4) <= most
}

/// A block for each of `heads` heads in all samples: `Head` of `attention_whole.cu`.
fn whole_backward(heads: usize, width: usize) -> Shape {
    let (all, stage) = (stage_bytes(WHOLE, width), stage_bytes(32, width));
    let regions = [all, all, stage, stage, stage, stage, WHOLE * 80, WHOLE * 4, WHOLE * 4];
    Shape::new(heads, 256).shared(&regions).dependent()
}

/// The launch of the forward pass and of dq: `tokens` queries of `heads` heads in all samples.
pub(crate) fn by_queries(tokens: usize, heads: usize, e: usize) -> Shape {
    Shape::new(tokens.div_ceil(ROWS) * heads, 128).y(e.div_ceil(COLUMNS[0]).max(1))
}

/// The launch of dk and dv: `tokens` keys.
pub(crate) fn by_keys(tokens: usize, heads: usize, e: usize) -> Shape {
    Shape::new(tokens.div_ceil(ROWS) * heads, 128).y(e.div_ceil(COLUMNS[1]).max(1))
}

/// The launch of delta: `rows` vectors of y.
pub(crate) fn by_rows(rows: usize) -> Shape {
    Shape::new(rows.div_ceil(4).clamp(1, 1 << 14), 128)
}

/// Launches the forward pass.
///
/// # Errors
/// Those of the queue.
pub fn forward<T: Element, Q: Queue>(queue: &mut Q, a: GpuForward<T>) -> Result<(), Q::Error> {
    let (Dims { b, n, h, e }, scale) = (a.dims, a.params.scale);
    let (qkv, y, lse) = (a.qkv, a.y, a.lse);
    let most = queue.properties().shared_per_block;
    let takes = |way: ForwardWay| match way {
        ForwardWay::MmaWhole => fits(e) && e > 32 && e <= 72 && n > 128 && n <= WHOLE,
        // A block of 128 queries wants as many.
        ForwardWay::Mma128x64 => fits(e) && e > 32 && n > 64,
        ForwardWay::Mma64x64 => fits(e),
        ForwardWay::MmaWide64x64 | ForwardWay::MmaWide64x32 => {
            let keys = if way == ForwardWay::MmaWide64x64 { 64 } else { 32 };
            e.is_multiple_of(8) && e > 128 && e <= WIDE && wide_bytes(keys) <= most
        }
        ForwardWay::CudaCores => true,
        way => hopper::takes_forward(way, &a.dims, scale),
    };
    let way = choose_suited(queue, T::TYPE, &a.dims, takes, |way| hopper::suits_forward(way, &a.dims));
    match way {
        ForwardWay::MmaWhole => {
            // Few heads are shared by several blocks, which all load its keys: the time of two steps of 64 queries. No
            // sum crosses queries, so the device may say how many.
            let places = 2 * queue.properties().multiprocessors;
            let segment = ROWS * steps_of_block(n.div_ceil(ROWS), b * h, places, 2, 1);
            let shape = |width| {
                let keys = stage_bytes(WHOLE, width);
                Shape::new(n.div_ceil(segment) * b * h, 128).shared(&[keys, keys, own_rows(4, width)]).dependent()
            };
            by_width!(e, queue, [64 => AttentionForwardWholeE64; 72 => AttentionForwardWholeE72],
                { qkv, y, lse, n, h, e, segment, scale }, shape)
        }
        ForwardWay::Mma128x64 => {
            let shape = |width| by_tiles(n, b * h, 128, if width <= 72 { 128 } else { 256 }, width).dependent();
            by_width!(e, queue, [64 => AttentionForward128x64E64, 72 => AttentionForward128x64E72,
                80 => AttentionForward128x64E80, 96 => AttentionForward128x64E96; 128 => AttentionForward128x64E128],
                { qkv, y, lse, n, h, e, scale }, shape)
        }
        ForwardWay::Mma64x64 => {
            by_width!(e, queue, [32 => AttentionForward64x64E32, 64 => AttentionForward64x64E64,
                72 => AttentionForward64x64E72, 96 => AttentionForward64x64E96; 128 => AttentionForward64x64E128],
                { qkv, y, lse, n, h, e, scale }, |width| by_tiles(n, b * h, 64, 128, width).dependent())
        }
        ForwardWay::MmaWide64x64 => {
            AttentionForwardWide64x64 { qkv, y, lse, n, h, e, scale }.launch(queue, wide(n, b * h, 64))
        }
        ForwardWay::MmaWide64x32 => {
            AttentionForwardWide64x32 { qkv, y, lse, n, h, e, scale }.launch(queue, wide(n, b * h, 32))
        }
        ForwardWay::CudaCores => {
            AttentionForward { qkv, y, lse, n, h, e, scale }.launch(queue, by_queries(n, b * h, e))
        }
        way => hopper::forward(queue, &a, way),
    }
}

/// Launches the backward pass.
///
/// # Errors
/// Those of the queue.
pub fn backward<T: Element, Q: Queue>(queue: &mut Q, a: GpuBackward<T>) -> Result<(), Q::Error> {
    let Some(dqkv) = a.dqkv else { return Ok(()) };
    let (Dims { b, n, h, e }, scale) = (a.dims, a.params.scale);
    let most = queue.properties().shared_per_block;
    let way = choose(queue, T::TYPE, &a.dims, |way: BackwardWay| match way {
        BackwardWay::MmaWhole => fits(e) && e > 32 && e <= 80 && n > 128 && n <= WHOLE && whole_fits(e, most),
        BackwardWay::Mma64x64 => fits(e),
        BackwardWay::CudaCores => true,
        way => hopper::takes_backward(way, &a.dims, scale),
    });
    let (rows, y, dy, qkv, lse) = (b * n * h, a.y, a.dy, a.qkv, a.lse);
    match way {
        BackwardWay::MmaWhole => {
            by_width!(e, queue, [64 => AttentionBackwardWholeE64, 72 => AttentionBackwardWholeE72;
                80 => AttentionBackwardWholeE80],
                { dy, qkv, y, lse, dqkv, n, h, e, scale }, |width| whole_backward(b * h, width))
        }
        BackwardWay::Mma64x64 => {
            let delta = queue.scratch::<f32>(rows)?;
            let shape = |width| by_tiles(n, b * h, 64, 128, width).dependent();
            by_width!(e, queue, [32 => AttentionBackwardQ64x64E32, 64 => AttentionBackwardQ64x64E64,
                72 => AttentionBackwardQ64x64E72, 96 => AttentionBackwardQ64x64E96; 128 => AttentionBackwardQ64x64E128],
                { dy, qkv, y, lse, delta, dqkv, n, h, e, scale }, shape)?;
            let delta = delta.read();
            by_width!(e, queue, [32 => AttentionBackwardKv64x64E32, 64 => AttentionBackwardKv64x64E64,
                72 => AttentionBackwardKv64x64E72, 96 => AttentionBackwardKv64x64E96; 128 => AttentionBackwardKv64x64E128],
                { dy, qkv, lse, delta, dqkv, n, h, e, scale }, shape)
        }
        BackwardWay::CudaCores => {
            let delta = queue.scratch::<f32>(rows)?;
            AttentionBackwardDelta { y, dy, delta, rows: rows as u64, n, h, e }.launch(queue, by_rows(rows))?;
            let delta = delta.read();
            AttentionBackwardQ { dy, qkv, lse, delta, dqkv, n, h, e, scale }.launch(queue, by_queries(n, b * h, e))?;
            AttentionBackwardKv { dy, qkv, lse, delta, dqkv, n, h, e, scale }.launch(queue, by_keys(n, b * h, e))
        }
        way => hopper::backward(queue, &a, dqkv, way),
    }
}
