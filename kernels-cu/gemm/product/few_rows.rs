//! Products of vectors: every column of b is read once and multiplied with up to [`ROWS`] rows while it passes.
//!
//! A conditioning vector times a weight is bound by reading the weight; packing it would read and write it once more.
//! In bf16 the words are those of the micro-kernels, pairs of neighbours along k.

#![allow(unsafe_code)] // AVX-512 intrinsics; threads write disjoint columns of one result.

use super::micro::{Kernel, LANES};
use super::pack::{Nearest, Plain, Rounded, Stored, Widened, Words, rounded};
use super::{Finish, Output, Product, Values};
use half::bf16;
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::cell::{Cell, RefCell};
use std::ops::Range;

/// Rows that are multiplied with a column together; more rows take several turns, so that every row is summed in the
/// same order however many there are.
const ROWS: usize = 8;
/// Elements of b that are worth a task of their own.
const TASK: usize = 1 << 17;

thread_local! {
    /// Sums of a block, by column, kept from call to call.
    static SUMS: RefCell<Vec<[f32; ROWS]>> = const { RefCell::new(Vec::new()) };
    /// Rows rounded to bf16, as f32 or in pairs, kept from call to call.
    static ROUNDED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Whether the product has this form: vectors, rows of a and columns of b that are contiguous, and AVX-512.
pub fn fits(product: &Product<'_>) -> bool {
    let Product { a, b, size: [_, k, _], alpha, beta, vectors, .. } = *product;
    let plain = b.strides[0] == 1 && a.strides[1] == 1 && alpha == 1.0 && beta == 0.0;
    vectors && k > 0 && plain && !matches!(a.values, Values::Rows(_)) && Kernel::F32.available()
}

/// Computes the product, blocks of columns over threads.
pub fn run(product: &Product<'_>, out: &Output<'_>, parallel: bool, finish: Finish<'_>) {
    let [m, k, n] = product.size;
    let pairs = product.bf16 && Kernel::Bf16.available();
    // Taken out of its cell, so that a product that this thread picks up while it waits finds an empty one.
    let mut rounded = ROUNDED.take();
    let (a, stride) = match product.a.values {
        Values::F32(values) if !product.bf16 => (values, product.a.strides[0]),
        values => {
            let words = if pairs { k.div_ceil(2) } else { k };
            rounded.resize(m * words, 0.0);
            for (row, out) in rounded.chunks_exact_mut(words).enumerate() {
                round(values, row * product.a.strides[0]..row * product.a.strides[0] + k, pairs, out);
            }
            (&rounded[..], words)
        }
    };
    let row = |r: usize| a[r * stride..].as_ptr();
    let width = (TASK / k).max(LANES);
    // Products of `count` rows from `turn` on with all columns.
    let multiply = |turn: usize, count: usize, columns: &Range<usize>, sums: &mut [[f32; ROWS]]| {
        for (column, sums) in columns.clone().zip(sums) {
            let start = column * product.b.strides[1];
            let mut first = 0;
            while first < count {
                let left = count - first;
                let rows = std::array::from_fn(|r| row(turn + (first + r).min(count - 1)));
                let sums = &mut sums[first..];
                // SAFETY: AVX-512 is there (`fits`), with products of bf16 where there are pairs; rows and the column
                // hold k elements.
                first += unsafe {
                    match product.b.values {
                        Values::F32(b) if pairs => group_of_pairs::<Rounded>(left, rows, &b[start..][..k], sums),
                        Values::F32(b) if product.bf16 => group::<Nearest>(left, rows, &b[start..][..k], sums),
                        Values::F32(b) => group::<Plain>(left, rows, &b[start..][..k], sums),
                        Values::Bf16(b) if pairs => group_of_pairs::<Stored>(left, rows, &b[start..][..k], sums),
                        Values::Bf16(b) => group::<Widened>(left, rows, &b[start..][..k], sums),
                        Values::Rows(_) => left, // never on the right: `dispatch` checks
                    }
                };
            }
        }
    };
    let block = |index: usize| {
        let columns = index * width..n.min((index + 1) * width);
        SUMS.with_borrow_mut(|sums| {
            sums.resize(columns.len(), [0.0; ROWS]);
            for turn in (0..m).step_by(ROWS) {
                let count = ROWS.min(m - turn);
                multiply(turn, count, &columns, sums);
                for index in 0..count {
                    let write = |row: usize, from: usize, piece: &mut [f32], twin: Option<&mut [f32]>| {
                        piece.iter_mut().zip(sums.iter()).for_each(|(value, sums)| *value = sums[index]);
                        finish(row, from, piece, twin);
                    };
                    // SAFETY: the columns lie inside the result, and every block has its own.
                    unsafe { out.finish(turn + index, columns.clone(), &write) };
                }
            }
        });
    };
    let blocks = n.div_ceil(width);
    if parallel && blocks > 1 {
        (0..blocks).into_par_iter().for_each(block);
    } else {
        (0..blocks).for_each(block);
    }
    ROUNDED.set(rounded);
}

/// Elements of a row rounded to bf16: pairs of them a word, or one as f32.
fn round(values: Values<'_>, elements: Range<usize>, pairs: bool, out: &mut [f32]) {
    match values {
        // SAFETY: pairs are asked for where AVX-512 is there; a row of k elements has half as many words.
        Values::F32(values) if pairs => unsafe { rounded(&values[elements], out) },
        Values::F32(values) => {
            out.iter_mut().zip(&values[elements]).for_each(|(out, v)| *out = bf16::from_f32(*v).to_f32());
        }
        Values::Bf16(values) if pairs => {
            for (out, pair) in out.iter_mut().zip(values[elements].chunks(2)) {
                let high = pair.get(1).map_or(0, |v| v.to_bits());
                *out = f32::from_bits(u32::from(pair[0].to_bits()) | u32::from(high) << 16);
            }
        }
        Values::Bf16(values) => out.iter_mut().zip(&values[elements]).for_each(|(out, v)| *out = v.to_f32()),
        Values::Rows(_) => {} // refused by `fits`
    }
}

/// Defines products of rows with a column: `$group` takes the next 4, 2 or 1 of `left` rows and returns how many,
/// `$dots` multiplies them, in two partial sums of [`LANES`] words each.
macro_rules! dot_kernel {
    ($group:ident, $dots:ident, $features:literal, $multiply:expr) => {
        /// # Safety
        /// The processor has the instructions, and every row has as many elements as the column.
        #[target_feature(enable = $features)]
        unsafe fn $group<W: Words>(
            left: usize,
            rows: [*const f32; 4],
            column: &[W::Element],
            sums: &mut [f32],
        ) -> usize {
            let [r0, r1, ..] = rows;
            // SAFETY: passed on to the caller.
            unsafe {
                match left {
                    1 => sums[..1].copy_from_slice(&$dots::<W, 1>([r0], column)),
                    2 | 3 => sums[..2].copy_from_slice(&$dots::<W, 2>([r0, r1], column)),
                    _ => sums[..4].copy_from_slice(&$dots::<W, 4>(rows, column)),
                }
            }
            [1, 2, 2, 4][left.min(4) - 1]
        }

        /// # Safety
        /// As its caller.
        #[target_feature(enable = $features)]
        unsafe fn $dots<W: Words, const R: usize>(rows: [*const f32; R], column: &[W::Element]) -> [f32; R] {
            let mut sums = [[_mm512_setzero_ps(); R]; 2];
            let words = column.len().div_ceil(W::PER_WORD);
            for start in (0..words).step_by(2 * LANES) {
                for (half, sums) in sums.iter_mut().enumerate() {
                    let i = start + half * LANES;
                    let left = column.len().saturating_sub(i * W::PER_WORD);
                    // SAFETY: at most `left` elements from there on are read, and as many words of the rows as they fill.
                    unsafe {
                        let value = W::along(column.as_ptr().wrapping_add(i * W::PER_WORD), left);
                        for r in 0..R {
                            let row = Plain::along(rows[r].wrapping_add(i), left.div_ceil(W::PER_WORD));
                            sums[r] = $multiply(sums[r], _mm512_castsi512_ps(row), _mm512_castsi512_ps(value));
                        }
                    }
                }
            }
            std::array::from_fn(|r| _mm512_reduce_add_ps(_mm512_add_ps(sums[0][r], sums[1][r])))
        }
    };
}

dot_kernel!(group, dots, "avx512f,avx512bw", |sum, a, b| _mm512_fmadd_ps(a, b, sum));
dot_kernel!(group_of_pairs, dots_of_pairs, "avx512f,avx512bw,avx512bf16", |sum, a, b| {
    // Registers of pairs of bf16, under the name of f32 so far.
    _mm512_dpbf16_ps(sum, std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b))
});
