//! The kernels of Hopper: which shapes they take, their tensor maps, and how they are started.

use super::launch::by_rows;
use crate::generated::attention::{BackwardWay, Dims, ForwardWay, GpuBackward, GpuForward};
use crate::launch::{Element, ElementType, In, Out, Queue, Shape, TensorMap};
use crate::launchers::attention::{
    AttentionBackwardDelta, AttentionBackwardKv64, AttentionBackwardKv72, AttentionBackwardKv72Wide,
    AttentionBackwardQ64, AttentionBackwardQ72, AttentionForward64128x128, AttentionForward72128x128,
    AttentionForward72128x192, AttentionForward72128x192Cluster2, AttentionForward72128x192Exact,
    AttentionForward72128x192Wide, AttentionForward72192x112, AttentionForward72192x112Exact,
    AttentionForward72192x128, AttentionForward128128x128,
};

/// Rows of a tile that a warpgroup owns.
const GROUP: usize = 64;
/// Multiprocessors of the card that a way is chosen for.
const MULTIPROCESSORS: usize = 132;
/// Bytes of a row of a box of 16 columns, and of one of 64.
const NARROW: usize = 32;
const WIDE: usize = 128;

/// How a forward way cuts a head: what `Plan` of `attention_sm90.cu` is told.
#[derive(Clone, Copy)]
struct Tile {
    groups: usize,
    keys: usize,
    stages: usize,
    /// Bytes of a row of a box of values, and columns of values that are summed.
    value_box: usize,
    values: usize,
    cluster: usize,
}

/// The tile of a way for heads of `e` columns; none where the way is not one of these or does not take the width.
fn tile(way: ForwardWay, e: usize) -> Option<Tile> {
    let of_72 = Tile { groups: 2, keys: 192, stages: 2, value_box: NARROW, values: 80, cluster: 1 };
    match (way, e) {
        (ForwardWay::Wgmma128x192, 72) => Some(of_72),
        (ForwardWay::Wgmma128x192Exact, 72) => Some(Tile { values: 72, ..of_72 }),
        (ForwardWay::Wgmma128x192Wide, 72) => Some(Tile { value_box: WIDE, ..of_72 }),
        (ForwardWay::Wgmma128x192Cluster2, 72) => Some(Tile { cluster: 2, ..of_72 }),
        (ForwardWay::Wgmma192x112, 72) => Some(Tile { groups: 3, keys: 112, stages: 3, ..of_72 }),
        (ForwardWay::Wgmma192x112Exact, 72) => Some(Tile { groups: 3, keys: 112, stages: 3, values: 72, ..of_72 }),
        (ForwardWay::Wgmma192x128, 72) => Some(Tile { groups: 3, keys: 128, values: 72, ..of_72 }),
        (ForwardWay::Wgmma128x128, 72) => Some(Tile { keys: 128, stages: 3, ..of_72 }),
        (ForwardWay::Wgmma128x128, 64) => Some(Tile { keys: 128, stages: 3, value_box: WIDE, values: 64, ..of_72 }),
        (ForwardWay::Wgmma128x128, 128) => Some(Tile { keys: 128, value_box: WIDE, values: 128, ..of_72 }),
        _ => None,
    }
}

/// Whether a forward way of Hopper takes the shape. The softmax takes the maximum of unscaled scores, so the scale must
/// be positive.
pub(super) fn takes_forward(way: ForwardWay, dims: &Dims, scale: f32) -> bool {
    tile(way, dims.e).is_some() && scale > 0.0
}

/// Whether the blocks of a forward way fill a card: those of 192 queries only where there are many, for the last of them
/// leave more of it idle than smaller ones. The card is the same whatever the device.
pub(super) fn suits_forward(way: ForwardWay, d: &Dims) -> bool {
    let units = |rows: usize| d.n.div_ceil(rows) * d.h * d.b;
    tile(way, d.e).is_none_or(|t| t.groups < 3 || units(GROUP * t.groups) >= 2 * MULTIPROCESSORS)
}

