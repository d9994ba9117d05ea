//! Register-tiled products of the small matrices inside one head.
//!
//! The right factor is packed into panels of up to four vectors of columns, so that every read of the inner loop is
//! sequential whatever the stride of the projection; columns are padded with zeros to whole vectors. The left factor
//! is read in place, by rows or transposed.

use crate::simd::vectorised;
use std::array::from_fn;

/// Columns of a vector: half an AVX-512 register, because heads of 72 and 49 keys waste less that way and
/// processors that split 512-bit operations lose nothing.
pub const WIDTH: usize = 8;

/// Rows of a register tile.
const TILE: usize = 6;

/// `columns` rounded up to whole vectors.
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

/// The panels of a matrix of `vectors` vectors of columns, as (first vector, vectors): as even as they can be.
fn panels(vectors: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = vectors.div_ceil(4);
    (0..count).map(move |i| (i * vectors / count, (i + 1) * vectors / count - i * vectors / count))
}

/// Packs `count` rows as the rows of a right factor: `count · padded(width)` values.
pub fn pack(rows: Rows<'_>, count: usize, out: &mut [f32]) {
    for (first, vectors) in panels(rows.width.div_ceil(WIDTH)) {
        let (column, width) = (first * WIDTH, vectors * WIDTH);
        let panel = &mut out[column * count..][..width * count];
        let live = width.min(rows.width - column);
        for (i, out) in panel.chunks_exact_mut(width).enumerate() {
            out[..live].copy_from_slice(&rows.row(i)[column..][..live]);
            out[live..].fill(0.0);
        }
    }
}

/// Packs `count` rows as the columns of a right factor: `width · padded(count)` values.
pub fn pack_transposed(rows: Rows<'_>, count: usize, out: &mut [f32]) {
    let depth = rows.width;
    for (first, vectors) in panels(count.div_ceil(WIDTH)) {
        let width = vectors * WIDTH;
        let panel = &mut out[first * WIDTH * depth..][..width * depth];
        for vector in 0..vectors {
            let row = (first + vector) * WIDTH;
            if row + WIDTH <= count {
                let rows: [&[f32]; WIDTH] = from_fn(|i| rows.row(row + i));
                for (k, out) in panel.chunks_exact_mut(width).enumerate() {
                    let out = &mut out[vector * WIDTH..][..WIDTH];
                    (0..WIDTH).for_each(|i| out[i] = rows[i][k]);
                }
            } else {
                for (k, out) in panel.chunks_exact_mut(width).enumerate() {
                    let out = &mut out[vector * WIDTH..][..WIDTH];
                    (0..WIDTH).for_each(|i| out[i] = if row + i < count { rows.row(row + i)[k] } else { 0.0 });
                }
            }
        }
    }
}

/// The result of a product: rows of `stride` values, overwritten or added to.
pub struct Sum<'a> {
    /// Begins with row 0.
    pub data: &'a mut [f32],
    /// Distance of two rows, at least the padded columns of the right factor.
    pub stride: usize,
    /// Adds to what is there.
    pub add: bool,
}

/// `out = left · right` with `rows` rows of `left`; `right` holds `columns` packed columns (padded).
pub fn product(left: Rows<'_>, rows: usize, right: &[f32], columns: usize, out: &mut Sum<'_>) {
    vectorised(
        #[inline(always)]
        || {
            by_panels(right, columns, left.width, rows, out, |at| {
                let rows: [&[f32]; TILE] = from_fn(|r| if at + r < rows { left.row(at + r) } else { &[] });
                move |r: usize, k: usize| rows[r][k]
            });
        },
    );
}

/// `out = leftᵀ · right`: `left` has as many rows as `right`, and its columns are the rows of the result.
pub fn product_transposed(left: Rows<'_>, depth: usize, right: &[f32], columns: usize, out: &mut Sum<'_>) {
    vectorised(
        #[inline(always)]
        || {
            by_panels(right, columns, depth, left.width, out, |at| {
                let data = &left.data[at..];
                move |r: usize, k: usize| data[k * left.stride + r]
            });
        },
    );
}

