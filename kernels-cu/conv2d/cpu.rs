//! CPU path: a matrix product whose left operand, a window of the images per output pixel, is never in memory.
//!
//! The product packs a few rows of it at a time, and only then are they gathered: a row of a window lies in one piece,
//! because channels are last. A kernel of one pixel reads the images as they are.

use crate::gemm::cpu::weight;
#[cfg(target_arch = "x86_64")]
use crate::gemm::product::windows::{Filters, Pixels, multiply};
use crate::gemm::product::{Matrix, Output, Product, Rows, Values, run};
use crate::generated::conv2d::{Dims, Forward, Params};
use crate::simd::vectorised;
use rayon::prelude::*;

/// The windows of all output pixels, one row each.
struct Windows<'a> {
    x: &'a [f32],
    dims: Dims,
    params: Params,
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { b, h, w, kh, kw, oh, ow, .. } = a.dims;
    let pointwise = (kh, kw, a.params.stride) == (1, 1, 1) && (oh, ow) == (h, w);
    // Where every window is a pixel those of all images are one row, of full tiles.
    let dims = if pointwise { Dims { b: 1, h: 1, w: b * h * w, oh: 1, ow: b * h * w, ..a.dims } } else { a.dims };
    let Dims { b, c, f, oh, ow, .. } = dims;
    let (rows, k) = (b * oh * ow, kh * kw * c);
    let (filters, bf16) = weight(a.filters, k, a.params.bf16);
    let finish = Finish { bias: a.bias, relu: a.params.relu };
    #[cfg(target_arch = "x86_64")]
    if ow >= FEWEST
        && !a.y.is_empty()
        && let Some(filters) = Filters::pack(filters, f, kh * kw, c, bf16)
    {
        return in_place(dims, a.params, a.x, &filters, a.y, finish);
    }
    let windows = Windows { x: a.x, dims, params: a.params };
    let operand = if pointwise { Values::F32(a.x) } else { Values::Rows(&windows) };
    let left = Matrix { values: operand, strides: [k, 1] };
    let product = Product::new([rows, k, f], left, filters.transposed(), bf16);
    run(&product, Output::new(a.y, None, f, [rows, f]), &|_, from, y, _| finish.row(from, y));
}

/// What is done to complete sums.
#[derive(Clone, Copy)]
struct Finish<'a> {
    bias: Option<&'a [f32]>,
    relu: bool,
}

impl Finish<'_> {
    /// A piece of the filters of one pixel, from filter `from` on.
    fn row(self, from: usize, y: &mut [f32]) {
        let len = y.len();
        self.rows(from, len, y);
    }

    /// Pieces of `len` filters, from filter `from` on, of several pixels.
    fn rows(self, from: usize, len: usize, y: &mut [f32]) {
        vectorised(
            #[inline(always)]
            || {
                for y in y.chunks_exact_mut(len) {
                    if let Some(bias) = self.bias {
                        y.iter_mut().zip(&bias[from..]).for_each(|(y, bias)| *y += bias);
                    }
                    if self.relu {
                        // A comparison that keeps NaN, unlike `max`.
                        y.iter_mut().for_each(|y| *y = if *y < 0.0 { 0.0 } else { *y });
                    }
                }
            },
        );
    }
}

/// Fewest windows in a row for which tiles of one row are worth while.
const FEWEST: usize = 7;
/// Windows of a block, and words of its pixels, that the second-level cache keeps beside the filters.
const BLOCK: [usize; 2] = [128, 160 << 10];

/// Blocks of windows over the threads: the pixels under a block are copied once, with their padding, and the product
/// reads the windows from there.
#[cfg(target_arch = "x86_64")]
fn in_place(dims: Dims, params: Params, x: &[f32], filters: &Filters, y: &mut [f32], finish: Finish<'_>) {
    let Dims { h, w, c, f, kh, kw, oh, ow, .. } = dims;
    let Params { stride, pad_h, pad_w, .. } = params;
    let run = filters.words(c);
    let pixel = Pixels::step(run);
    let even = |len: usize, most: usize| len.div_ceil(len.div_ceil(most.max(1)));
    let columns = even(ow, BLOCK[0]);
    let line_of = |columns: usize| ((columns - 1) * stride + kw) * pixel;
    let most = (BLOCK[0] / columns).min(BLOCK[1] / (line_of(columns) * stride)).min(oh);
    let rows = if columns < ow { 1 } else { even(oh, most) };
    let image = |(index, y): (usize, &mut [f32])| {
        let x = &x[index * h * w * c..][..h * w * c];
        y.par_chunks_mut(rows * ow * f).enumerate().for_each(|(part, y)| {
            y.par_chunks_mut(if columns < ow { columns * f } else { y.len() }).enumerate().for_each(|(across, y)| {
                let (from, columns) = (across * columns, columns.min(ow - across * columns));
                let (top, left) = (part * rows * stride, from * stride);
                let windows = [y.len() / (columns * f), columns];
                let line = line_of(columns);
                let pixels = Pixels { run, steps: [pixel, line], taps: [kh, kw], stride, windows };
                multiply(filters, pixels, y, |words| {
                    for (i, words) in words.chunks_mut(line).enumerate() {
                        let source = (top + i).checked_sub(pad_h).filter(|&row| row < h);
                        for (j, words) in words.chunks_mut(pixel).enumerate() {
                            let column = (left + j).checked_sub(pad_w).filter(|&column| column < w);
                            match source.zip(column) {
                                Some((row, column)) => {
                                    filters.convert(&x[(row * w + column) * c..][..c], &mut words[..run]);
                                }
                                None => words[..run].fill(0.0),
                            }
                        }
                    }
                });
                finish.rows(0, f, y);
            });
        });
    };
    y.par_chunks_mut(oh * ow * f).enumerate().for_each(image);
}