/// Whether a backward way of Hopper takes the shape.
pub(super) fn takes_backward(way: BackwardWay, dims: &Dims, scale: f32) -> bool {
    let widths: &[usize] = match way {
        BackwardWay::Wgmma128x64 => &[64, 72],
        BackwardWay::Wgmma128x80 => &[72],
        _ => &[],
    };
    widths.contains(&dims.e) && scale > 0.0
}

/// Boxes of `columns` columns and `rows` tokens of the packed projection: (column, token, part, head, sample).
fn packed(address: u64, d: &Dims, columns: usize, rows: usize) -> TensorMap {
    let (head, token) = (2 * d.e, 2 * 3 * d.h * d.e);
    TensorMap {
        element: 9,
        swizzle: swizzle(columns),
        address,
        rank: 5,
        dims: [d.e as u64, d.n as u64, 3, d.h as u64, d.b as u64],
        strides: [token as u64, (d.h * head) as u64, head as u64, (d.n * token) as u64],
        block: [columns as u32, rows as u32, 1, 1, 1],
    }
}

/// The same of a tensor of heads side by side: (column, token, head, sample).
fn heads(address: u64, d: &Dims, columns: usize, rows: usize) -> TensorMap {
    let (head, token) = (2 * d.e, 2 * d.h * d.e);
    TensorMap {
        element: 9,
        swizzle: swizzle(columns),
        address,
        rank: 4,
        dims: [d.e as u64, d.n as u64, d.h as u64, d.b as u64, 0],
        strides: [token as u64, head as u64, (d.n * token) as u64, 0],
        block: [columns as u32, rows as u32, 1, 1, 0],
    }
}

/// Rows of 64 columns are swizzled by 128 bytes, rows of 16 by 32.
fn swizzle(columns: usize) -> u32 {
    if 2 * columns == WIDE { 3 } else { 1 }
}

/// One block for each multiprocessor, in whole clusters, or one for each unit of work where there are fewer.
fn persistent<Q: Queue>(queue: &Q, units: usize, cluster: usize, threads: usize) -> Shape {
    let most = (queue.properties().multiprocessors / cluster).max(1);
    Shape::new(units.min(most) * cluster, threads).cluster(cluster).dependent()
}

/// Launches the forward pass; `way` has taken the shape.
///
/// # Errors
/// Those of the queue.
pub(super) fn forward<T: Element, Q: Queue>(queue: &mut Q, a: &GpuForward<T>, way: ForwardWay) -> Result<(), Q::Error> {
    let (d, scale, lse) = (a.dims, a.params.scale, a.lse);
    let Some(t) = tile(way, d.e) else { return Ok(()) };
    let (wide, rest) = (d.e / 64, usize::from(d.e % 64 != 0));
    let bytes = |rows: usize| rows * (wide * WIDE + rest * NARROW);
    let values = t.keys * t.values.div_ceil(t.value_box / 2) * t.value_box;
    let stage = bytes(t.keys).next_multiple_of(1024) + values.next_multiple_of(1024);
    let tiles = 2 * t.groups * bytes(GROUP) + t.stages * stage;
    let samples = d.b;
    let units = d.n.div_ceil(GROUP * t.groups * t.cluster) * d.h * samples;
    let shape = persistent(queue, units, t.cluster, 128 * (t.groups + 1));
    let shape = shape.shared(&[tiles, 16 * t.groups + 32 * t.stages, 512 * t.groups]);
    let (qkv, y, loaded, element) = (a.qkv.address(), a.y.address(), t.keys / t.cluster, ElementType::Bf16);
    let (q_wide, q_rest) = (packed(qkv, &d, 64, GROUP), packed(qkv, &d, 16, GROUP));
    let (k_wide, k_rest) = (packed(qkv, &d, 64, loaded), packed(qkv, &d, 16, loaded));
    let v = packed(qkv, &d, t.value_box / 2, loaded);
    let (y_wide, y_rest) = (heads(y, &d, 64, GROUP), heads(y, &d, 16, GROUP));
    let (n, h) = (d.n, d.h);
    macro_rules! start {
        ($kernel:ident) => {
            $kernel { q_wide, q_rest, k_wide, k_rest, v, y_wide, y_rest, lse, n, h, samples, scale }
                .launch(queue, shape, element)
        };
    }
    match (way, d.e) {
        (ForwardWay::Wgmma128x192, _) => start!(AttentionForward72128x192),
        (ForwardWay::Wgmma128x192Exact, _) => start!(AttentionForward72128x192Exact),
        (ForwardWay::Wgmma128x192Wide, _) => start!(AttentionForward72128x192Wide),
        (ForwardWay::Wgmma128x192Cluster2, _) => start!(AttentionForward72128x192Cluster2),
        (ForwardWay::Wgmma192x112, _) => start!(AttentionForward72192x112),
        (ForwardWay::Wgmma192x112Exact, _) => start!(AttentionForward72192x112Exact),
        (ForwardWay::Wgmma192x128, _) => start!(AttentionForward72192x128),
        (_, 64) => start!(AttentionForward64128x128),
        (_, 72) => start!(AttentionForward72128x128),
        _ => start!(AttentionForward128128x128),
    }
}

