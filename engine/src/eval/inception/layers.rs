//! The layers of the network, as a table, and their weights.
//!
//! Layers are named and ordered as in the archive. Every convolution is followed by a batch norm without scale and a
//! ReLU; the norm is folded into the weights.

use crate::error::{Error, Result};
use crate::ops::{contracts, conv2d};
use crate::tensor::{Device, Tensor};

/// Added to the variance in every batch norm of this network.
const EPS: f64 = 1e-3;

/// What a path through a block does next.
#[derive(Clone, Copy, Debug)]
pub enum Stage {
    /// A convolution: output channels, rows and columns of the kernel, stride, whether the image keeps its size.
    Conv(usize, [usize; 2], usize, bool),
    /// Mean of 3 x 3 windows around every pixel.
    Average,
    /// Largest of 3 x 3 windows: stride, padding.
    Max(usize, usize),
}
use Stage::{Average, Conv, Max};

/// A path: stages one after the other, then convolutions side by side whose results are put together.
#[derive(Clone, Debug)]
pub struct Path {
    /// One after the other.
    pub stages: Vec<Stage>,
    /// Side by side at the end; often none.
    pub ends: Vec<Stage>,
}

/// A layer: paths side by side over one input.
pub type Layer = (&'static str, Vec<Path>);

const fn square(out: usize, edge: usize) -> Stage {
    Conv(out, [edge, edge], 1, true)
}

const fn pointwise(out: usize) -> Stage {
    square(out, 1)
}

const fn across(out: usize, width: usize) -> Stage {
    Conv(out, [1, width], 1, true)
}

const fn down(out: usize, height: usize) -> Stage {
    Conv(out, [height, 1], 1, true)
}

/// 3 x 3, every second pixel, no padding.
const fn reduce(out: usize) -> Stage {
    Conv(out, [3, 3], 2, false)
}

fn path(stages: &[Stage]) -> Path {
    Path { stages: stages.to_vec(), ends: Vec::new() }
}

/// Blocks at 35 x 35.
fn block_a(pooled: usize) -> Vec<Path> {
    vec![
        path(&[pointwise(64)]),
        path(&[pointwise(48), square(64, 5)]),
        path(&[pointwise(64), square(96, 3), square(96, 3)]),
        path(&[Average, pointwise(pooled)]),
    ]
}

/// Blocks at 17 x 17, with kernels of 7 along one axis.
fn block_c(w: usize) -> Vec<Path> {
    vec![
        path(&[pointwise(192)]),
        path(&[pointwise(w), across(w, 7), down(192, 7)]),
        path(&[pointwise(w), down(w, 7), across(w, 7), down(w, 7), across(192, 7)]),
        path(&[Average, pointwise(192)]),
    ]
}

/// Blocks at 8 x 8. The last one takes the largest value where the others average: a peculiarity of this network.
fn block_e(pool: Stage) -> Vec<Path> {
    let ends = vec![across(384, 3), down(384, 3)];
    vec![
        path(&[pointwise(320)]),
        Path { stages: vec![pointwise(384)], ends: ends.clone() },
        Path { stages: vec![pointwise(448), square(384, 3)], ends },
        path(&[pool, pointwise(192)]),
    ]
}

/// All layers in order, from `[B, 299, 299, 3]` to `[B, 8, 8, 2048]`.
pub fn table() -> Vec<Layer> {
    let one = |stage| vec![path(&[stage])];
    vec![
        ("conv", one(reduce(32))),
        ("conv_1", one(Conv(32, [3, 3], 1, false))),
        ("conv_2", one(square(64, 3))),
        ("pool0", one(Max(2, 0))),
        ("conv_3", one(pointwise(80))),
        ("conv_4", one(Conv(192, [3, 3], 1, false))),
        ("pool1", one(Max(2, 0))),
        ("mixed", block_a(32)),
        ("mixed_1", block_a(64)),
        ("mixed_2", block_a(64)),
        ("mixed_3", vec![path(&[reduce(384)]), path(&[pointwise(64), square(96, 3), reduce(96)]), path(&[Max(2, 0)])]),
        ("mixed_4", block_c(128)),
        ("mixed_5", block_c(160)),
        ("mixed_6", block_c(160)),
        ("mixed_7", block_c(192)),
        (
            "mixed_8",
            vec![
                path(&[pointwise(192), reduce(320)]),
                path(&[pointwise(192), across(192, 7), down(192, 7), reduce(192)]),
                path(&[Max(2, 0)]),
            ],
        ),
        ("mixed_9", block_e(Average)),
        ("mixed_10", block_e(Max(1, 1))),
    ]
}

/// A convolution with its batch norm folded in, and the ReLU that follows.
#[derive(Debug)]
pub struct Convolution {
    /// `[F, Kh, Kw, C]`.
    filters: Tensor,
    /// `[F]`.
    bias: Tensor,
    stride: usize,
    pad: [usize; 2],
}

impl Convolution {
    /// Takes the next four tensors of the archive: filters `[F, C, Kh, Kw]`, offset, mean and variance.
    ///
    /// # Errors
    /// "not the Inception network" when one is missing or has another length.
    pub fn take(
        device: &Device,
        tensors: &mut impl Iterator<Item = Vec<f32>>,
        (out, channels): (usize, usize),
        [kh, kw]: [usize; 2],
        stride: usize,
        same: bool,
    ) -> Result<Convolution> {
        let per_filter = channels * kh * kw;
        let mut next = |len: usize| {
            tensors.next().filter(|t| t.len() == len).ok_or_else(|| {
                Error::failure("inception", "not the Inception network").must(format!("{len} values in the next layer"))
            })
        };
        let (weight, beta, mean, variance) = (next(out * per_filter)?, next(out)?, next(out)?, next(out)?);
        let (mut filters, mut bias) = (Vec::with_capacity(weight.len()), Vec::with_capacity(out));
        for (f, filter) in weight.chunks_exact(per_filter).enumerate() {
            let scale = 1.0 / (f64::from(variance[f]) + EPS).sqrt();
            bias.push((f64::from(beta[f]) - scale * f64::from(mean[f])) as f32);
            // Channels last, as the images are.
            let at = |tap: usize, channel: usize| f64::from(filter[channel * kh * kw + tap]);
            filters.extend((0..per_filter).map(|i| (scale * at(i / channels, i % channels)) as f32));
        }
        Ok(Convolution {
            filters: Tensor::from_f32(device, &[out, kh, kw, channels], &filters)?,
            bias: Tensor::from_f32(device, &[out], &bias)?,
            stride,
            pad: if same { [kh / 2, kw / 2] } else { [0, 0] },
        })
    }

    /// `[B, H, W, C]` to `[B, Oh, Ow, F]`.
    ///
    /// # Errors
    /// When the channels do not fit or memory runs out.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [pad_h, pad_w] = self.pad;
        let size = |axis: usize, pad: usize| {
            let inside = (x.dim(axis) + 2 * pad).checked_sub(self.filters.dim(axis));
            inside.map(|room| room / self.stride + 1).ok_or_else(|| {
                Error::failure("inception", "image too small")
                    .is(x.shape())
                    .must(format!("a kernel of {}", self.filters.shape()))
            })
        };
        let params = contracts::conv2d::Params { stride: self.stride, pad_h, pad_w, relu: true, bf16: false };
        conv2d(x, &self.filters, Some(&self.bias), size(1, pad_h)?, size(2, pad_w)?, params)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_is_folded_and_channels_come_last() {
        // Two channels, kernel 1 x 2; variance 3.999 with eps is 4, so the scale is 1/2.
        let tensors = [vec![2.0, 4.0, 6.0, 8.0], vec![1.0], vec![3.0], vec![3.999]];
        let device = Device::cpu();
        let conv = Convolution::take(&device, &mut tensors.into_iter(), (1, 2), [1, 2], 1, false).unwrap();
        let filters = conv.filters.f32s().unwrap();
        assert!(filters.iter().zip([1.0, 3.0, 2.0, 4.0]).all(|(a, b)| (a - b).abs() < 1e-6), "{filters:?}");
        assert!((conv.bias.f32s().unwrap()[0] + 0.5).abs() < 1e-6);
        let x = Tensor::from_f32(&device, &[1, 1, 2, 2], &[1.0, 10.0, 100.0, 1000.0]).unwrap();
        assert!((conv.forward(&x).unwrap().f32s().unwrap()[0] - 4230.5).abs() < 1e-2);
        let short = Convolution::take(&device, &mut [vec![0.0; 4], vec![0.0]].into_iter(), (1, 2), [1, 2], 1, true);
        assert_eq!(short.unwrap_err().problem(), "not the Inception network");
    }

    #[test]
    fn the_table_has_the_convolutions_of_the_archive() {
        let convs = |stages: &[Stage]| stages.iter().filter(|s| matches!(s, Conv(..))).count();
        let count: usize = table().iter().flat_map(|(_, paths)| paths).map(|p| convs(&p.stages) + convs(&p.ends)).sum();
        assert_eq!(4 * count, crate::io::inception::TENSORS);
    }
}
