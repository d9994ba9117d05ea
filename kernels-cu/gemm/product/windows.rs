//! Products whose left operand is the windows of an image, read where the pixels are: nothing is packed but the filters.
//!
//! A tile is up to [`ROWS`] windows side by side in one row of the result. The same tap of neighbouring windows lies a
//! fixed step apart, so a row of the tile is a pointer and a multiple of that step. Sums run along k in the order and in
//! the stretches of `packed`, so the bits are those that packed windows give.

#![allow(unsafe_code)] // AVX-512 intrinsics.

use super::micro::{Kernel, LANES};
use super::pack::{Panel, rounded};
use super::packed::stretch_of;
use super::{Matrix, Values};
use rayon::prelude::*;
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::{Deref, DerefMut, Range};

/// Most windows of a tile. Tiles of 13 were measured at half the speed of those of 12.
const ROWS: usize = 12;

thread_local! {
    /// Memory of packed filters and of pixels, kept from call to call.
    static SPARE: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Words with arbitrary contents that begin with a cache line, so that no register of a panel lies across two.
struct Memory {
    all: Vec<f32>,
    used: Range<usize>,
}

impl Memory {
    fn take(len: usize) -> Self {
        let mut all = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
        if all.len() < len + LANES {
            all.resize(len + LANES, 0.0);
        }
        let skipped = all.as_ptr().align_offset(size_of::<[f32; LANES]>()).min(LANES);
        Memory { all, used: skipped..skipped + len }
    }
}

impl Deref for Memory {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.all[self.used.clone()]
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.all[self.used.clone()]
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        SPARE.with_borrow_mut(|spare| spare.push(std::mem::take(&mut self.all)));
    }
}

/// All filters, packed: [`LANES`] of them side by side, word by word along k.
pub struct Filters {
    kernel: Kernel,
    memory: Memory,
    words: usize,
    count: usize,
}

impl Filters {
    /// The `count` rows of `filters`, `taps` times `channels` long, or nothing where this way does not take them: the
    /// processor lacks the instructions, or channels are few or do not fill words.
    pub fn pack(filters: Matrix<'_>, count: usize, taps: usize, channels: usize, bf16: bool) -> Option<Filters> {
        let (kernel, per_word) = if bf16 { (Kernel::Bf16, 2) } else { (Kernel::F32, 1) };
        let (depth, made) = (taps * channels, matches!(filters.values, Values::Rows(_)));
        if channels < LANES * per_word || !channels.is_multiple_of(per_word) || made || !kernel.available() {
            return None;
        }
        assert!(filters.holds([count, depth]), "filters reach past their slice");
        let words = depth / per_word;
        let mut memory = Memory::take(count.div_ceil(LANES) * words * LANES);
        memory.par_chunks_mut(words * LANES).enumerate().for_each(|(index, out)| {
            let lanes = LANES.min(count - index * LANES);
            let panel = Panel { operand: filters, depth, lane: index * LANES, lanes, first: 0, words };
            // SAFETY: the kernel is available, the chunk holds `words` rows, and the filters were checked.
            unsafe { panel.pack(kernel, out.as_mut_ptr()) };
        });
        Some(Filters { kernel, memory, words, count })
    }

    /// Words that `channels` numbers take.
    pub fn words(&self, channels: usize) -> usize {
        if self.kernel == Kernel::Bf16 { channels / 2 } else { channels }
    }

    /// Writes numbers as words of the products.
    pub fn convert(&self, from: &[f32], out: &mut [f32]) {
        match self.kernel {
            Kernel::F32 => out.copy_from_slice(from),
            Kernel::Bf16 => {
                assert_eq!(from.len(), 2 * out.len(), "two numbers a word");
                // SAFETY: the kernel is available, and so is AVX-512 BW.
                unsafe { rounded(from, out) };
            }
        }
    }
}

/// Pixels of a part of an image, with the padding around them.
#[derive(Clone, Copy)]
pub struct Pixels {
    /// Words of a tap: those of the channels of a pixel.
    pub run: usize,
    /// Words from pixel to pixel and from row to row.
    pub steps: [usize; 2],
    /// Rows and columns of taps.
    pub taps: [usize; 2],
    /// Pixels from window to window.
    pub stride: usize,
    /// Rows and columns of windows.
    pub windows: [usize; 2],
}

impl Pixels {
    /// Pixels along one axis under all windows.
    pub fn side(&self, axis: usize) -> usize {
        (self.windows[axis] - 1) * self.stride + self.taps[axis]
    }

    /// Words from pixel to pixel for runs of `words`: an odd number of cache lines, so that the pixels of a tile do not
    /// meet in a few places of the cache.
    pub fn step(words: usize) -> usize {
        (words.div_ceil(LANES) | 1) * LANES
    }
}

