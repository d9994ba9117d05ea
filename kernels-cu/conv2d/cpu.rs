//! CPU path: a matrix product whose left operand, a window of the images per output pixel, is never in memory.
//!
//! The product packs a few rows of it at a time, and only then are they gathered: a row of a window lies in one piece,
//! because channels are last. A kernel of one pixel reads the images as they are.

use crate::gemm::cpu::weight;
use crate::gemm::product::{Matrix, Output, Product, Rows, Values, run};
use crate::generated::conv2d::{Dims, Forward, Params};
use crate::simd::vectorised;

/// The windows of all output pixels, one row each.
struct Windows<'a> {
    x: &'a [f32],
    dims: Dims,
    params: Params,
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let Dims { b, h, w, c, f, kh, kw, oh, ow } = a.dims;
    let (rows, k) = (b * oh * ow, kh * kw * c);
    let (filters, bf16) = weight(a.filters, k, a.params.bf16);
    let windows = Windows { x: a.x, dims: a.dims, params: a.params };
    let plain = (kh, kw, a.params.stride) == (1, 1, 1) && (oh, ow) == (h, w);
    let operand = if plain { Values::F32(a.x) } else { Values::Rows(&windows) };
    let left = Matrix { values: operand, strides: [k, 1] };
    let product = Product::new([rows, k, f], left, filters.transposed(), bf16);
    let (bias, relu) = (a.bias, a.params.relu);
    run(&product, Output::new(a.y, None, f, [rows, f]), &|_, from, y, _| {
        vectorised(
            #[inline(always)]
            || {
                if let Some(bias) = bias {
                    y.iter_mut().zip(&bias[from..]).for_each(|(y, bias)| *y += bias);
                }
                if relu {
                    // A comparison that keeps NaN, unlike `max`.
                    y.iter_mut().for_each(|y| *y = if *y < 0.0 { 0.0 } else { *y });
                }
            },
        );
    });
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
    use super::copy_clipped;

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
