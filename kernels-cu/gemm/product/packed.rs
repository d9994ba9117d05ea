//! The blocked product around the micro-kernels.
//!
//! The result is cut into blocks that are computed independently, each by one thread from start to end. In general
//! the rows of a are packed for a stretch of k (they stay in the second-level cache), then for each pair of panels of b
//! (first level) every tile of the block is computed. Where b is small the roles are exchanged. Where blocks begin
//! changes no bit of the result; where stretches of k begin does, so that depends on k alone.

#![allow(unsafe_code)] // Disjoint blocks of one result are written by several threads.

use super::micro::{Kernel, LANES, ROWS, Tile};
use super::pack::Panel;
use super::{Finish, Matrix, Output, Product};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Longest stretch of k, in words: two panels of b are 64 KiB.
const K_WORDS: usize = 512;
/// Most rows of a block: 19 panels of a are 608 KiB at the longest stretch.
const BLOCK_ROWS: usize = 19 * ROWS;
/// Most words of b that are packed at once, 512 KiB: below it rows are the outer loop.
const NARROW: usize = 1 << 17;
/// Fewest columns of a block where there are more: packing the rows again per block must not weigh.
const BLOCK_COLUMNS: usize = 128;
/// Multiply-adds of f32 in the time in which an element is packed.
const PACK: usize = 32;
/// Multiply-adds that are worth a task of their own.
const TASK: usize = 1 << 20;

thread_local! {
    /// Packed operands, kept from call to call.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Computes the product on the threads of the current pool, or on this one where `parallel` is off.
pub fn run(kernel: Kernel, product: &Product<'_>, out: Output<'_>, parallel: bool, finish: Finish<'_>) {
    let [m, k, n] = product.size;
    let words = if kernel == Kernel::F32 { k } else { k.div_ceil(2) };
    let stretch = stretch_of(words);
    let plan = Plan { kernel, product, words, stretch, narrow: words <= stretch && stretch * n <= NARROW };
    let threads = if parallel { rayon::current_num_threads() } else { 1 };
    let (rows, columns) = plan.grid((m * n * k / TASK).clamp(1, if threads == 1 { 1 } else { 4 * threads }), threads);
    let blocks = rows.count() * columns.count();
    let block = |index: usize| {
        let (rows, columns) = (rows.range(index / columns.count()), columns.range(index % columns.count()));
        SCRATCH.with_borrow_mut(|scratch| {
            // SAFETY: the blocks of the grid do not overlap and cover the result, whose size `Output` checked.
            unsafe { plan.block(&out, rows, columns, scratch, finish) }
        });
    };
    if blocks == 1 || threads == 1 {
        (0..blocks).for_each(block);
    } else {
        (0..blocks).into_par_iter().with_max_len(1).for_each(block);
    }
}

/// Words along k that are summed at a time, of `words` in all.
pub fn stretch_of(words: usize) -> usize {
    words.div_ceil(words.div_ceil(K_WORDS)).next_multiple_of(LANES)
}

/// `0..len` in ranges of one size; the last may be shorter. Held as two numbers: a call must not allocate.
#[derive(Clone, Copy)]
struct Cuts {
    len: usize,
    size: usize,
}

impl Cuts {
    /// About `parts` ranges whose inner borders are multiples of `unit`.
    fn new(len: usize, parts: usize, unit: usize) -> Self {
        Cuts { len, size: len.div_ceil(parts).next_multiple_of(unit).max(1) }
    }

    fn count(self) -> usize {
        self.len.div_ceil(self.size)
    }

    fn range(self, index: usize) -> Range<usize> {
        index * self.size..self.len.min((index + 1) * self.size)
    }
}

/// What the blocks of a product share.
struct Plan<'a> {
    kernel: Kernel,
    product: &'a Product<'a>,
    /// Words along k.
    words: usize,
    /// Words along k that are packed at a time.
    stretch: usize,
    /// Whether all of b fits the cache in one stretch.
    narrow: bool,
}

