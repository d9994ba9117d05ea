//! Rows of a head, and right factors packed for the products of `tiles.rs`.
//!
//! A right factor is cut into panels of up to four vectors of columns, so that every read of the inner loop is
//! sequential whatever the stride of the projection. Columns are padded with zeros to half vectors: a head of 72 is
//! four and a half of them.

use super::turn::turn;
use crate::simd::vectorised;

/// A vector: one AVX-512 register, two AVX2 ones, four of NEON.
pub const WIDTH: usize = 16;

/// Half a vector.
pub const HALF: usize = WIDTH / 2;

/// Most whole vectors of a panel.
const PANEL: usize = 4;

/// `columns` rounded up to whole vectors: the place that rows of a result and packed factors need.
pub fn padded(columns: usize) -> usize {
    columns.next_multiple_of(WIDTH)
}

/// Equally long rows at a constant distance.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// Begins with row 0.
    pub data: &'a [f32],
    /// Distance of two rows.
    pub stride: usize,
    /// Values in a row.
    pub width: usize,
}

impl<'a> Rows<'a> {
    /// Row `i`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..][..self.width]
    }

    /// The rows from `first` on.
    pub fn from(&self, first: usize) -> Self {
        Rows { data: &self.data[first * self.stride..], ..*self }
    }
}

/// The panels of a matrix of `columns` columns, as (first column, columns): as even as they can be; the last one ends
/// with a half vector where that holds the last columns.
pub fn panels(columns: usize) -> impl Iterator<Item = (usize, usize)> {
    let halves = columns.div_ceil(HALF);
    let (vectors, odd) = (halves / 2, halves % 2);
    let count = vectors.div_ceil(PANEL).max(odd);
    (0..count).map(move |i| {
        let [first, end] = [i, i + 1].map(|i| i * vectors / count * WIDTH);
        let half = if i + 1 == count { odd * HALF } else { 0 };
        (first, end - first + half)
    })
}

/// Packs `count` rows as the rows of a right factor, in up to `count · padded(width)` values.
pub fn pack(rows: Rows<'_>, count: usize, out: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (column, width) in panels(rows.width) {
                let panel = &mut out[column * count..][..width * count];
                let live = width.min(rows.width - column);
                for (i, out) in panel.chunks_exact_mut(width).enumerate() {
                    copy(&rows.row(i)[column..][..live], out);
                }
            }
        },
    );
}

/// Packs `count` rows as the columns of a right factor, in up to `width · padded(count)` values.
pub fn pack_transposed(rows: Rows<'_>, count: usize, out: &mut [f32]) {
    let depth = rows.width;
    vectorised(
        #[inline(always)]
        || {
            let mut block = [[0.0f32; WIDTH]; WIDTH];
            for (column, width) in panels(count) {
                let panel = &mut out[column * depth..][..width * depth];
                for at in (0..width).step_by(WIDTH) {
                    let row = column + at;
                    let (live, lanes) = (WIDTH.min(count - row), WIDTH.min(width - at));
                    let (whole, rest) = (depth / WIDTH, depth % WIDTH);
                    for k in 0..whole {
                        if live < WIDTH {
                            block[live..].fill([0.0; WIDTH]);
                        }
                        for i in 0..live {
                            block[i] = rows.row(row + i).as_chunks().0[k];
                        }
                        turn(&mut block);
                        write_square(&block, lanes, width, &mut panel[k * WIDTH * width + at..]);
                    }
                    if rest > 0 {
                        block = [[0.0; WIDTH]; WIDTH];
                        for i in 0..live {
                            copy(&rows.row(row + i)[whole * WIDTH..], &mut block[i][..rest]);
                        }
                        turn(&mut block);
                        write_square(&block[..rest], lanes, width, &mut panel[whole * WIDTH * width + at..]);
                    }
                }
            }
        },
    );
}

/// Writes the first `lanes` values, [`WIDTH`] or [`HALF`], of the rows of a square `width` apart.
#[inline(always)]
fn write_square(square: &[[f32; WIDTH]], lanes: usize, width: usize, out: &mut [f32]) {
    for (j, row) in square.iter().enumerate() {
        let out = &mut out[j * width..];
        match out.first_chunk_mut::<WIDTH>() {
            Some(out) if lanes == WIDTH => *out = *row,
            _ => out[..lanes].copy_from_slice(&row[..lanes]),
        }
    }
}

/// Draws rows together, one after the other.
pub fn gather<'a>(rows: Rows<'_>, count: usize, out: &'a mut [f32]) -> Rows<'a> {
    vectorised(
        #[inline(always)]
        || {
            for (i, out) in out.chunks_exact_mut(rows.width).take(count).enumerate() {
                copy(rows.row(i), out);
            }
        },
    );
    Rows { data: out, stride: rows.width, width: rows.width }
}

/// Copies `from` to the front of `to`, in registers, and zeros behind it.
#[inline(always)]
pub fn copy(from: &[f32], to: &mut [f32]) {
    copy_times(from, 1.0, to);
}

/// [`copy`] times a factor.
#[inline(always)]
pub fn copy_times(from: &[f32], factor: f32, to: &mut [f32]) {
    map(from, to, |x| x * factor);
}

/// Writes `f` of `from` to the front of `to`, by vectors and a half, and zeros behind it.
#[inline(always)]
pub fn map(from: &[f32], to: &mut [f32], f: impl Fn(f32) -> f32) {
    let (front, zeros) = to.split_at_mut(from.len());
    let ((vectors, from), (to_vectors, to)) = (from.as_chunks::<WIDTH>(), front.as_chunks_mut::<WIDTH>());
    // Changed in place: compilers that cannot tell whether `from` and `to` overlap would go value by value.
    for (to, from) in to_vectors.iter_mut().zip(vectors) {
        *to = *from;
        for lane in 0..WIDTH {
            to[lane] = f(to[lane]);
        }
    }
    let ((halves, from), (to_halves, to)) = (from.as_chunks::<HALF>(), to.as_chunks_mut::<HALF>());
    // One at most, which a loop would not say.
    if let (Some(from), Some(to)) = (halves.first(), to_halves.first_mut()) {
        *to = *from;
        for lane in 0..HALF {
            to[lane] = f(to[lane]);
        }
    }
    for i in 0..to.len() {
        to[i] = f(from[i]);
    }
    if !zeros.is_empty() {
        zeros.fill(0.0);
    }
}