/// Launches the backward pass; `way` has taken the shape.
///
/// # Errors
/// Those of the queue.
pub(super) fn backward<T: Element, Q: Queue>(
    queue: &mut Q,
    a: &GpuBackward<T>,
    dqkv: Out<T>,
    way: BackwardWay,
) -> Result<(), Q::Error> {
    let (d, scale, lse) = (a.dims, a.params.scale, a.lse);
    let (n, h, samples, element) = (d.n, d.h, d.b, ElementType::Bf16);
    let rows = d.b * d.n * d.h;
    let delta = queue.scratch::<f32>(rows)?;
    AttentionBackwardDelta { y: a.y, dy: a.dy, delta, rows: rows as u64, n, h, e: d.e }.launch(queue, by_rows(rows))?;
    let delta: In<f32> = delta.read();
    let bytes = |rows: usize| rows * d.e.div_ceil(16) * NARROW;
    let units = n.div_ceil(2 * GROUP) * h * samples;
    let (qkv, gradient) = (a.qkv.address(), packed(dqkv.address(), &d, 16, GROUP));

    // dq: 128 queries own a block, keys come 128 at a time in 2 stages.
    let (loaded, stages) = (128, 2);
    let tiles = 6 * bytes(GROUP) + stages * 2 * bytes(loaded);
    let shape = persistent(queue, units, 1, 384).shared(&[tiles, 512 * 2, 16 + 16 * stages]);
    let (own, own_dy) = (packed(qkv, &d, 16, GROUP), heads(a.dy.address(), &d, 16, GROUP));
    let keys = packed(qkv, &d, 16, loaded);
    macro_rules! start_q {
        ($kernel:ident) => {
            $kernel { own, own_dy, keys, gradient, lse, delta, n, h, samples, scale }.launch(queue, shape, element)?
        };
    }
    match d.e {
        64 => start_q!(AttentionBackwardQ64),
        _ => start_q!(AttentionBackwardQ72),
    }

    // dk and dv: 128 keys own a block, queries come 64 or 80 at a time in 3 stages.
    let (loaded, stages) = (if way == BackwardWay::Wgmma128x80 { 80 } else { 64 }, 3);
    let tiles = 8 * bytes(GROUP) + stages * 2 * bytes(loaded);
    let shape = persistent(queue, units, 1, 384).shared(&[tiles, stages * 8 * loaded, 16 + 16 * stages]);
    let (queries, dy) = (packed(qkv, &d, 16, loaded), heads(a.dy.address(), &d, 16, loaded));
    macro_rules! start_kv {
        ($kernel:ident) => {
            $kernel { own, queries, dy, gradient, lse, delta, n, h, samples, scale }.launch(queue, shape, element)
        };
    }
    match (way, d.e) {
        (_, 64) => start_kv!(AttentionBackwardKv64),
        (BackwardWay::Wgmma128x80, _) => start_kv!(AttentionBackwardKv72Wide),
        _ => start_kv!(AttentionBackwardKv72),
    }
}
