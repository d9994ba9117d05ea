//! Where the rows of a head lie, and how heads and ranges of queries go over threads.
//!
//! Every operator of the attention family writes its results through [`forward`] and its gradients through
//! [`split_parts`]; what happens inside a head is its own.

use super::panels::{Rows, WIDTH, copy, copy_times};
use crate::generated::attention::Dims;
use crate::simd::vectorised;
use rayon::prelude::*;
use std::cell::{Cell, RefCell};
use std::ops::Range;

/// Queries of one task where heads alone are too few for the threads.
pub const TASK: usize = 192;
/// Most values of the queries of one task, 2 MiB: they and their sums are walked through once for every block of keys.
const TASK_VALUES: usize = 1 << 19;

/// Fewest values of the results that one task lays out, 256 KiB.
const COPIED: usize = 1 << 16;
/// Most values of the results of a sample with little to do.
const SMALL: usize = 1 << 19;

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// Results by head, kept from call to call.
    static BY_HEAD: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Cuts this thread's scratch into pieces of the given lengths; contents are arbitrary. Every piece begins with a cache
/// line, so that no vector of it lies in two.
pub fn with_scratch<const COUNT: usize>(lengths: [usize; COUNT], body: impl FnOnce([&mut [f32]; COUNT])) {
    SCRATCH.with_borrow_mut(|scratch| {
        let total = lengths.iter().map(|length| length.next_multiple_of(WIDTH)).sum::<usize>() + WIDTH;
        if scratch.len() < total {
            scratch.resize(total, 0.0);
        }
        let skipped = scratch.as_ptr().align_offset(WIDTH * size_of::<f32>()).min(WIDTH);
        let mut rest = &mut scratch[skipped..];
        body(lengths.map(|length| {
            let piece = rest.split_off_mut(..length.next_multiple_of(WIDTH)).unwrap_or_default();
            &mut piece[..length]
        }));
    });
}

/// The blocks of `0..len`, as (start, length): at most `most` long, about even, whole steps but for the last.
pub fn blocks(len: usize, most: usize, step: usize) -> impl Iterator<Item = (usize, usize)> + Clone {
    let block = len.div_ceil(len.div_ceil(most)).next_multiple_of(step);
    (0..len).step_by(block).map(move |start| (start, block.min(len - start)))
}

/// Rows of one head in a sample's `[N, parts, H, E]`: the vectors that a projection wrote side by side per token.
pub fn part(sample: &[f32], parts: usize, part: usize, h: usize, e: usize, head: usize) -> Rows<'_> {
    Rows { data: &sample[(part * h + head) * e..], stride: parts * h * e, width: e }
}

/// Queries, keys and values of one head in a packed projection `[B, N, 3, H, E]`.
pub fn packed<'a>(qkv: &'a [f32], Dims { n, h, e, .. }: Dims, sample: usize, head: usize) -> [Rows<'a>; 3] {
    let qkv = &qkv[sample * n * 3 * h * e..][..n * 3 * h * e];
    [0, 1, 2].map(|p| part(qkv, 3, p, h, e, head))
}

/// One sample of `[B, …]`.
pub fn sample(x: &[f32], b: usize, sample: usize) -> &[f32] {
    let len = x.len() / b;
    &x[sample * len..][..len]
}

/// Rows of one head in `[B, N, H, E]`.
pub fn of_head<'a>(x: &'a [f32], Dims { n, h, e, .. }: Dims, sample: usize, head: usize) -> Rows<'a> {
    part(&x[sample * n * h * e..][..n * h * e], 1, 0, h, e, head)
}

/// Reads a sample front to back where it fits in the second-level cache: its heads then find their scattered rows
/// there, which no prefetcher would foresee.
pub fn touch(sample: &[f32]) {
    if sample.len() <= 1 << 17 {
        std::hint::black_box(sample.iter().step_by(WIDTH).fold(0, |bits, x| bits | x.to_bits()));
    }
}

/// Whether whole samples are enough tasks for the threads.
pub fn by_sample(b: usize) -> bool {
    b >= 2 * rayon::current_num_threads()
}

/// Whether the forward pass goes by whole samples: also where there is one for each thread and so little to do in it
/// that laying out the results afterwards would show.
fn forward_by_sample(Dims { b, n, h, e }: Dims) -> bool {
    by_sample(b) || b == rayon::current_num_threads() && n * h * e <= SMALL
}

/// Where the rows of results go: row 0 is at the front.
pub struct Out<'a> {
    data: &'a mut [f32],
    stride: usize,
    width: usize,
}

impl Out<'_> {
    /// Row `i`.
    #[inline(always)]
    pub fn row(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.stride..][..self.width]
    }

    /// The rows from `first` on.
    pub fn from(&mut self, first: usize) -> Out<'_> {
        Out { data: &mut self.data[first * self.stride..], ..*self }
    }

    /// Fills the first `count` rows.
    pub fn fill(&mut self, count: usize, value: f32) {
        (0..count).for_each(|i| self.row(i).fill(value));
    }
}

