//! Products over panels that end with half a vector: the half is a register of 256 bits, whose multiply-adds cost half
//! of those of 512 bits where these go through the units in two parts.

use super::panels::{HALF, WIDTH};
use super::tiles::{Product, TILE};
use bytemuck::cast;
use pulp::x86::V4;
use std::arch::x86_64::{__m256, __m512};

/// A row by vectors, and the half after them.
#[inline(always)]
fn split<const V: usize>(row: &[f32]) -> ([__m512; V], __m256) {
    let (vectors, rest) = row.as_chunks::<WIDTH>();
    let (halves, _) = rest.as_chunks::<HALF>();
    let vectors = &vectors[..V];
    (std::array::from_fn(|v| cast(vectors[v])), cast(halves[0]))
}

impl Product<'_> {
    /// A panel of `width` columns, the last [`HALF`] of them half a vector. Five rows of four vectors and a half, four
    /// registers and a half of the right factor and one of the left one are 31 registers.
    #[inline(always)]
    pub(super) fn by_half_tiles(&mut self, simd: V4, panel: &[f32], column: usize, width: usize) {
        match width / WIDTH {
            4 => self.by_rows::<5, 4>(simd, panel, column),
            3 => self.by_rows::<TILE, 3>(simd, panel, column),
            2 => self.by_rows::<TILE, 2>(simd, panel, column),
            1 => self.by_rows::<TILE, 1>(simd, panel, column),
            _ => self.by_rows::<TILE, 0>(simd, panel, column),
        }
    }

    #[inline(always)]
    fn by_rows<const M: usize, const V: usize>(&mut self, simd: V4, panel: &[f32], column: usize) {
        let mut at = 0;
        while at < self.rows {
            at += match self.rows - at {
                rest if rest >= M => self.half_tile::<M, V>(simd, at, panel, column),
                4.. => self.half_tile::<4, V>(simd, at, panel, column),
                2.. => self.half_tile::<2, V>(simd, at, panel, column),
                _ => self.half_tile::<1, V>(simd, at, panel, column),
            };
        }
    }

    /// `M` rows by `V` vectors and a half of the result, kept in registers over the whole depth. Returns `M`.
    #[inline(always)]
    fn half_tile<const M: usize, const V: usize>(
        &mut self,
        simd: V4,
        at: usize,
        panel: &[f32],
        column: usize,
    ) -> usize {
        let (f, h) = (simd.avx512f, simd.fma);
        let width = V * WIDTH + HALF;
        let (row_step, depth_step) = self.steps;
        let (left, stride) = (&self.left[at * row_step..], self.out.stride);
        let out = &mut self.out.data[at * stride + column..];
        let mut sum = [[cast::<_, __m512>([0.0f32; WIDTH]); V]; M];
        let mut rest = [cast::<_, __m256>([0.0f32; HALF]); M];
        if self.out.add {
            for r in 0..M {
                (sum[r], rest[r]) = split(&out[r * stride..][..width]);
            }
        }
        for (k, right) in panel.chunks_exact(width).take(self.depth).enumerate() {
            let left = &left[k * depth_step..][..(M - 1) * row_step + 1];
            let (vectors, last) = split::<V>(right);
            for r in 0..M {
                let x = f._mm512_set1_ps(left[r * row_step]);
                for v in 0..V {
                    sum[r][v] = f._mm512_fmadd_ps(x, vectors[v], sum[r][v]);
                }
                rest[r] = h._mm256_fmadd_ps(f._mm512_castps512_ps256(x), last, rest[r]);
            }
        }
        for r in 0..M {
            let (vectors, half) = out[r * stride..][..width].as_chunks_mut::<WIDTH>();
            for v in 0..V {
                vectors[v] = cast(sum[r][v]);
            }
            half.copy_from_slice(&cast::<_, [f32; HALF]>(rest[r]));
        }
        M
    }
}
