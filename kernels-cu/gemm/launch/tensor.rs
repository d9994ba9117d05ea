//! The ways on tensor cores: products by tiles, split over the depth where that is faster, and what follows them.

use super::elementwise;
use super::split::{Split, Tiles};
use crate::generated::gemm::{BackwardWay, Dims, ForwardWay, GpuForward, Params};
use crate::launch::{Element, In, OrNull, Out, Queue, Shape, TensorMap};
use crate::launchers::gemm::{
    GemmBackwardAdd, GemmFinish, GemmMma128x64, GemmMma128x64W, GemmMma128x64X, GemmMma128x128, GemmMma128x128W,
    GemmMma128x128X, GemmWgmma128x128, GemmWgmma128x128W, GemmWgmma128x128X, GemmWgmma128x192, GemmWgmma128x192W,
    GemmWgmma128x192X, GemmWgmma128x256, GemmWgmma256x192,
};

/// Whether a way takes a shape: rows of both operands begin at 16 bytes. Sine stays with the CUDA cores.
pub(super) fn fits(dims: &Dims, params: &Params) -> bool {
    dims.k.is_multiple_of(8) && dims.f.is_multiple_of(8) && params.act != 3
}

/// Tiles of 128×`columns` by mma.sync, planned for an A100.
const fn mma(columns: usize) -> Tiles {
    let blocks = if columns == 128 { 2 } else { 3 };
    Tiles { tile: [128, columns], places: 108 * blocks, rate: 250e12 / (108 * blocks) as f64, memory: 1.5e12 }
}

/// Tiles of 128×`columns` by wgmma, planned for an H200.
const fn wgmma(columns: usize) -> Tiles {
    Tiles { tile: [128, columns], places: 132, rate: 700e12 / 132.0, memory: 4e12 }
}

/// Tiles of 256×192 by clusters of two blocks.
const PAIR: Tiles = Tiles { tile: [256, 192], places: 66, rate: 700e12 / 66.0, memory: 4e12 };

/// Bytes of shared memory of a block: the kernels' `kBytes`.
const fn shared(columns: usize, stages: usize, depth: usize, slabs: usize) -> usize {
    2 * depth * stages * (128 + columns) + slabs
}

/// Blocks of 128 threads, one for each tile and part.
fn blocks(tiles: Tiles, rows: usize, columns: usize, parts: usize) -> Shape {
    Shape::new(tiles.count(rows, columns), 128).y(parts).shared(&[shared(tiles.tile[1], 4, 32, 0)]).dependent()
}

/// Blocks of three warpgroups, one for each multiprocessor at the most, which go round; how many there are does not
/// touch the sums.
fn resident(queue: &impl Queue, tiles: Tiles, rows: usize, columns: usize, parts: usize) -> Shape {
    let (stages, slab) = match tiles.tile[1] {
        256 => (4, 32),
        192 => (4, 64),
        _ => (5, 64),
    };
    let work = tiles.count(rows, columns) * parts;
    let bytes = shared(tiles.tile[1], stages, 64, 8 * 16 * (slab + 8) * 4);
    let cluster = tiles.tile[0] / 128;
    let blocks = cluster * work.min(queue.properties().multiprocessors / cluster).max(1);
    Shape::new(blocks, 384).shared(&[bytes]).cluster(cluster).dependent()
}

/// A matrix `[rows, columns]` of bf16 whose boxes are 64 columns, 128 bytes, by `height` rows.
fn map<T>(at: In<T>, rows: usize, columns: usize, height: usize) -> TensorMap {
    TensorMap {
        element: 9,
        swizzle: 3,
        address: at.address(),
        rank: 2,
        dims: [columns as u64, rows as u64, 1, 1, 1],
        strides: [2 * columns as u64, 0, 0, 0],
        block: [64, height as u32, 1, 1, 1],
    }
}

/// Partial sums, where there are several parts; else null.
fn partials<Q: Queue>(queue: &mut Q, split: Split, results: usize) -> Result<Out<f32>, Q::Error> {
    if split.parts == 1 { Ok(Out::at(0)) } else { queue.scratch::<f32>(split.parts * results) }
}

