//! Pooling over 3 x 3 windows, channels last, and the mean over an image.

use crate::error::Result;
use crate::tensor::Tensor;
use graft_kernels::simd::vectorised;
use rayon::prelude::*;

/// Edge of the windows.
const EDGE: usize = 3;

/// Largest value of each 3 x 3 window of `[B, H, W, C]`: every `stride` pixels, with `pad` pixels around the image that
/// never win.
///
/// # Errors
/// When memory runs out.
pub fn max(x: &Tensor, stride: usize, pad: usize) -> Result<Tensor> {
    windows(x, stride, pad, |out, pixel| out.iter_mut().zip(pixel).for_each(|(o, &v)| *o = if v > *o { v } else { *o }))
}

/// Mean of each 3 x 3 window of `[B, H, W, C]` around every pixel; pixels outside do not count.
///
/// # Errors
/// When memory runs out.
pub fn average(x: &Tensor) -> Result<Tensor> {
    let (h, w, c) = (x.dim(1), x.dim(2), x.dim(3));
    let mut sums = windows(x, 1, 1, |out, pixel| out.iter_mut().zip(pixel).for_each(|(o, v)| *o += v))?;
    let inside = |at: usize, size: usize| (at + 2).min(size) - at.saturating_sub(1);
    sums.f32s_mut()?.par_chunks_mut(w * c).enumerate().for_each(|(row, line)| {
        let rows = inside(row % h, h);
        for (column, pixel) in line.chunks_exact_mut(c).enumerate() {
            let count = (rows * inside(column, w)) as f32;
            pixel.iter_mut().for_each(|v| *v /= count);
        }
    });
    Ok(sums)
}

/// Folds every window into its first pixel.
fn windows(x: &Tensor, stride: usize, pad: usize, fold: impl Fn(&mut [f32], &[f32]) + Sync) -> Result<Tensor> {
    let [b, h, w, c] = [0, 1, 2, 3].map(|axis| x.dim(axis));
    let [oh, ow] = [h, w].map(|size| (size + 2 * pad - EDGE) / stride + 1);
    let mut out = x.device().empty(&[b, oh, ow, c])?;
    let source = x.f32s()?;
    let span = |at: usize, size: usize| (at * stride).saturating_sub(pad)..(at * stride + EDGE - pad).min(size);
    out.f32s_mut()?.par_chunks_mut(ow * c).enumerate().for_each(|(row, line)| {
        let image = &source[row / oh * h * w * c..][..h * w * c];
        vectorised(
            #[inline(always)]
            || {
                for (column, pixel) in line.chunks_exact_mut(c).enumerate() {
                    let taps = span(row % oh, h).flat_map(|y| span(column, w).map(move |x| (y * w + x) * c));
                    for (tap, at) in taps.enumerate() {
                        if tap == 0 {
                            pixel.copy_from_slice(&image[at..at + c]);
                        } else {
                            fold(pixel, &image[at..at + c]);
                        }
                    }
                }
            },
        );
    });
    Ok(out)
}

/// Mean over all pixels: `[B, H, W, C]` to `[B, C]`.
///
/// # Errors
/// When memory runs out.
pub fn mean(x: &Tensor) -> Result<Tensor> {
    let (c, plane) = (x.dim(3), x.dim(1) * x.dim(2));
    let mut out = Tensor::zeros(x.device(), &[x.dim(0), c])?;
    for (means, image) in out.f32s_mut()?.chunks_exact_mut(c).zip(x.f32s()?.chunks_exact(plane * c)) {
        image.chunks_exact(c).for_each(|pixel| means.iter_mut().zip(pixel).for_each(|(m, v)| *m += v));
        means.iter_mut().for_each(|m| *m /= plane as f32);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Device;

    /// 1 2 3 4 / 5 6 7 8 / 9 … in channel 0, ten times that in channel 1.
    fn ramp(h: usize, w: usize) -> Tensor {
        let values: Vec<f32> = (1..=h * w).flat_map(|v| [v as f32, 10.0 * v as f32]).collect();
        Tensor::from_f32(&Device::cpu(), &[1, h, w, 2], &values).unwrap()
    }

    #[test]
    fn largest_of_windows() {
        let out = max(&ramp(5, 4), 2, 0).unwrap();
        assert_eq!(out.shape().dims(), [1, 2, 1, 2]);
        assert_eq!(out.f32s().unwrap(), [11.0, 110.0, 19.0, 190.0]);
        let same = max(&ramp(2, 2), 1, 1).unwrap();
        assert_eq!(same.f32s().unwrap(), [4.0, 40.0].repeat(4));
        // Padding never wins, even where every value is negative.
        let negative = Tensor::from_f32(&Device::cpu(), &[1, 1, 2, 1], &[-3.0, -5.0]).unwrap();
        assert_eq!(max(&negative, 1, 1).unwrap().f32s().unwrap(), [-3.0, -3.0]);
    }

    #[test]
    fn means_count_only_pixels_inside() {
        let out = average(&ramp(3, 3)).unwrap();
        // Corner: (1+2+4+5)/4; edge: (1+2+3+4+5+6)/6; middle: all nine.
        let first: Vec<f32> = out.f32s().unwrap().iter().step_by(2).copied().collect();
        assert_eq!(first, [3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0]);
        assert_eq!(mean(&ramp(3, 3)).unwrap().f32s().unwrap(), [5.0, 50.0]);
    }
}
