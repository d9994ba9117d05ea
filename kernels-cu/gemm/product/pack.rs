//! Packing: [`LANES`] rows of a (or columns of b) side by side, word by word along k, as the micro-kernels read them.

#![allow(unsafe_code)] // AVX-512 intrinsics.

use super::micro::{Kernel, LANES};
use super::{Matrix, Rows, Values};
use half::bf16;
use std::arch::x86_64::*;
use std::cell::RefCell;

thread_local! {
    /// Rows made on demand, before they are packed; kept from call to call.
    static STAGE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// What to pack: words `first..first + words` along k of lanes `lane..lane + lanes`.
///
/// A lane is a row of a or a column of b: `operand.strides` is the step from lane to lane and the step along k, of
/// which there are `depth` elements.
#[derive(Clone, Copy)]
pub struct Panel<'a> {
    /// The operand, lane by k.
    pub operand: Matrix<'a>,
    /// Elements along k of the whole operand.
    pub depth: usize,
    /// First lane.
    pub lane: usize,
    /// Lanes, at most [`LANES`].
    pub lanes: usize,
    /// First word along k.
    pub first: usize,
    /// Words along k.
    pub words: usize,
}

impl Panel<'_> {
    /// Writes `words` rows of [`LANES`] words; what lies outside the operand becomes 0.
    ///
    /// # Safety
    /// The processor has AVX-512 F and BW; `out` has room for `words` rows; the operand holds the lanes and the depth.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub unsafe fn pack(self, kernel: Kernel, out: *mut f32) {
        // SAFETY: passed on to the caller.
        unsafe {
            match (kernel, self.operand.values) {
                (Kernel::F32, Values::F32(values)) => self.write::<Plain>(values, out),
                (Kernel::F32, Values::Bf16(values)) => self.write::<Widened>(values, out),
                (Kernel::Bf16, Values::F32(values)) => self.write::<Rounded>(values, out),
                (Kernel::Bf16, Values::Bf16(values)) => self.write::<Stored>(values, out),
                (_, Values::Rows(made)) => self.stage(made, kernel, out),
            }
        }
    }

    /// Has the rows written side by side, and packs them from there.
    ///
    /// # Safety
    /// As [`Panel::pack`].
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn stage(self, made: &dyn Rows, kernel: Kernel, out: *mut f32) {
        let per_word = if kernel == Kernel::F32 { 1 } else { 2 };
        let first = self.first * per_word;
        let elements = (self.words * per_word).min(self.depth - first);
        // A register more than needed: rows a power of two apart would share a few places of the cache.
        let stride = elements.next_multiple_of(LANES) + LANES;
        STAGE.with_borrow_mut(|stage| {
            if stage.len() < LANES * stride {
                stage.resize(LANES * stride, 0.0);
            }
            for (lane, row) in stage.chunks_mut(stride).enumerate().take(self.lanes) {
                made.write(self.lane + lane, first, &mut row[..elements]);
            }
            let operand = Matrix::f32(stage, [stride, 1]);
            let staged = Panel { operand, depth: elements, lane: 0, first: 0, ..self };
            // SAFETY: passed on to the caller; the stage holds the lanes and the elements.
            unsafe { staged.pack(kernel, out) };
        });
    }

    /// # Safety
    /// As [`Panel::pack`].
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn write<W: Words>(self, values: &[W::Element], out: *mut f32) {
        let [lane_step, step] = self.operand.strides;
        let skipped = self.first * W::PER_WORD;
        let elements = (self.words * W::PER_WORD).min(self.depth - skipped);
        let from = values[self.lane * lane_step + skipped * step..].as_ptr();
        let lanes = self.lanes;
        // SAFETY: lanes and elements are inside the operand; `out` has room for LANES words per word of k; prefetching
        // has no effect but on the cache.
        unsafe {
            if step == 1 {
                let unit = LANES * W::PER_WORD;
                for (block, element) in (0..elements).step_by(unit).enumerate() {
                    let mut rows = [_mm512_setzero_si512(); LANES];
                    for (lane, row) in rows.iter_mut().enumerate().take(lanes) {
                        let place = from.add(lane * lane_step + element);
                        _mm_prefetch::<_MM_HINT_T0>(place.wrapping_add(4 * unit).cast());
                        *row = W::along(place, elements - element);
                    }
                    let count = LANES.min(self.words - block * LANES);
                    for (row, value) in transpose(rows).iter().enumerate().take(count) {
                        _mm512_storeu_si512(out.add((block * LANES + row) * LANES).cast(), *value);
                    }
                }
                return;
            }
            for word in 0..self.words {
                let element = word * W::PER_WORD;
                let at = |lane: usize, element: usize| from.wrapping_add(lane * lane_step + element * step);
                let next = |lane: usize| if element + 1 < elements { at(lane, element + 1) } else { std::ptr::null() };
                let place = out.add(word * LANES);
                if lane_step == 1 {
                    for ahead in 0..W::PER_WORD {
                        // Both ends: the lanes of a panel of a mostly lie in two cache lines.
                        _mm_prefetch::<_MM_HINT_T0>(at(0, element + 16 + ahead).cast());
                        _mm_prefetch::<_MM_HINT_T0>(at(lanes - 1, element + 16 + ahead).cast());
                    }
                    _mm512_storeu_si512(place.cast(), W::across(at(0, element), next(0), lanes));
                } else {
                    for lane in 0..LANES {
                        let value = if lane < lanes { W::one(at(lane, element), next(lane)) } else { 0 };
                        place.add(lane).write(f32::from_bits(value));
                    }
                }
            }
        }
    }

    /// Fetches part `part` of `parts` of the panel towards the cache, for a later [`Panel::pack`].
    pub fn prefetch(self, kernel: Kernel, part: usize, parts: usize) {
        const LINE: usize = 64;
        let (base, size) = match self.operand.values {
            Values::F32(values) => (values.as_ptr().cast::<u8>(), 4),
            Values::Bf16(values) => (values.as_ptr().cast::<u8>(), 2),
            Values::Rows(_) => return,
        };
        let [lane_step, step] = self.operand.strides;
        let per_word = if kernel == Kernel::F32 { 1 } else { 2 };
        let (first, elements) = (self.first * per_word, self.words * per_word);
        // Runs of memory: along k one per lane, across lanes one per k.
        let (runs, run, length) =
            if step == 1 { (self.lanes, lane_step, elements) } else { (elements, step, self.lanes * lane_step) };
        for index in runs * part / parts..runs * (part + 1) / parts {
            let start = self.lane * lane_step + first * step + index * run;
            for line in (0..length * size).step_by(LINE) {
                // SAFETY: prefetching has no effect but on the cache, whatever the address.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(base.wrapping_add(start * size + line).cast()) };
            }
        }
    }
}

