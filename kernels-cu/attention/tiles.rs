//! Register-tiled products of the small matrices inside one head.
//!
//! The right factor comes in the panels of `panels.rs`. The left factor is read in place, by rows or transposed.

pub use super::panels::{Rows, WIDTH, copy, pack, pack_transposed, padded};

use super::panels::panels;
use crate::simd::arch;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Rows of a register tile.
pub const TILE: usize = 6;

/// The result of a product: rows of `stride` values, overwritten or added to. What lies behind the columns of the
/// right factor, rounded up to half vectors, is left alone.
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
    multiply(Product { left: left.data, steps: (left.stride, 1), rows, depth, right, columns, out });
}

/// `out = leftᵀ · right`: `left` has as many rows as `right`, and its columns are the rows of the result.
pub fn product_transposed(left: Rows<'_>, depth: usize, right: &[f32], columns: usize, out: Sum<'_>) {
    let rows = left.width;
    multiply(Product { left: left.data, steps: (1, left.stride), rows, depth, right, columns, out });
}

/// Compiled once for both products.
#[inline(never)]
fn multiply(product: Product<'_>) {
    arch().dispatch(product);
}

/// A product and where its factors lie.
pub(super) struct Product<'a> {
    pub(super) left: &'a [f32],
    /// Distances in `left` of two rows of the result and of two terms of a sum.
    pub(super) steps: (usize, usize),
    pub(super) rows: usize,
    pub(super) depth: usize,
    right: &'a [f32],
    columns: usize,
    pub(super) out: Sum<'a>,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        for (column, width) in panels(self.columns) {
            let panel = &self.right[column * self.depth..][..width * self.depth];
            #[cfg(target_arch = "x86_64")]
            if S::F32_LANES == WIDTH
                && width % WIDTH > 0
                && let pulp::x86::Arch::V4(simd) = arch()
            {
                self.by_half_tiles(simd, panel, column, width);
                continue;
            }
            // Six rows by four registers of 32, or by two of the sixteen that AVX2 has.
            let (whole, rest) = (0..width / WIDTH * WIDTH, width / WIDTH * WIDTH..width);
            match (S::F32_LANES, width / WIDTH) {
                (16, 4) => self.by_tiles::<S, 4>(simd, panel, column, width, whole),
                (16, 3) => self.by_tiles::<S, 3>(simd, panel, column, width, whole),
                (16, 2) => self.by_tiles::<S, 2>(simd, panel, column, width, whole),
                (16, _) => self.by_tiles::<S, 1>(simd, panel, column, width, whole),
                (8, _) => {
                    self.by_tiles::<S, 2>(simd, panel, column, width, whole);
                    self.by_tiles::<S, 1>(simd, panel, column, width, rest);
                }
                _ => {
                    self.by_tiles::<S, 4>(simd, panel, column, width, whole);
                    self.by_tiles::<S, 2>(simd, panel, column, width, rest);
                }
            }
        }
    }
}

impl Product<'_> {
    /// The columns `range` of a panel that begins at `column` and has `width` of them, `V` registers at a time.
    #[inline(always)]
    fn by_tiles<S: Simd, const V: usize>(
        &mut self,
        simd: S,
        panel: &[f32],
        column: usize,
        width: usize,
        range: Range<usize>,
    ) {
        for from in range.step_by(V * S::F32_LANES) {
            let (panel, column, mut at) = (&panel[from..], column + from, 0);
            while at < self.rows {
                at += match self.rows - at {
                    TILE.. => self.tile::<S, TILE, V>(simd, at, panel, column, width),
                    4.. => self.tile::<S, 4, V>(simd, at, panel, column, width),
                    2.. => self.tile::<S, 2, V>(simd, at, panel, column, width),
                    _ => self.tile::<S, 1, V>(simd, at, panel, column, width),
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
        for (m, k, n) in [
            (1, 1, 1),
            (6, 3, 8),
            (7, 5, 9),
            (13, 8, 31),
            (11, 17, 40),
            (49, 32, 49),
            (10, 4, 72),
            (60, 54, 72),
            (9, 80, 136),
        ] {
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
            // The narrower registers of other processors.
            let mut narrow = |run: fn(Product<'_>)| {
                out.fill(7.0);
                let sum = Sum { data: &mut out, stride, add: false };
                run(Product { left: &a, steps: (k, 1), rows: m, depth: k, right: &packed, columns: n, out: sum });
                for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                    assert_eq!(out[i * stride + j], want(i, j), "{m}x{k}x{n} at {i},{j}");
                }
            };
            narrow(|product| Simd::vectorize(pulp::Scalar::new(), product));
            #[cfg(target_arch = "x86_64")]
            if pulp::x86::V3::try_new().is_some() {
                let run = |product: Product<'_>| {
                    pulp::x86::V3::try_new()
                        .into_iter()
                        .zip([product])
                        .for_each(|(simd, op)| Simd::vectorize(simd, op));
                };
                narrow(run);
            }
        }
    }
}
