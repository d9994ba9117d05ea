//! The blocked product around the micro-kernels.
//!
//! The result is cut into blocks that are computed independently, each by one thread from start to end: for each
//! stretch of k the rows of a are packed once (they stay in the second-level cache), then for each pair of panels of b
//! (first level) every tile of the block is computed. Where blocks begin changes no bit of the result; where
//! stretches of k begin does, so that depends on k alone.

#![allow(unsafe_code)] // Disjoint blocks of one result are written by several threads.

use super::micro::{Kernel, LANES, ROWS, Tile};
use super::pack::Panel;
use super::{Finish, Output, Product};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Longest stretch of k, in words: two panels of b are 64 KiB.
const K_WORDS: usize = 512;
/// Most rows of a block: 19 panels of a are 608 KiB at the longest stretch.
const BLOCK_ROWS: usize = 19 * ROWS;
/// Fewest columns of a block where there are more: packing the rows again per block must not weigh.
const BLOCK_COLUMNS: usize = 128;
/// Multiply-adds that are worth a task of their own.
const TASK: usize = 1 << 20;

thread_local! {
    /// Packed operands, kept from call to call.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Computes the product on the threads of the current pool, or on this one where `parallel` is off.
pub fn run(kernel: Kernel, product: &Product<'_>, out: Output<'_>, parallel: bool, finish: Finish<'_>) {
    let [m, k, n] = product.size;
    let threads = if parallel { rayon::current_num_threads() } else { 1 };
    let tasks = (m * n * k / TASK).clamp(1, 4 * threads);
    let (rows, columns) = grid(m, n, if threads == 1 { 1 } else { tasks });
    let blocks = rows.len() * columns.len();
    let block = |index: usize| {
        let (rows, columns) = (rows[index / columns.len()].clone(), columns[index % columns.len()].clone());
        SCRATCH.with_borrow_mut(|scratch| {
            // SAFETY: the blocks of the grid do not overlap and cover the result, whose size `Output` checked.
            unsafe { compute(kernel, product, &out, rows, columns, scratch, finish) }
        });
    };
    if blocks == 1 || threads == 1 {
        (0..blocks).for_each(block);
    } else {
        (0..blocks).into_par_iter().with_max_len(1).for_each(block);
    }
}

/// Row and column ranges of blocks: about `tasks` of them, none larger than the caches hold.
fn grid(m: usize, n: usize, tasks: usize) -> (Vec<Range<usize>>, Vec<Range<usize>>) {
    let row_blocks = m.div_ceil(BLOCK_ROWS);
    let column_blocks = tasks.div_ceil(row_blocks).min(n.div_ceil(BLOCK_COLUMNS));
    let row_blocks = row_blocks.max(tasks.div_ceil(column_blocks).min(m.div_ceil(4 * ROWS)));
    (split(m, row_blocks, ROWS), split(n, column_blocks, 2 * LANES))
}

/// `0..len` in about `parts` ranges whose inner borders are multiples of `unit`.
fn split(len: usize, parts: usize, unit: usize) -> Vec<Range<usize>> {
    let size = len.div_ceil(parts).next_multiple_of(unit);
    (0..len).step_by(size).map(|start| start..len.min(start + size)).collect()
}

/// One block, start to end.
///
/// # Safety
/// The block lies inside the result and no other thread touches it.
unsafe fn compute(
    kernel: Kernel,
    product: &Product<'_>,
    out: &Output<'_>,
    rows: Range<usize>,
    columns: Range<usize>,
    scratch: &mut Vec<f32>,
    finish: Finish<'_>,
) {
    let k = product.size[1];
    let words = if kernel == Kernel::F32 { k } else { k.div_ceil(2) };
    let stretch = words.div_ceil(words.div_ceil(K_WORDS)).next_multiple_of(LANES);
    let panels = rows.len().div_ceil(ROWS);
    scratch.resize(scratch.len().max((panels + 2) * stretch * LANES), 0.0);
    let (packed_b, packed_a) = scratch.split_at_mut(2 * stretch * LANES);
    let [across, along] = product.b.strides;
    let b_lanes = super::Matrix { values: product.b.values, strides: [along, across] };
    for first in (0..words).step_by(stretch) {
        let count = stretch.min(words - first);
        let panel = |operand, lane, lanes| Panel { operand, depth: k, lane, lanes, first, words: count };
        for (row, place) in rows.clone().step_by(ROWS).zip(packed_a.chunks_mut(stretch * LANES)) {
            let lanes = ROWS.min(rows.end - row);
            // SAFETY: the kernel is available; a chunk holds a stretch; the rows are rows of a.
            unsafe { panel(product.a, row, lanes).pack(kernel, place.as_mut_ptr()) };
        }
        for column in columns.clone().step_by(2 * LANES) {
            let width = (2 * LANES).min(columns.end - column);
            for half in (0..width).step_by(LANES) {
                let place = packed_b[half * count..].as_mut_ptr();
                // SAFETY: the kernel is available; there is room for two panels; the columns are columns of b.
                unsafe { panel(b_lanes, column + half, LANES.min(width - half)).pack(kernel, place) };
            }
            for (row, panel) in rows.clone().step_by(ROWS).zip(packed_a.chunks(stretch * LANES)) {
                let tile = Tile {
                    k: count,
                    a: panel.as_ptr(),
                    b: packed_b.as_ptr(),
                    c: out.at(row, column),
                    stride: out.stride(),
                    rows: ROWS.min(rows.end - row),
                    columns: width,
                    alpha: product.alpha,
                    beta: if first == 0 { product.beta } else { 1.0 },
                };
                // SAFETY: the panels were packed above; the tile lies in this block.
                unsafe { kernel.run(&tile) };
            }
        }
    }
    for row in rows {
        // SAFETY: the row segment lies in this block.
        unsafe { out.finish(row, columns.clone(), finish) };
    }
}