/// Rounds two numbers a word to pairs of bf16.
///
/// # Safety
/// The processor has AVX-512 F and BW; `out` has half the length of `from`.
#[target_feature(enable = "avx512f,avx512bw")]
pub unsafe fn rounded(from: &[f32], out: &mut [f32]) {
    for (from, out) in from.chunks(2 * LANES).zip(out.chunks_mut(LANES)) {
        // SAFETY: the masks keep to the chunks.
        unsafe {
            let words = Rounded::along(from.as_ptr(), from.len());
            _mm512_mask_storeu_epi32(out.as_mut_ptr().cast(), mask16(out.len()), words);
        }
    }
}

/// How elements in memory become words.
pub trait Words {
    /// Element in memory.
    type Element: Copy;
    /// Elements of a word.
    const PER_WORD: usize;

    /// The first [`LANES`] words of `elements` elements that follow each other.
    unsafe fn along(from: *const Self::Element, elements: usize) -> __m512i;

    /// One word of each of `lanes` lanes that follow each other; the second elements lie at `next`, or nowhere.
    unsafe fn across(from: *const Self::Element, next: *const Self::Element, lanes: usize) -> __m512i;

    /// One word; the second element lies at `next`, or nowhere.
    unsafe fn one(from: *const Self::Element, next: *const Self::Element) -> u32;
}