/// The forward pass by `way`, which is not that of the CUDA cores.
pub(super) fn forward<T: Element, Q: Queue>(queue: &mut Q, a: &GpuForward<T>, way: ForwardWay) -> Result<(), Q::Error> {
    let Dims { b, n, k, f, c } = a.dims;
    let (rows, act, gate_row) = (b * n, a.params.act, a.params.gate_row);
    let (bias, pos, gate, residual) = (a.bias.or_null(), a.pos.or_null(), a.gate.or_null(), a.residual.or_null());
    let (y, pre) = (a.y, a.pre.or_null());
    let tiles = match way {
        ForwardWay::Wgmma128x192 => wgmma(192),
        ForwardWay::Wgmma256x192 => PAIR,
        ForwardWay::Wgmma128x256 => wgmma(256),
        ForwardWay::Wgmma128x128 => wgmma(128),
        ForwardWay::Mma128x128 => mma(128),
        ForwardWay::Mma128x64 | ForwardWay::CudaCores => mma(64),
    };
    let split = tiles.split(rows, f, k);
    let (part, parts) = (split.part, split.parts);
    let partials = partials(queue, split, rows * f)?;
    macro_rules! by_mma {
        ($kernel:ident) => {
            $kernel {
                x: a.x,
                w: a.w,
                bias,
                pos,
                gate,
                residual,
                y,
                pre,
                partials,
                rows,
                n,
                k,
                f,
                c,
                gate_row,
                act,
                part,
            }
            .launch(queue, blocks(tiles, rows, f, parts))
        };
    }
    macro_rules! by_wgmma {
        ($kernel:ident) => {{
            let halves = tiles.tile[0] / 128;
            let (x, w) = (map(a.x, rows, k, 128), map(a.w, f, k, tiles.tile[1] / halves));
            let shape = resident(queue, tiles, rows, f, parts);
            $kernel { x, w, bias, pos, gate, residual, y, pre, partials, rows, n, k, f, c, gate_row, act, part, parts }
                .launch(queue, shape)
        }};
    }
    match way {
        ForwardWay::Wgmma128x192 => by_wgmma!(GemmWgmma128x192),
        ForwardWay::Wgmma256x192 => by_wgmma!(GemmWgmma256x192),
        ForwardWay::Wgmma128x256 => by_wgmma!(GemmWgmma128x256),
        ForwardWay::Wgmma128x128 => by_wgmma!(GemmWgmma128x128),
        ForwardWay::Mma128x128 => by_mma!(GemmMma128x128),
        ForwardWay::Mma128x64 | ForwardWay::CudaCores => by_mma!(GemmMma128x64),
    }?;
    if parts > 1 {
        GemmFinish {
            partials: partials.read(),
            bias,
            pos,
            gate,
            residual,
            y,
            pre,
            rows,
            n,
            f,
            c,
            gate_row,
            act,
            parts,
        }
        .launch(queue, elementwise(rows * f / 8))?;
    }
    Ok(())
}

/// The tiles of a way of the backward pass.
fn backward_tiles(way: BackwardWay) -> Tiles {
    match way {
        BackwardWay::Wgmma128x192 => wgmma(192),
        BackwardWay::Wgmma128x128 => wgmma(128),
        BackwardWay::Mma128x128 => mma(128),
        BackwardWay::Mma128x64 | BackwardWay::CudaCores => mma(64),
    }
}

/// dx = du·w.
pub(super) fn backward_x<T: Element, Q: Queue>(
    queue: &mut Q,
    [du, w]: [In<T>; 2],
    dx: Out<T>,
    [rows, k, f]: [usize; 3],
    way: BackwardWay,
) -> Result<(), Q::Error> {
    let tiles = backward_tiles(way);
    let split = tiles.split(rows, k, f);
    let (part, parts) = (split.part, split.parts);
    let partials = partials(queue, split, rows * k)?;
    let maps = (map(du, rows, f, 128), map(w, f, k, 64));
    let loops = blocks(tiles, rows, k, parts);
    let stays = resident(queue, tiles, rows, k, parts);
    match way {
        BackwardWay::Wgmma128x192 => {
            GemmWgmma128x192X { du: maps.0, w: maps.1, dx, partials, rows, k, f, part, parts }.launch(queue, stays)
        }
        BackwardWay::Wgmma128x128 => {
            GemmWgmma128x128X { du: maps.0, w: maps.1, dx, partials, rows, k, f, part, parts }.launch(queue, stays)
        }
        BackwardWay::Mma128x128 => GemmMma128x128X { du, w, dx, partials, rows, k, f, part }.launch(queue, loops),
        BackwardWay::Mma128x64 | BackwardWay::CudaCores => {
            GemmMma128x64X { du, w, dx, partials, rows, k, f, part }.launch(queue, loops)
        }
    }?;
    add(queue, partials, dx, rows * k, parts)
}

/// dw = duᵀ·x.
pub(super) fn backward_w<T: Element, Q: Queue>(
    queue: &mut Q,
    [du, x]: [In<T>; 2],
    dw: Out<T>,
    [rows, k, f]: [usize; 3],
    way: BackwardWay,
) -> Result<(), Q::Error> {
    let tiles = backward_tiles(way);
    let split = tiles.split(f, k, rows);
    let (part, parts) = (split.part, split.parts);
    let partials = partials(queue, split, f * k)?;
    let maps = (map(du, rows, f, 64), map(x, rows, k, 64));
    let loops = blocks(tiles, f, k, parts);
    let stays = resident(queue, tiles, f, k, parts);
    match way {
        BackwardWay::Wgmma128x192 => {
            GemmWgmma128x192W { du: maps.0, x: maps.1, dw, partials, rows, k, f, part, parts }.launch(queue, stays)
        }
        BackwardWay::Wgmma128x128 => {
            GemmWgmma128x128W { du: maps.0, x: maps.1, dw, partials, rows, k, f, part, parts }.launch(queue, stays)
        }
        BackwardWay::Mma128x128 => GemmMma128x128W { du, x, dw, partials, rows, k, f, part }.launch(queue, loops),
        BackwardWay::Mma128x64 | BackwardWay::CudaCores => {
            GemmMma128x64W { du, x, dw, partials, rows, k, f, part }.launch(queue, loops)
        }
    }?;
    add(queue, partials, dw, f * k, parts)
}

/// The parts' sum, where there are several.
fn add<T: Element, Q: Queue>(
    queue: &mut Q,
    partials: Out<f32>,
    to: Out<T>,
    count: usize,
    parts: usize,
) -> Result<(), Q::Error> {
    if parts == 1 {
        return Ok(());
    }
    GemmBackwardAdd { partials: partials.read(), to, count: count as u64, parts }.launch(queue, elementwise(count))
}