/// Computes `y [B, N, H, E]` and one number per query, `rows [B, H, N]`, head by head.
///
/// `begin` is told of a sample whose heads follow on the same thread. `task` is told sample, head and queries, and
/// writes the rows of these queries. A query never depends on the split.
pub fn forward(
    dims @ Dims { n, h, e, b }: Dims,
    y: &mut [f32],
    rows: &mut [f32],
    begin: impl Fn(usize) + Sync,
    task: impl Fn(usize, usize, Range<usize>, Out<'_>, &mut [f32]) + Sync,
) {
    if forward_by_sample(dims) {
        y.par_chunks_mut(n * h * e).zip(rows.par_chunks_mut(h * n)).enumerate().for_each(|(sample, (y, rows))| {
            begin(sample);
            for (head, rows) in rows.chunks_exact_mut(n).enumerate() {
                task(sample, head, 0..n, Out { data: &mut y[head * e..], stride: h * e, width: e }, rows);
            }
        });
        return;
    }
    // [B, H, N, E]: every task writes one piece, and the rows are laid out as [B, N, H, E] afterwards.
    with_results(b * h * n * e, |results| {
        let queries = queries_of_task(n, e, b * h);
        results.par_chunks_mut(n * e).zip(rows.par_chunks_mut(n)).enumerate().for_each(|(index, (y, rows))| {
            y.par_chunks_mut(queries * e).zip(rows.par_chunks_mut(queries)).enumerate().for_each(|(i, (y, rows))| {
                let range = i * queries..i * queries + rows.len();
                task(index / h, index % h, range, Out { data: y, stride: e, width: e }, rows);
            });
        });
        let results = &*results;
        y.par_chunks_mut(h * e).with_min_len(COPIED / (h * e)).enumerate().for_each(|(row, y)| {
            let (sample, token) = (row / n, row % n);
            let heads = results[(sample * h * n + token) * e..].chunks(n * e).map(|rows| &rows[..e]);
            copy_rows(heads, y.chunks_exact_mut(e));
        });
    });
}

/// Copies rows in registers.
fn copy_rows<'a>(from: impl Iterator<Item = &'a [f32]>, to: impl Iterator<Item = &'a mut [f32]>) {
    vectorised(
        #[inline(always)]
        || from.zip(to).for_each(|(from, to)| copy(from, to)),
    );
}

/// Queries of one task of `heads` heads of `n` queries of width `e`: all of a head's where heads are enough for the
/// threads; in long sequences as many as the caches take, because every task packs the keys of its head again.
fn queries_of_task(n: usize, e: usize, heads: usize) -> usize {
    let most = (TASK_VALUES / e.max(1)).max(TASK) / TASK * TASK;
    match heads >= 2 * rayon::current_num_threads() {
        true => n.min(most),
        false => (n / (8 * rayon::current_num_threads()) / TASK * TASK).clamp(TASK, most),
    }
}

/// Memory for results by head. Taken out of its cell, so that a call that this thread picks up while it waits finds an
/// empty one.
fn with_results(len: usize, body: impl FnOnce(&mut [f32])) {
    let mut by_head = BY_HEAD.take();
    if by_head.len() < len {
        by_head.resize(len, 0.0);
    }
    body(&mut by_head[..len]);
    BY_HEAD.set(by_head);
}

/// The rows that one task writes.
pub type RowsMut<'a> = Vec<&'a mut [f32]>;

/// The rows of every head and part in a sample's `[N, PARTS, H, E]`.
pub fn split_parts<const PARTS: usize>(sample: &mut [f32], h: usize, e: usize) -> Vec<[RowsMut<'_>; PARTS]> {
    let n = sample.len() / (PARTS * h * e);
    let mut heads: Vec<_> = (0..h).map(|_| [0; PARTS].map(|_| Vec::with_capacity(n))).collect();
    sample.chunks_exact_mut(e).enumerate().for_each(|(i, row)| heads[i % h][i / h % PARTS].push(row));
    heads
}

/// Calls `task` with the index and the item of every head of a sample, over threads where samples are too few.
pub fn for_heads<T: Send>(b: usize, heads: &mut [T], task: impl Fn(usize, &mut T) + Sync) {
    if by_sample(b) {
        heads.iter_mut().enumerate().for_each(|(head, item)| task(head, item));
    } else {
        heads.par_iter_mut().enumerate().for_each(|(head, item)| task(head, item));
    }
}

/// Calls `task` with sample, head and the rows of dq, dk, dv for every head of a packed gradient `[B, N, 3, H, E]`;
/// `begin` is told of a sample before its heads.
pub fn backward(
    Dims { b, n, h, e }: Dims,
    dqkv: &mut [f32],
    begin: impl Fn(usize) + Sync,
    task: impl Fn(usize, usize, &mut [RowsMut<'_>; 3]) + Sync,
) {
    dqkv.par_chunks_mut(n * 3 * h * e).enumerate().for_each(|(sample, dqkv)| {
        begin(sample);
        for_heads(b, &mut split_parts::<3>(dqkv, h, e), |head, grads| task(sample, head, grads));
    });
}

/// Copies rows to whole vectors, zeros behind them: `count · padded(width)` values.
#[inline(always)]
pub fn widen(rows: Rows<'_>, count: usize, out: &mut [f32]) {
    let wide = rows.width.next_multiple_of(WIDTH);
    for (i, out) in out[..count * wide].chunks_exact_mut(wide).enumerate() {
        copy(rows.row(i), out);
    }
}

/// Copies padded rows to where they belong.
pub fn write(from: &[f32], stride: usize, to: &mut [&mut [f32]]) {
    write_times(from, stride, 1.0, to);
}

/// [`write`] times a factor.
pub fn write_times(from: &[f32], stride: usize, factor: f32, to: &mut [&mut [f32]]) {
    vectorised(
        #[inline(always)]
        || {
            for i in 0..to.len() {
                let to = &mut *to[i];
                copy_times(&from[i * stride..][..to.len()], factor, to);
            }
        },
    );
}
