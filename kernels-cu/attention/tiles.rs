//! Register-tiled products of the small matrices inside one head.
//!
//! The right factor is packed into panels of up to four vectors of columns, so that every read of the inner loop is
//! sequential whatever the stride of the projection; columns are padded with zeros to whole vectors. The left factor
//! is read in place, by rows or transposed.

use super::turn::turn;
use crate::simd::{arch, vectorised};
use pulp::{Simd, WithSimd};

/// Columns are padded to a multiple of this: one AVX-512 register, two AVX2 ones, four of NEON.
pub const WIDTH: usize = 16;

/// Rows of a register tile.
pub const TILE: usize = 6;

/// Most widths of a panel.
const PANEL: usize = 4;

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
    let count = vectors.div_ceil(PANEL);
    (0..count).map(move |i| (i * vectors / count, (i + 1) * vectors / count - i * vectors / count))
}

/// Packs `count` rows as the rows of a right factor: `count · padded(width)` values.
pub fn pack(rows: Rows<'_>, count: usize, out: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (first, vectors) in panels(rows.width.div_ceil(WIDTH)) {
                let (column, width) = (first * WIDTH, vectors * WIDTH);
                let panel = &mut out[column * count..][..width * count];
                let live = width.min(rows.width - column);
                for (i, out) in panel.chunks_exact_mut(width).enumerate() {
                    copy(&rows.row(i)[column..][..live], out);
                }
            }
        },
    );
}

/// Copies `from` to the front of `to`, in registers, and zeros behind it.
#[inline(always)]
pub fn copy(from: &[f32], to: &mut [f32]) {
    let (vectors, rest) = from.as_chunks::<WIDTH>();
    let (front, tail) = to.split_at_mut(vectors.len() * WIDTH);
    let (front, _) = front.as_chunks_mut::<WIDTH>();
    for (to, from) in front.iter_mut().zip(vectors) {
        *to = *from;
    }
    for i in 0..tail.len() {
        tail[i] = if i < rest.len() { rest[i] } else { 0.0 };
    }
}

/// Packs `count` rows as the columns of a right factor: `width · padded(count)` values.
pub fn pack_transposed(rows: Rows<'_>, count: usize, out: &mut [f32]) {
    let depth = rows.width;
    vectorised(
        #[inline(always)]
        || {
            let mut block = [[0.0f32; WIDTH]; WIDTH];
            for (first, vectors) in panels(count.div_ceil(WIDTH)) {
                let width = vectors * WIDTH;
                let panel = &mut out[first * WIDTH * depth..][..width * depth];
                for vector in 0..vectors {
                    let row = (first + vector) * WIDTH;
                    let live = WIDTH.min(count - row);
                    for k in (0..depth).step_by(WIDTH) {
                        block[live..].fill([0.0; WIDTH]);
                        for i in 0..live {
                            copy(&rows.row(row + i)[k..depth.min(k + WIDTH)], &mut block[i]);
                        }
                        turn(&mut block);
                        for (j, turned) in block[..WIDTH.min(depth - k)].iter().enumerate() {
                            panel[(k + j) * width + vector * WIDTH..][..WIDTH].copy_from_slice(turned);
                        }
                    }
                }
            }
        },
    );
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
pub fn product(left: Rows<'_>, rows: usize, right: &[f32], columns: usize, out: Sum<'_>) {
    let depth = left.width;
    arch().dispatch(Product { left: left.data, steps: (left.stride, 1), rows, depth, right, columns, out });
}

/// `out = leftᵀ · right`: `left` has as many rows as `right`, and its columns are the rows of the result.
pub fn product_transposed(left: Rows<'_>, depth: usize, right: &[f32], columns: usize, out: Sum<'_>) {
    let rows = left.width;
    arch().dispatch(Product { left: left.data, steps: (1, left.stride), rows, depth, right, columns, out });
}

struct Product<'a> {
    left: &'a [f32],
    /// Distances in `left` of two rows of the result and of two terms of a sum.
    steps: (usize, usize),
    rows: usize,
    depth: usize,
    right: &'a [f32],
    columns: usize,
    out: Sum<'a>,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let vectors = self.columns.div_ceil(WIDTH);
        let count = vectors.div_ceil(PANEL);
        for i in 0..count {
            let (first, end) = (i * vectors / count, (i + 1) * vectors / count);
            let (column, width) = (first * WIDTH, (end - first) * WIDTH);
            let panel = &self.right[column * self.depth..][..width * self.depth];
            // Six rows by four registers of 32, or by two of the sixteen that AVX2 has.
            match (S::F32_LANES, end - first) {
                (16, 4) => self.by_tiles::<S, 4>(simd, panel, column, width),
                (16, 3) => self.by_tiles::<S, 3>(simd, panel, column, width),
                (16, 2) => self.by_tiles::<S, 2>(simd, panel, column, width),
                (16, _) => self.by_tiles::<S, 1>(simd, panel, column, width),
                (8, _) => self.by_tiles::<S, 2>(simd, panel, column, width),
                _ => self.by_tiles::<S, 4>(simd, panel, column, width),
            }
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    fn by_tiles<S: Simd, const V: usize>(&mut self, simd: S, panel: &[f32], column: usize, width: usize) {
        for from in (0..width).step_by(V * S::F32_LANES) {
            let mut at = 0;
            while at < self.rows {
                at += match self.rows - at {
                    TILE.. => self.tile::<S, TILE, V>(simd, at, &panel[from..], column + from, width),
                    4.. => self.tile::<S, 4, V>(simd, at, &panel[from..], column + from, width),
                    2.. => self.tile::<S, 2, V>(simd, at, &panel[from..], column + from, width),
                    _ => self.tile::<S, 1, V>(simd, at, &panel[from..], column + from, width),
                };
            }
        }
    }

    /// `M` rows by `V` registers of the result, kept in registers over the whole depth. Returns `M`.
    #[inline(always)]
    fn tile<S: Simd, const M: usize, const V: usize>(
        &mut self,
        simd: S,
        at: usize,
        panel: &[f32],
        column: usize,
        width: usize,
    ) -> usize {
        let lanes = V * S::F32_LANES;
        let (row_step, depth_step) = self.steps;
        let left = &self.left[at * row_step..];
        let out = &mut self.out.data[at * self.out.stride + column..];
        let mut sum = [[simd.splat_f32s(0.0); V]; M];
        if self.out.add {
            for r in 0..M {
                let (row, _) = S::as_simd_f32s(&out[r * self.out.stride..][..lanes]);
                sum[r].copy_from_slice(&row[..V]);
            }
        }
        for k in 0..self.depth {
            let (right, _) = S::as_simd_f32s(&panel[k * width..][..lanes]);
            let left = &left[k * depth_step..][..(M - 1) * row_step + 1];
            let right = &right[..V];
            for r in 0..M {
                let x = simd.splat_f32s(left[r * row_step]);
                for v in 0..V {
                    sum[r][v] = simd.mul_add_f32s(x, right[v], sum[r][v]);
                }
            }
        }
        for r in 0..M {
            let (row, _) = S::as_mut_simd_f32s(&mut out[r * self.out.stride..][..lanes]);
            row[..V].copy_from_slice(&sum[r]);
        }
        M
    }
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
            product(a_rows, m, &packed, n, Sum { data: &mut out, stride, add: false });
            let left = Rows { data: &a_turned, stride: m, width: m };
            product_transposed(left, k, &packed, n, Sum { data: &mut out, stride, add: true });
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                assert_eq!(out[i * stride + j], 2.0 * want(i, j), "{m}x{k}x{n} at {i},{j}");
            }
        }
    }
}
