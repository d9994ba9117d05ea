//! The Inception network of the Fréchet inception distance (the TensorFlow graph of 2015-12-05), on the CPU.
//!
//! Pictures of any size become 2048 features, the mean of the last layer, and 2023 spatial ones for sFID: the first
//! seven channels of `mixed_6` by row, column and channel, as the evaluator of ADM (arXiv 2105.05233) takes them.
//! The weights are not part of this repository: [`crate::io::inception`] says where they come from.

pub mod cache;
pub mod layers;
pub mod pool;
pub mod resize;

use crate::error::Result;
use crate::eval::Features;
use crate::io::pictures::Pictures;
use crate::io::{hash, inception};
use crate::tensor::{Device, Tensor};
use layers::{Convolution, Stage};
use rayon::prelude::*;
use std::ops::Range;
use std::path::Path;

/// Width of the features.
pub const FEATURES: usize = 2048;
/// Width of the spatial features: 17 x 17 places of [`SPATIAL_CHANNELS`] channels.
pub const SPATIAL: usize = 17 * 17 * SPATIAL_CHANNELS;

/// Layer of the spatial features, and how many of its channels they are.
const SPATIAL_LAYER: &str = "mixed_6";
const SPATIAL_CHANNELS: usize = 7;
/// Pictures of one forward pass: 170 MB of activations at the most.
const BATCH: usize = 16;

/// A step of a path with its weights.
#[derive(Debug)]
enum Step {
    Convolve(Convolution),
    Average,
    Max(usize, usize),
}

#[derive(Debug)]
struct Branch {
    steps: Vec<Step>,
    ends: Vec<Step>,
}

/// The network with its weights.
#[derive(Debug)]
pub struct Inception {
    layers: Vec<(&'static str, Vec<Branch>)>,
    device: Device,
    /// SHA-256 of the weights.
    digest: String,
}

/// Features of a set of pictures.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// `[n, FEATURES]`, row-major.
    pub pool: Vec<f32>,
    /// `[n, SPATIAL]`, row-major.
    pub spatial: Vec<f32>,
}

impl Seen {
    /// Pictures seen.
    pub fn len(&self) -> usize {
        self.pool.len() / FEATURES
    }

    /// Whether no picture was seen.
    pub fn is_empty(&self) -> bool {
        self.pool.is_empty()
    }

    /// The features, checked; `name` says in errors which set they describe.
    ///
    /// # Errors
    /// Fewer than two rows, or a value that is not finite.
    pub fn features<'a>(&'a self, name: &'a str) -> Result<Features<'a>> {
        Features::new(name, &self.pool, FEATURES)
    }

    /// The spatial features, checked.
    ///
    /// # Errors
    /// As [`Seen::features`].
    pub fn spatial<'a>(&'a self, name: &'a str) -> Result<Features<'a>> {
        Features::new(name, &self.spatial, SPATIAL)
    }

    /// The pictures `range`, which must be among those seen.
    pub fn part(&self, range: Range<usize>) -> Seen {
        let cut = |values: &[f32], width: usize| values[range.start * width..range.end * width].to_vec();
        Seen { pool: cut(&self.pool, FEATURES), spatial: cut(&self.spatial, SPATIAL) }
    }
}

impl Inception {
    /// Reads the network from its archive.
    ///
    /// # Errors
    /// A missing or damaged file, or "not the Inception network".
    pub fn load(archive: &Path, device: &Device) -> Result<Inception> {
        Self::build(inception::read(archive)?, device).map_err(|e| e.context(archive.display()))
    }

    /// The network from its tensors in archive order.
    fn build(tensors: Vec<Vec<f32>>, device: &Device) -> Result<Inception> {
        let digests: String = tensors.iter().map(|t| hash::sha256(bytemuck::cast_slice(t))).collect();
        let digest = hash::sha256(digests.as_bytes());
        let mut tensors = tensors.into_iter();
        let mut channels = 3;
        let mut step = |stage: &Stage, channels: &mut usize| -> Result<Step> {
            Ok(match *stage {
                Stage::Average => Step::Average,
                Stage::Max(stride, pad) => Step::Max(stride, pad),
                Stage::Conv(out, kernel, stride, same) => {
                    let input = std::mem::replace(channels, out);
                    let sizes = (out, input);
                    Step::Convolve(Convolution::take(device, &mut tensors, sizes, kernel, stride, same)?)
                }
            })
        };
        let mut all = Vec::new();
        for (name, paths) in layers::table() {
            let (mut built, mut joined) = (Vec::with_capacity(paths.len()), 0);
            for path in &paths {
                let mut within = channels;
                let steps = path.stages.iter().map(|s| step(s, &mut within)).collect::<Result<Vec<_>>>()?;
                let mut ends = Vec::with_capacity(path.ends.len());
                for end in &path.ends {
                    let mut own = within;
                    ends.push(step(end, &mut own)?);
                    joined += own;
                }
                if ends.is_empty() {
                    joined += within;
                }
                built.push(Branch { steps, ends });
            }
            channels = joined;
            all.push((name, built));
        }
        Ok(Inception { layers: all, device: device.clone(), digest })
    }