impl Rows for Windows<'_> {
    fn size(&self) -> [usize; 2] {
        let Dims { b, c, kh, kw, oh, ow, .. } = self.dims;
        [b * oh * ow, kh * kw * c]
    }

    fn write(&self, row: usize, from: usize, mut out: &mut [f32]) {
        let Dims { h, w, c, kw, oh, ow, .. } = self.dims;
        let Params { stride, pad_h, pad_w, .. } = self.params;
        let (j, i, image) = (row % ow, row / ow % oh, row / (ow * oh));
        let run = kw * c;
        // Offset of the window's left edge in a row of the image; negative in the padding.
        let left = ((j * stride) as isize - pad_w as isize) * c as isize;
        let (mut tap, mut within) = (from / run, from % run);
        while !out.is_empty() {
            let (piece, rest) = out.split_at_mut((run - within).min(out.len()));
            match (i * stride + tap).checked_sub(pad_h).filter(|&y| y < h) {
                Some(y) => copy_clipped(&self.x[(image * h + y) * w * c..][..w * c], left + within as isize, piece),
                None => piece.fill(0.0),
            }
            (tap, within, out) = (tap + 1, 0, rest);
        }
    }
}

/// Copies `line[start..]` into all of `out`, with zeros for what is outside the line.
fn copy_clipped(line: &[f32], start: isize, out: &mut [f32]) {
    let before = start.min(0).unsigned_abs().min(out.len());
    let first = start.max(0).unsigned_abs().min(line.len());
    let inside = (out.len() - before).min(line.len() - first);
    out[..before].fill(0.0);
    out[before..before + inside].copy_from_slice(&line[first..first + inside]);
    out[before + inside..].fill(0.0);
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::{copy_clipped, forward};
    use crate::Weight;
    use crate::check::{Fill, Tolerance, compare, draw_f32};
    use crate::generated::conv2d::{Dims, Forward, Params};

    /// Windows in place: tiles and filters that end anywhere, rows cut in parts, strides, padding on some sides only.
    #[test]
    fn windows_in_place_agree_with_the_oracle() {
        // Batch; rows, columns and channels of an image; filters; taps; stride; padding.
        for ([b, h, w, c], f, [kh, kw], stride, [pad_h, pad_w]) in [
            ([2, 9, 9, 16], 40, [3, 3], 1, [1, 1]),
            ([1, 8, 17, 48], 33, [1, 7], 1, [0, 3]),
            ([3, 7, 13, 80], 16, [1, 1], 1, [0, 0]),
            ([1, 11, 31, 34], 5, [3, 3], 2, [0, 1]),
            ([1, 3, 300, 32], 3, [3, 3], 1, [1, 1]),
            ([1, 6, 7, 130], 70, [5, 1], 1, [2, 0]),
        ] {
            let (oh, ow) = ((h + 2 * pad_h - kh) / stride + 1, (w + 2 * pad_w - kw) / stride + 1);
            let dims = Dims { b, h, w, c, f, kh, kw, oh, ow };
            let x = draw_f32("windows", "x", b * h * w * c, Fill::Normal);
            let filters = draw_f32("windows", "filters", f * kh * kw * c, Fill::Uniform(-0.25, 0.25));
            let bias = draw_f32("windows", "bias", f, Fill::Normal);
            for (bf16, relu) in [(false, false), (true, true)] {
                let params = Params { stride, pad_h, pad_w, relu, bf16 };
                let [got, want] = [forward, reference::forward::<f32>].map(|path: fn(Forward<'_, f32>)| {
                    let mut y = vec![f32::NAN; b * oh * ow * f];
                    let (filters, bias) = (Weight::Native(&filters[..]), Some(&bias[..]));
                    path(Forward { dims, params, x: &x, filters, bias, y: &mut y });
                    y
                });
                let found = compare(&got, &want, if bf16 { Tolerance::BF16 } else { Tolerance::F32 });
                assert!(found.pass, "{dims:?} {params:?}: {found:?}");
            }
        }
    }

    #[test]
    fn pieces_are_clipped_on_both_sides() {
        let line = [1.0, 2.0, 3.0];
        let piece = |start: isize, len: usize| {
            let mut out = vec![f32::NAN; len];
            copy_clipped(&line, start, &mut out);
            out
        };
        assert_eq!(piece(0, 3), line);
        assert_eq!(piece(-2, 6), [0.0, 0.0, 1.0, 2.0, 3.0, 0.0]);
        assert_eq!(piece(2, 3), [3.0, 0.0, 0.0]);
        assert_eq!(piece(-5, 2), [0.0, 0.0]);
        assert_eq!(piece(7, 2), [0.0, 0.0]);
    }
}
