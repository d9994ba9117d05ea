//! Micro-kernels: one tile of the result from packed operands, in registers.
//!
//! Both kernels read 32-bit words: an f32, or a pair of bf16 that are neighbours along k. A tile is up to [`ROWS`]
//! rows by up to two registers of [`LANES`] columns; every element is one chain of fused multiply-adds in the order
//! of k, so its bits do not depend on the tile it falls in.

#![allow(unsafe_code)] // AVX-512 intrinsics.

use std::arch::x86_64::*;

/// Words of a register, and of a row of a packed panel.
pub const LANES: usize = 16;
/// Most rows of a tile: 14·2 accumulators, two registers of b and one of a fill the 32 registers.
pub const ROWS: usize = 14;

/// The multiply-add of a product, chosen once per call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// f32 words, `vfmadd`.
    F32,
    /// Words of two bf16, `vdpbf16ps`. A tile kernel of AMX would read the same words.
    Bf16,
}

/// Packed operands and place of a tile.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Words along k.
    pub k: usize,
    /// Panel of a: k rows of [`LANES`] words, of which `rows` are used.
    pub a: *const f32,
    /// One or two panels of b, one after the other: k rows of [`LANES`] words each.
    pub b: *const f32,
    /// First element of the result.
    pub c: *mut f32,
    /// Elements between rows of the result.
    pub stride: usize,
    /// Rows, 1 to [`ROWS`].
    pub rows: usize,
    /// Columns, 1 to 2·[`LANES`].
    pub columns: usize,
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of what the result holds; at 0 it is not read.
    pub beta: f32,
}

impl Kernel {
    /// Whether this processor runs the kernel.
    pub fn available(self) -> bool {
        let base = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        base && (self == Kernel::F32 || is_x86_feature_detected!("avx512bf16"))
    }

    /// Computes a tile: c ← alpha·a·b + beta·c.
    ///
    /// # Safety
    /// The kernel is available; the panels hold `tile.k` rows; the tile lies inside the result, which nothing else
    /// touches meanwhile.
    pub unsafe fn run(self, tile: &Tile) {
        // SAFETY: passed on to the caller.
        unsafe {
            match self {
                Kernel::F32 => f32_tile(tile),
                Kernel::Bf16 => bf16_tile(tile),
            }
        }
    }
}

/// Defines a micro-kernel: `$pick` chooses the instance of `$tile` for the size of the tile.
macro_rules! micro_kernel {
    ($pick:ident, $tile:ident, $features:literal, $multiply:expr) => {
        /// # Safety
        /// As [`Kernel::run`].
        unsafe fn $pick(t: &Tile) {
            // SAFETY: passed on to the caller.
            unsafe {
                match (t.rows, t.columns > LANES) {
                    (1, false) => $tile::<1, 1>(t),
                    (2, false) => $tile::<2, 1>(t),
                    (3, false) => $tile::<3, 1>(t),
                    (4, false) => $tile::<4, 1>(t),
                    (5, false) => $tile::<5, 1>(t),
                    (6, false) => $tile::<6, 1>(t),
                    (7, false) => $tile::<7, 1>(t),
                    (8, false) => $tile::<8, 1>(t),
                    (9, false) => $tile::<9, 1>(t),
                    (10, false) => $tile::<10, 1>(t),
                    (11, false) => $tile::<11, 1>(t),
                    (12, false) => $tile::<12, 1>(t),
                    (13, false) => $tile::<13, 1>(t),
                    (_, false) => $tile::<14, 1>(t),
                    (1, true) => $tile::<1, 2>(t),
                    (2, true) => $tile::<2, 2>(t),
                    (3, true) => $tile::<3, 2>(t),
                    (4, true) => $tile::<4, 2>(t),
                    (5, true) => $tile::<5, 2>(t),
                    (6, true) => $tile::<6, 2>(t),
                    (7, true) => $tile::<7, 2>(t),
                    (8, true) => $tile::<8, 2>(t),
                    (9, true) => $tile::<9, 2>(t),
                    (10, true) => $tile::<10, 2>(t),
                    (11, true) => $tile::<11, 2>(t),
                    (12, true) => $tile::<12, 2>(t),
                    (13, true) => $tile::<13, 2>(t),
                    (_, true) => $tile::<14, 2>(t),
                }
            }
        }

        /// # Safety
        /// As [`Kernel::run`], with `R` rows and `V` registers of columns.
        #[target_feature(enable = $features)]
        unsafe fn $tile<const R: usize, const V: usize>(t: &Tile) {
            let mut sums = [[_mm512_setzero_ps(); V]; R];
            let (mut a, mut b) = (t.a, t.b);
            let second = t.k * LANES;
            // SAFETY: the panels hold k rows of LANES words, and V panels of b follow each other.
            unsafe {
                for _ in 0..t.k {
                    let mut columns = [_mm512_setzero_ps(); V];
                    for v in 0..V {
                        columns[v] = _mm512_loadu_ps(b.add(v * second));
                    }
                    for r in 0..R {
                        let value = _mm512_set1_ps(*a.add(r));
                        for v in 0..V {
                            sums[r][v] = $multiply(sums[r][v], value, columns[v]);
                        }
                    }
                    (a, b) = (a.add(LANES), b.add(LANES));
                }
            }
            let alpha = _mm512_set1_ps(t.alpha);
            let beta = _mm512_set1_ps(t.beta);
            for r in 0..R {
                for v in 0..V {
                    let left = (t.columns - v * LANES).min(LANES);
                    let mask = (u32::MAX >> (32 - left)) as __mmask16;
                    let mut value = _mm512_mul_ps(alpha, sums[r][v]);
                    // SAFETY: the mask keeps to the tile, which lies inside the result.
                    unsafe {
                        let place = t.c.add(r * t.stride + v * LANES);
                        if t.beta != 0.0 {
                            value = _mm512_fmadd_ps(beta, _mm512_maskz_loadu_ps(mask, place), value);
                        }
                        _mm512_mask_storeu_ps(place, mask, value);
                    }
                }
            }
        }
    };
}

micro_kernel!(f32_tile, f32_tile_of, "avx512f", |sum, a, b| _mm512_fmadd_ps(a, b, sum));
micro_kernel!(bf16_tile, bf16_tile_of, "avx512f,avx512bf16", |sum, a, b| {
    // Registers of pairs of bf16, under the name of f32 so far.
    _mm512_dpbf16_ps(sum, std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b))
});