/// `y [windows, filters] = pixels · filters`, where `fill` writes the pixels first.
///
/// # Panics
/// If the sizes do not fit each other.
pub fn multiply(filters: &Filters, pixels: Pixels, y: &mut [f32], fill: impl FnOnce(&mut [f32])) {
    let Pixels { run, steps: [pixel, line], taps, stride, windows: [rows, columns] } = pixels;
    let len = (pixels.side(0) - 1) * line + (pixels.side(1) - 1) * pixel + run;
    assert_eq!(taps[0] * taps[1] * run, filters.words, "the filters have other taps");
    assert_eq!(y.len(), rows * columns * filters.count, "the result has another size");
    let mut memory = Memory::take(len);
    fill(&mut memory);
    let stretch = stretch_of(filters.words);
    let width = columns.div_ceil(columns.div_ceil(ROWS));
    for (column, panels) in (0..filters.count).step_by(2 * LANES).zip(filters.memory.chunks(2 * filters.words * LANES))
    {
        for first in (0..filters.words).step_by(stretch) {
            for (row, from) in (0..rows).flat_map(|row| (0..columns).step_by(width).map(move |from| (row, from))) {
                let tile = Tile {
                    words: [first, filters.words.min(first + stretch), filters.words],
                    run,
                    taps: taps[1],
                    steps: [pixel, line],
                    step: stride * pixel,
                    a: memory[row * stride * line + from * stride * pixel..].as_ptr(),
                    b: panels[first * LANES..].as_ptr(),
                    c: y[(row * columns + from) * filters.count + column..].as_mut_ptr(),
                    stride: filters.count,
                    rows: width.min(columns - from),
                    columns: (2 * LANES).min(filters.count - column),
                };
                // SAFETY: `Filters::pack` saw the kernel; `len` words hold every tap of every window, the panels hold
                // all words of one or two times LANES filters, and the tile lies inside y.
                unsafe {
                    match filters.kernel {
                        Kernel::F32 => f32_windows(&tile),
                        Kernel::Bf16 => bf16_windows(&tile),
                    }
                }
            }
        }
    }
}

/// Operands and place of a tile.
struct Tile {
    /// First word of the stretch, its end, and the words of a panel.
    words: [usize; 3],
    /// Words of a tap, and columns of taps.
    run: usize,
    taps: usize,
    /// Words from tap to tap, across and down, and from window to window.
    steps: [usize; 2],
    step: usize,
    /// The first window.
    a: *const f32,
    /// The stretch of one or two panels of filters.
    b: *const f32,
    /// First element of the result; elements between its rows.
    c: *mut f32,
    stride: usize,
    /// Windows, 1 to [`ROWS`], and filters, 1 to 2·[`LANES`].
    rows: usize,
    columns: usize,
}

/// Rows of a tile that share a pointer: an address may add the step once or twice to it.
const SHARED: usize = 3;

/// Defines a micro-kernel: `$pick` chooses the instance of `$tile` for the size of the tile.
macro_rules! window_kernel {
    ($pick:ident, $tile:ident, $features:literal, $multiply:expr, [$($rows:literal)*]) => {
        /// # Safety
        /// The kernel is available; the operands hold what the tile reads; the tile lies inside the result.
        unsafe fn $pick(t: &Tile) {
            // SAFETY: passed on to the caller.
            unsafe {
                match (t.rows, t.columns > LANES) {
                    $(($rows, false) => $tile::<$rows, 1>(t), ($rows, true) => $tile::<$rows, 2>(t),)*
                    (_, false) => $tile::<ROWS, 1>(t),
                    (_, true) => $tile::<ROWS, 2>(t),
                }
            }
        }

        /// # Safety
        /// As its caller, with `R` rows and `V` registers of columns.
        #[target_feature(enable = $features)]
        unsafe fn $tile<const R: usize, const V: usize>(t: &Tile) {
            let mut sums = [[_mm512_setzero_ps(); V]; R];
            let ([mut word, end, panel], [pixel, line]) = (t.words, t.steps);
            let (mut b, step, second) = (t.b, t.step, panel * LANES);
            // SAFETY: the caller vouches for the operands; the assembly is empty.
            unsafe {
                while word < end {
                    let (tap, within) = (word / t.run, word % t.run);
                    let count = (t.run - within).min(end - word);
                    let start = t.a.add(tap / t.taps * line + tap % t.taps * pixel + within);
                    let mut shared = [start; ROWS.div_ceil(SHARED)];
                    for (i, place) in shared.iter_mut().enumerate() {
                        *place = start.wrapping_add(i * SHARED * step);
                        // Registers of their own: as multiples of one pointer they would be computed for every word.
                        asm!("/* {0} */", inout(reg) *place, options(nostack, preserves_flags));
                    }
                    for _ in 0..count {
                        let mut columns = [_mm512_setzero_ps(); V];
                        for v in 0..V {
                            columns[v] = _mm512_loadu_ps(b.add(v * second));
                        }
                        for r in 0..R {
                            let value = _mm512_set1_ps(*shared[r / SHARED].add(r % SHARED * step));
                            for v in 0..V {
                                sums[r][v] = $multiply(sums[r][v], value, columns[v]);
                            }
                        }
                        shared.iter_mut().for_each(|place| *place = place.wrapping_add(1));
                        b = b.add(LANES);
                    }
                    word += count;
                }
            }
            for r in 0..R {
                for v in 0..V {
                    let left = (t.columns - v * LANES).min(LANES);
                    let mask = (u32::MAX >> (32 - left)) as __mmask16;
                    // SAFETY: the mask keeps to the tile, which lies inside the result.
                    unsafe {
                        let place = t.c.add(r * t.stride + v * LANES);
                        let before = if t.words[0] == 0 { _mm512_setzero_ps() } else { _mm512_maskz_loadu_ps(mask, place) };
                        _mm512_mask_storeu_ps(place, mask, _mm512_add_ps(before, sums[r][v]));
                    }
                }
            }
        }
    };
}

window_kernel!(f32_windows, f32_windows_of, "avx512f", |sum, a, b| _mm512_fmadd_ps(a, b, sum), [1 2 3 4 5 6 7 8 9 10 11]);
window_kernel!(bf16_windows, bf16_windows_of, "avx512f,avx512bf16", |sum, a, b| {
    // Registers of pairs of bf16, under the name of f32 so far.
    _mm512_dpbf16_ps(sum, std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b))
}, [1 2 3 4 5 6 7 8 9 10 11]);