impl<'a> Plan<'a> {
    /// Row and column ranges of blocks, none larger than the caches hold: about `tasks` of them where b is small, else
    /// at most so many, such that the threads are done soonest. Fewer blocks have less to pack.
    fn grid(&self, tasks: usize, threads: usize) -> (Cuts, Cuts) {
        let [m, _, n] = self.product.size;
        let most = tasks.min(m.div_ceil(4 * ROWS));
        if self.narrow {
            return (Cuts::new(m, most, ROWS), Cuts::new(n, 1, 2 * LANES));
        }
        let needed = m.div_ceil(BLOCK_ROWS);
        let most = if tasks > 1 { most.max(needed + threads - 1) } else { needed };
        let pack = if self.kernel == Kernel::F32 { PACK } else { 2 * PACK };
        let cost = |(rows, columns): &(Cuts, Cuts)| {
            let block = rows.size * columns.size + pack * (rows.size + columns.size);
            (rows.count() * columns.count()).div_ceil(threads) * block
        };
        let all = Cuts::new(n, 1, 2 * LANES);
        (1..=tasks.div_ceil(needed).min(n.div_ceil(BLOCK_COLUMNS)))
            .map(|columns| Cuts::new(n, columns, 2 * LANES))
            .flat_map(|columns| (needed..=most).map(move |rows| (Cuts::new(m, rows, ROWS), columns)))
            .min_by_key(cost)
            .unwrap_or((Cuts::new(m, needed, ROWS), all))
    }