    /// The device that it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Features of all pictures; `report` hears how many are done.
    ///
    /// The features of a picture do not depend on its batch.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn read(&self, pictures: &Pictures, report: &mut dyn FnMut(usize)) -> Result<Seen> {
        let mut seen = Seen::default();
        for start in (0..pictures.n).step_by(BATCH) {
            let range = start..(start + BATCH).min(pictures.n);
            let mut images = resize::resized(&self.device, pictures, range.clone())?;
            resize::normalise(&mut images)?;
            let pool = self.forward(images, &mut |name, out| {
                if name == SPATIAL_LAYER {
                    let pixels = out.f32s()?.chunks_exact(out.dim(3));
                    seen.spatial.extend(pixels.flat_map(|pixel| &pixel[..SPATIAL_CHANNELS]));
                }
                Ok(())
            })?;
            seen.pool.extend_from_slice(pool.f32s()?);
            report(range.end);
        }
        Ok(seen)
    }

    /// Normalised images `[B, 299, 299, 3]` to features `[B, 2048]`; `see` is shown the result of every layer,
    /// `[B, H, W, C]`.
    ///
    /// # Errors
    /// Those of `see`, another shape, or too little memory.
    pub fn forward(&self, images: Tensor, see: &mut dyn FnMut(&str, &Tensor) -> Result<()>) -> Result<Tensor> {
        let mut x = images;
        for (name, paths) in &self.layers {
            let mut parts = Vec::new();
            for path in paths {
                let mut y = x.clone();
                for step in &path.steps {
                    y = step.forward(&y)?;
                }
                if path.ends.is_empty() {
                    parts.push(y);
                } else {
                    for end in &path.ends {
                        parts.push(end.forward(&y)?);
                    }
                }
            }
            x = joined(parts)?;
            see(name, &x)?;
        }
        pool::mean(&x)
    }
}

impl Step {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Step::Convolve(conv) => conv.forward(x),
            Step::Average => pool::average(x),
            Step::Max(stride, pad) => pool::max(x, *stride, *pad),
        }
    }
}

/// Images of one size, channels put side by side.
fn joined(mut parts: Vec<Tensor>) -> Result<Tensor> {
    if parts.len() == 1 {
        return Ok(parts.swap_remove(0));
    }
    let [b, h, w] = [0, 1, 2].map(|axis| parts[0].dim(axis));
    let channels = parts.iter().map(|p| p.dim(3)).sum();
    let mut out = parts[0].device().empty(&[b, h, w, channels])?;
    let sources = parts.iter().map(|p| Ok((p.f32s()?, p.dim(3)))).collect::<Result<Vec<_>>>()?;
    out.f32s_mut()?.par_chunks_mut(w * channels).enumerate().for_each(|(row, line)| {
        for (column, mut pixel) in line.chunks_exact_mut(channels).enumerate() {
            for (values, own) in &sources {
                let (piece, rest) = pixel.split_at_mut(*own);
                piece.copy_from_slice(&values[(row * w + column) * own..][..*own]);
                pixel = rest;
            }
        }
    });
    Ok(out)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Weights of the right sizes that are all zero: whatever the picture, every feature is the last offset.
    pub(in crate::eval) fn blank(beta: f32) -> Inception {
        let mut sizes = Vec::new();
        let mut channels = 3;
        for (_, paths) in layers::table() {
            let mut joined = 0;
            for path in paths {
                let mut within = channels;
                let mut conv = |stage: &Stage, within: &mut usize| {
                    if let Stage::Conv(out, [kh, kw], ..) = *stage {
                        sizes.push([out * *within * kh * kw, out]);
                        *within = out;
                    }
                };
                path.stages.iter().for_each(|s| conv(s, &mut within));
                let ends = path.ends.iter().map(|e| {
                    let mut own = within;
                    conv(e, &mut own);
                    own
                });
                let ends: Vec<usize> = ends.collect();
                joined += if ends.is_empty() { within } else { ends.iter().sum() };
            }
            channels = joined;
        }
        let tensors: Vec<Vec<f32>> = sizes
            .iter()
            .flat_map(|&[weights, out]| [vec![0.0; weights], vec![beta; out], vec![0.0; out], vec![1.0; out]])
            .collect();
        assert_eq!(tensors.iter().map(Vec::len).sum::<usize>(), inception::VALUES);
        Inception::build(tensors, &Device::cpu()).unwrap()
    }

    #[test]
    fn shapes_follow_the_table() {
        let network = blank(0.5);
        let pictures = Pictures::new("x", [1, 8, 8, 1], vec![9; 64]).unwrap();
        let mut shapes = Vec::new();
        let images = resize::resized(network.device(), &pictures, 0..1).unwrap();
        let pool = network
            .forward(images, &mut |name, out| {
                shapes.push((name.to_string(), out.shape().dims().to_vec()));
                Ok(())
            })
            .unwrap();
        let of = |name: &str| shapes.iter().find(|(n, _)| n == name).unwrap().1.clone();
        assert_eq!(of("conv"), [1, 149, 149, 32]);
        assert_eq!(of("pool1"), [1, 35, 35, 192]);
        assert_eq!((of("mixed"), of("mixed_2")), (vec![1, 35, 35, 256], vec![1, 35, 35, 288]));
        assert_eq!((of("mixed_3"), of("mixed_8")), (vec![1, 17, 17, 768], vec![1, 8, 8, 1280]));
        assert_eq!(of("mixed_10"), [1, 8, 8, 2048]);
        assert!(pool.f32s().unwrap().iter().all(|&v| v == 0.5));
        let short = Inception::build(vec![vec![0.0; 864]], &Device::cpu());
        assert_eq!(short.unwrap_err().problem(), "not the Inception network");
    }

    #[test]
    fn channels_are_put_side_by_side() {
        let part = |c: usize, from: f32| {
            let values: Vec<f32> = (0..2 * c).map(|i| from + i as f32).collect();
            Tensor::from_f32(&Device::cpu(), &[1, 2, 1, c], &values).unwrap()
        };
        let out = joined(vec![part(1, 0.0), part(2, 10.0)]).unwrap();
        assert_eq!(out.shape().dims(), [1, 2, 1, 3]);
        assert_eq!(out.f32s().unwrap(), [0.0, 10.0, 11.0, 1.0, 12.0, 13.0]);
    }
}