/// f32 as it is.
pub struct Plain;
/// bf16 as f32.
pub struct Widened;
/// f32 rounded to bf16, as f32.
pub struct Nearest;
/// f32 rounded to pairs of bf16.
pub struct Rounded;
/// Pairs of bf16 as they are.
pub struct Stored;

impl Words for Plain {
    type Element = f32;
    const PER_WORD: usize = 1;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn along(from: *const f32, elements: usize) -> __m512i {
        // SAFETY: the mask keeps to the elements.
        unsafe { _mm512_maskz_loadu_epi32(mask16(elements), from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn across(from: *const f32, _: *const f32, lanes: usize) -> __m512i {
        // SAFETY: the mask keeps to the lanes.
        unsafe { _mm512_maskz_loadu_epi32(mask16(lanes), from.cast()) }
    }

    unsafe fn one(from: *const f32, _: *const f32) -> u32 {
        // SAFETY: `from` is an element.
        unsafe { from.read() }.to_bits()
    }
}

impl Words for Widened {
    type Element = bf16;
    const PER_WORD: usize = 1;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn along(from: *const bf16, elements: usize) -> __m512i {
        // SAFETY: passed on to the caller.
        _mm512_slli_epi32::<16>(unsafe { load16(from, elements) })
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn across(from: *const bf16, _: *const bf16, lanes: usize) -> __m512i {
        // SAFETY: passed on to the caller.
        _mm512_slli_epi32::<16>(unsafe { load16(from, lanes) })
    }

    unsafe fn one(from: *const bf16, _: *const bf16) -> u32 {
        // SAFETY: `from` is an element.
        unsafe { from.read() }.to_f32().to_bits()
    }
}

impl Words for Nearest {
    type Element = f32;
    const PER_WORD: usize = 1;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn along(from: *const f32, elements: usize) -> __m512i {
        // SAFETY: passed on to the caller.
        let rounded = round(unsafe { Plain::along(from, elements) });
        _mm512_and_si512(rounded, _mm512_set1_epi32(0xffff_0000_u32 as i32))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn across(from: *const f32, _: *const f32, lanes: usize) -> __m512i {
        // SAFETY: lanes that follow each other are read as elements are.
        unsafe { Self::along(from, lanes) }
    }

    unsafe fn one(from: *const f32, _: *const f32) -> u32 {
        // SAFETY: `from` is an element.
        bf16::from_f32(unsafe { from.read() }).to_f32().to_bits()
    }
}

impl Words for Rounded {
    type Element = f32;
    const PER_WORD: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn along(from: *const f32, elements: usize) -> __m512i {
        let (low, high) = (mask16(elements), mask16(elements.saturating_sub(LANES)));
        // SAFETY: the masks keep to the elements.
        let (low, high) = unsafe {
            (
                _mm512_maskz_loadu_epi32(low, from.cast()),
                _mm512_maskz_loadu_epi32(high, from.wrapping_add(LANES).cast()),
            )
        };
        // The upper half of every f32 of both registers, in order.
        let upper: [i16; 32] = std::array::from_fn(|i| 2 * i as i16 + 1);
        // SAFETY: 32 numbers of 16 bits are 512 bits.
        let upper = unsafe { _mm512_loadu_si512(upper.as_ptr().cast()) };
        _mm512_permutex2var_epi16(round(low), upper, round(high))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn across(from: *const f32, next: *const f32, lanes: usize) -> __m512i {
        let second = if next.is_null() { 0 } else { mask16(lanes) };
        // SAFETY: the masks keep to the lanes.
        let (first, second) = unsafe {
            (_mm512_maskz_loadu_epi32(mask16(lanes), from.cast()), _mm512_maskz_loadu_epi32(second, next.cast()))
        };
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        _mm512_or_si512(_mm512_srli_epi32::<16>(round(first)), _mm512_and_si512(round(second), upper))
    }

    unsafe fn one(from: *const f32, next: *const f32) -> u32 {
        // SAFETY: `from` is an element, and so is `next` unless it is null.
        let (first, second) = unsafe { (from.read(), if next.is_null() { 0.0 } else { next.read() }) };
        u32::from(bf16::from_f32(first).to_bits()) | u32::from(bf16::from_f32(second).to_bits()) << 16
    }
}

impl Words for Stored {
    type Element = bf16;
    const PER_WORD: usize = 2;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn along(from: *const bf16, elements: usize) -> __m512i {
        let mask = if elements >= 32 { u32::MAX } else { (1 << elements) - 1 };
        // SAFETY: the mask keeps to the elements.
        unsafe { _mm512_maskz_loadu_epi16(mask, from.cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn across(from: *const bf16, next: *const bf16, lanes: usize) -> __m512i {
        // SAFETY: passed on to the caller.
        let (first, second) = unsafe { (load16(from, lanes), load16(next, if next.is_null() { 0 } else { lanes })) };
        _mm512_or_si512(first, _mm512_slli_epi32::<16>(second))
    }

    unsafe fn one(from: *const bf16, next: *const bf16) -> u32 {
        // SAFETY: `from` is an element, and so is `next` unless it is null.
        let (first, second) = unsafe { (from.read(), if next.is_null() { bf16::ZERO } else { next.read() }) };
        u32::from(first.to_bits()) | u32::from(second.to_bits()) << 16
    }
}

/// The lowest `count` of 16 lanes.
#[inline]
fn mask16(count: usize) -> __mmask16 {
    if count >= 16 { u16::MAX } else { (1 << count) - 1 }
}

/// Up to 16 numbers of 16 bits, widened to 32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load16(from: *const bf16, count: usize) -> __m512i {
    // SAFETY: the mask keeps to the numbers.
    let both = unsafe { _mm512_maskz_loadu_epi16(u32::from(mask16(count)), from.cast()) };
    _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both))
}

/// The bits of f32 such that the upper half is the nearest bf16, ties to even; NaN stays NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn round(bits: __m512i) -> __m512i {
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let value = _mm512_castsi512_ps(bits);
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
    _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000))
}

/// Transposes 16×16 words in four rounds: pairs, quadruples, and twice halves of registers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn transpose(r: [__m512i; LANES]) -> [__m512i; LANES] {
    let zero = _mm512_setzero_si512();
    let (mut s, mut t) = ([zero; LANES], [zero; LANES]);
    for i in (0..LANES).step_by(2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    // t[4q + j] holds column 4p + j of rows 4q..4q+4 in its quarter p.
    for q in (0..LANES).step_by(4) {
        t[q] = _mm512_unpacklo_epi64(s[q], s[q + 2]);
        t[q + 1] = _mm512_unpackhi_epi64(s[q], s[q + 2]);
        t[q + 2] = _mm512_unpacklo_epi64(s[q + 1], s[q + 3]);
        t[q + 3] = _mm512_unpackhi_epi64(s[q + 1], s[q + 3]);
    }
    // s[2j..] gathers, for column j mod 4, the even (p = 0, 2) and the odd (p = 1, 3) quarters of four row groups.
    for j in 0..4 {
        s[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(t[j], t[j + 4]);
        s[j + 4] = _mm512_shuffle_i32x4::<0b11_01_11_01>(t[j], t[j + 4]);
        s[j + 8] = _mm512_shuffle_i32x4::<0b10_00_10_00>(t[j + 8], t[j + 12]);
        s[j + 12] = _mm512_shuffle_i32x4::<0b11_01_11_01>(t[j + 8], t[j + 12]);
    }
    for j in 0..4 {
        t[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(s[j], s[j + 8]);
        t[j + 8] = _mm512_shuffle_i32x4::<0b11_01_11_01>(s[j], s[j + 8]);
        t[j + 4] = _mm512_shuffle_i32x4::<0b10_00_10_00>(s[j + 4], s[j + 12]);
        t[j + 12] = _mm512_shuffle_i32x4::<0b11_01_11_01>(s[j + 4], s[j + 12]);
    }
    t
}