    /// Words `first..` of rows of a, as lanes.
    fn rows(&self, first: usize, row: usize, lanes: usize) -> Panel<'a> {
        self.panel(self.product.a, first, row, lanes)
    }

    /// Words `first..` of columns of b, as lanes.
    fn columns(&self, first: usize, column: usize, lanes: usize) -> Panel<'a> {
        self.panel(self.product.b.transposed(), first, column, lanes)
    }

    fn panel(&self, operand: Matrix<'a>, first: usize, lane: usize, lanes: usize) -> Panel<'a> {
        let words = self.stretch.min(self.words - first);
        Panel { operand, depth: self.product.size[1], lane, lanes, first, words }
    }

    /// One block, start to end.
    ///
    /// # Safety
    /// The kernel is available; the block lies inside the result and no other thread touches it.
    unsafe fn block(
        &self,
        out: &Output<'_>,
        rows: Range<usize>,
        columns: Range<usize>,
        scratch: &mut Vec<f32>,
        finish: Finish<'_>,
    ) {
        // SAFETY: passed on to the caller.
        unsafe {
            if self.narrow {
                self.rows_outside(out, rows, columns, scratch, finish);
            } else {
                self.columns_outside(out, rows, columns, scratch, finish);
            }
        }
    }

    /// All of b packed first, then panel by panel of rows, each finished while in the first-level cache.
    ///
    /// # Safety
    /// As [`Plan::block`].
    unsafe fn rows_outside(
        &self,
        out: &Output<'_>,
        rows: Range<usize>,
        columns: Range<usize>,
        scratch: &mut Vec<f32>,
        finish: Finish<'_>,
    ) {
        let panel = self.words * LANES;
        let (packed_a, packed_b) = reserve(scratch, panel, columns.len().div_ceil(LANES) * panel);
        for (column, place) in columns.clone().step_by(LANES).zip(packed_b.chunks_mut(panel)) {
            let lanes = LANES.min(columns.end - column);
            // SAFETY: the kernel is available, a chunk holds a panel, and the columns are columns of b.
            unsafe { self.columns(0, column, lanes).pack(self.kernel, place.as_mut_ptr()) };
        }
        let pairs = columns.len().div_ceil(2 * LANES);
        for row in rows.clone().step_by(ROWS) {
            let lanes = ROWS.min(rows.end - row);
            // SAFETY: as above, with rows of a; the tiles and the row pieces lie in this block.
            unsafe {
                self.rows(0, row, lanes).pack(self.kernel, packed_a.as_mut_ptr());
                let next = self.rows(0, row + lanes, ROWS.min(rows.end - row - lanes));
                for (index, (column, b)) in
                    columns.clone().step_by(2 * LANES).zip(packed_b.chunks(2 * panel)).enumerate()
                {
                    next.prefetch(self.kernel, index, pairs);
                    self.tile(out, 0, (row, lanes, packed_a), (column, columns.end, b));
                }
                (row..row + lanes).for_each(|row| out.finish(row, columns.clone(), finish));
            }
        }
    }

    /// Stretch by stretch of k: the rows of a packed first, then pair by pair of panels of b.
    ///
    /// # Safety
    /// As [`Plan::block`].
    unsafe fn columns_outside(
        &self,
        out: &Output<'_>,
        rows: Range<usize>,
        columns: Range<usize>,
        scratch: &mut Vec<f32>,
        finish: Finish<'_>,
    ) {
        let panel = self.stretch * LANES;
        let tiles = rows.len().div_ceil(ROWS);
        let (packed_b, packed_a) = reserve(scratch, 2 * panel, tiles * panel);
        for first in (0..self.words).step_by(self.stretch) {
            for (row, place) in rows.clone().step_by(ROWS).zip(packed_a.chunks_mut(panel)) {
                let lanes = ROWS.min(rows.end - row);
                // SAFETY: the kernel is available, a chunk holds a panel, and the rows are rows of a.
                unsafe { self.rows(first, row, lanes).pack(self.kernel, place.as_mut_ptr()) };
            }
            for column in columns.clone().step_by(2 * LANES) {
                let end = columns.end.min(column + 2 * LANES);
                let count = self.stretch.min(self.words - first);
                for (half, place) in (column..end).step_by(LANES).zip(packed_b.chunks_mut(count * LANES)) {
                    // SAFETY: as above, with columns of b; there is room for two panels.
                    unsafe { self.columns(first, half, LANES.min(end - half)).pack(self.kernel, place.as_mut_ptr()) };
                }
                let next = self.columns(first, end, (2 * LANES).min(columns.end - end));
                for (index, (row, a)) in rows.clone().step_by(ROWS).zip(packed_a.chunks(panel)).enumerate() {
                    next.prefetch(self.kernel, index, tiles);
                    let lanes = ROWS.min(rows.end - row);
                    // SAFETY: the panels were packed above; the tile lies in this block.
                    unsafe { self.tile(out, first, (row, lanes, a), (column, columns.end, packed_b)) };
                }
            }
        }
        for row in rows {
            // SAFETY: the row piece lies in this block.
            unsafe { out.finish(row, columns.clone(), finish) };
        }
    }

    /// One tile of a stretch: `rows` of `a` from `row` on, and up to two panels of b from `column` on before `end`.
    ///
    /// # Safety
    /// The kernel is available; the panels are packed; the tile lies in a block of this thread.
    unsafe fn tile(
        &self,
        out: &Output<'_>,
        first: usize,
        (row, rows, a): (usize, usize, &[f32]),
        (column, end, b): (usize, usize, &[f32]),
    ) {
        let tile = Tile {
            k: self.stretch.min(self.words - first),
            a: a.as_ptr(),
            b: b.as_ptr(),
            c: out.at(row, column),
            stride: out.stride(),
            rows,
            columns: (2 * LANES).min(end - column),
            alpha: self.product.alpha,
            beta: if first == 0 { self.product.beta } else { 1.0 },
        };
        // SAFETY: passed on to the caller.
        unsafe { self.kernel.run(&tile) };
    }
}

/// Two pieces of the scratch memory, which grows to the largest product seen; the first begins with a cache line, so
/// that no register of a panel lies across two.
fn reserve(scratch: &mut Vec<f32>, first: usize, second: usize) -> (&mut [f32], &mut [f32]) {
    if scratch.len() < first + second + LANES {
        scratch.resize(first + second + LANES, 0.0);
    }
    let skipped = scratch.as_ptr().align_offset(size_of::<[f32; LANES]>()).min(LANES);
    scratch[skipped..skipped + first + second].split_at_mut(first)
}