/// Walks the panels of `right` and, below each, the row tiles; `reader(i)` reads the left factor from row `i` on.
#[inline(always)]
fn by_panels<R: Fn(usize, usize) -> f32>(
    right: &[f32],
    columns: usize,
    depth: usize,
    rows: usize,
    out: &mut Sum<'_>,
    reader: impl Fn(usize) -> R,
) {
    for (first, vectors) in panels(columns.div_ceil(WIDTH)) {
        let panel = &right[first * WIDTH * depth..][..vectors * WIDTH * depth];
        let column = first * WIDTH;
        match vectors {
            4 => by_tiles::<4, R>(panel, column, rows, out, &reader),
            3 => by_tiles::<3, R>(panel, column, rows, out, &reader),
            2 => by_tiles::<2, R>(panel, column, rows, out, &reader),
            _ => by_tiles::<1, R>(panel, column, rows, out, &reader),
        }
    }
}

#[inline(always)]
fn by_tiles<const V: usize, R: Fn(usize, usize) -> f32>(
    panel: &[f32],
    column: usize,
    rows: usize,
    out: &mut Sum<'_>,
    reader: &impl Fn(usize) -> R,
) {
    let mut at = 0;
    while at < rows {
        let data = &mut out.data[at * out.stride + column..];
        let (stride, add) = (out.stride, out.add);
        let left = reader(at);
        at += match rows - at {
            TILE.. => tile::<TILE, V>(left, panel, data, stride, add),
            4.. => tile::<4, V>(left, panel, data, stride, add),
            2.. => tile::<2, V>(left, panel, data, stride, add),
            _ => tile::<1, V>(left, panel, data, stride, add),
        };
    }
}

/// `M` rows by `V` vectors of the result, held in registers over the whole depth. Returns `M`.
#[inline(always)]
fn tile<const M: usize, const V: usize>(
    left: impl Fn(usize, usize) -> f32,
    panel: &[f32],
    out: &mut [f32],
    stride: usize,
    add: bool,
) -> usize {
    let mut sum = [[[0.0f32; WIDTH]; V]; M];
    if add {
        for r in 0..M {
            let row = &out[r * stride..][..V * WIDTH];
            sum[r] = from_fn(|v| from_fn(|lane| row[v * WIDTH + lane]));
        }
    }
    for (k, right) in panel.chunks_exact(V * WIDTH).enumerate() {
        let left: [f32; M] = from_fn(|r| left(r, k));
        for r in 0..M {
            for v in 0..V {
                for lane in 0..WIDTH {
                    sum[r][v][lane] = left[r].mul_add(right[v * WIDTH + lane], sum[r][v][lane]);
                }
            }
        }
    }
    for r in 0..M {
        let row = &mut out[r * stride..][..V * WIDTH];
        for v in 0..V {
            row[v * WIDTH..][..WIDTH].copy_from_slice(&sum[r][v]);
        }
    }
    M
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{Fill, draw_f32};

    /// Every tile height, panel width and padding against plain loops; small integers make the sums exact.
    #[test]
    fn products_are_exact_on_integers() {
        for (m, k, n) in [(1, 1, 1), (6, 3, 8), (7, 5, 9), (13, 8, 31), (11, 17, 40), (49, 32, 49), (10, 4, 72)] {
            let integers = |name: &str, len| {
                draw_f32("tiles", name, len, Fill::Index(9)).into_iter().map(|v| v - 4.0).collect::<Vec<f32>>()
            };
            let (a, b) = (integers("a", m * k), integers("b", k * n));
            let want = |i: usize, j: usize| (0..k).map(|l| a[i * k + l] * b[l * n + j]).sum::<f32>();
            let a_rows = Rows { data: &a, stride: k, width: k };
            let a_turned: Vec<f32> = (0..k * m).map(|i| a[i % m * k + i / m]).collect();
            let b_turned: Vec<f32> = (0..n * k).map(|i| b[i % k * n + i / k]).collect();
            let (mut packed, mut packed_turned) = (vec![9.0; k * padded(n)], vec![9.0; k * padded(n)]);
            pack(Rows { data: &b, stride: n, width: n }, k, &mut packed);
            pack_transposed(Rows { data: &b_turned, stride: k, width: k }, n, &mut packed_turned);
            assert_eq!(packed, packed_turned);
            let stride = padded(n);
            let mut out = vec![7.0; m * stride];
            product(a_rows, m, &packed, n, &mut Sum { data: &mut out, stride, add: false });
            let left = Rows { data: &a_turned, stride: m, width: m };
            product_transposed(left, k, &packed, n, &mut Sum { data: &mut out, stride, add: true });
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                assert_eq!(out[i * stride + j], 2.0 * want(i, j), "{m}x{k}x{n} at {i},{j}");
            }
        }
    }
}
