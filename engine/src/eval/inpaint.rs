//! Inpainting as a downstream check: holes in held-out images, filled by a model, against what was there.
//!
//! Pixels in the hole cannot be known, so the error is read beside that of a flat fill; whether the filled image is
//! still of its class is asked of the classifier.

use crate::error::{Error, Result};
use crate::eval::classifier::Classifier;
use crate::eval::score::{read_pictures, tensor};
use crate::io::datasets::ImageSet;
use crate::io::pictures::Pictures;
use crate::models::dit::Dit;
use crate::sample::inpaint::Known;
use crate::sample::pipeline::{Progress, Request, generate, to_pixels};
use crate::tensor::Tensor;
use serde::Serialize;
use std::ops::Range;

/// How well holes are filled.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct InpaintScore {
    /// Images.
    pub n: usize,
    /// Side of the square hole in the middle, in pixels.
    pub hole: usize,
    /// Root of the mean squared error in the hole, in grey levels of 0 to 255.
    pub rmse: f64,
    /// The same as a peak signal-to-noise ratio in dB.
    pub psnr: f64,
    /// Ratio of a hole that is filled with the mean of the pixels around it: what no model at all gets.
    pub psnr_flat: f64,
    /// Fraction of the filled images that the classifier takes for their class, where one was given.
    pub agreement: Option<f64>,
    /// Fraction of the whole images: what a perfect fill gets.
    pub agreement_real: Option<f64>,
}

/// Fills a hole of half the side in the middle of the first `n` images of `data`, with their labels.
///
/// `request` says how to sample and with how many images at once; its labels are not used. The same request gives the
/// same result.
///
/// # Errors
/// Images that the model or classifier does not take, more than there are, or as [`generate`].
pub fn inpainting(
    model: &Dit,
    data: &ImageSet,
    classifier: Option<&Classifier>,
    n: usize,
    rounds: usize,
    request: &Request,
    report: &mut (dyn FnMut(Progress) + Send),
) -> Result<InpaintScore> {
    let c = &model.config;
    if (c.in_channels, c.input_size, c.input_size) != (data.channels, data.height, data.width) {
        return Err(Error::usage("model", "does not take the images of the data set")
            .is(format!("{} channels of {1} x {1}", c.in_channels, c.input_size))
            .must(format!("{} channels of {} x {}", data.channels, data.height, data.width)));
    }
    if n == 0 || n > data.n {
        return Err(Error::usage("--n", "number of images out of range").is(n).must(format!("1 to {}", data.n)));
    }
    let whole = Pictures::of_set(data, 0..n)?;
    let labels: Vec<i32> = data.labels[..n].iter().map(|&l| i32::from(l)).collect();
    let hole = middle(data.height);
    let images = tensor(model.device(), &whole, 0..n)?;
    let known = Known { mask: mask(&images, &hole)?, images, rounds };
    let request = Request { labels: labels.clone(), known: Some(known), ..request.clone() };
    let filled = to_pixels(&generate(model, &request, report)?)?;
    let filled = Pictures::new("filled images", [n, data.height, data.width, data.channels], filled)?;
    let mse = squared_error(&whole, &filled, &hole);
    let flat = squared_error(&whole, &flat(&whole, &hole)?, &hole);
    let agreement = |of: &Pictures| classifier.map(|c| read_pictures(c, of)?.agreement(&labels)).transpose();
    Ok(InpaintScore {
        n,
        hole: hole.len(),
        rmse: mse.sqrt(),
        psnr: psnr(mse),
        psnr_flat: psnr(flat),
        agreement: agreement(&filled)?,
        agreement_real: agreement(&whole)?,
    })
}

/// The middle half of a side.
fn middle(side: usize) -> Range<usize> {
    let hole = (side / 2).max(1);
    (side - hole) / 2..(side - hole) / 2 + hole
}

/// 1 outside the square hole, 0 inside, in the shape of `images`.
fn mask(images: &Tensor, hole: &Range<usize>) -> Result<Tensor> {
    let (h, w) = (images.dim(2), images.dim(3));
    let inside = |at: usize| hole.contains(&(at / w % h)) && hole.contains(&(at % w));
    let values: Vec<f32> = (0..images.len()).map(|at| if inside(at) { 0.0 } else { 1.0 }).collect();
    Tensor::from_f32(images.device(), images.shape().dims(), &values)
}

/// Places of the bytes of one image that are in the hole.
fn places(of: &Pictures, hole: &Range<usize>) -> impl Iterator<Item = usize> {
    let (w, c) = (of.width, of.channels);
    let columns = hole.clone();
    hole.clone().flat_map(move |y| columns.clone().flat_map(move |x| (0..c).map(move |k| (y * w + x) * c + k)))
}

/// Mean squared error in the hole.
fn squared_error(a: &Pictures, b: &Pictures, hole: &Range<usize>) -> f64 {
    let count = (a.n * hole.len() * hole.len() * a.channels) as f64;
    let each = |i: usize| {
        let (x, y) = (a.image(i), b.image(i));
        places(a, hole).map(|at| (f64::from(x[at]) - f64::from(y[at])).powi(2)).sum::<f64>()
    };
    (0..a.n).map(each).sum::<f64>() / count
}

/// Each hole filled with the mean of what is around it, by channel.
fn flat(whole: &Pictures, hole: &Range<usize>) -> Result<Pictures> {
    let c = whole.channels;
    let mut pixels = whole.pixels().to_vec();
    let inside: Vec<usize> = places(whole, hole).collect();
    for image in pixels.chunks_exact_mut(whole.height * whole.width * c) {
        let mut sums = vec![(0.0, 0.0); c];
        let mut known = vec![true; image.len()];
        inside.iter().for_each(|&at| known[at] = false);
        for (at, &value) in image.iter().enumerate().filter(|&(at, _)| known[at]) {
            sums[at % c] = (sums[at % c].0 + f64::from(value), sums[at % c].1 + 1.0);
        }
        inside.iter().for_each(|&at| image[at] = (sums[at % c].0 / sums[at % c].1).round() as u8);
    }
    Pictures::new("flat images", [whole.n, whole.height, whole.width, c], pixels)
}

/// Peak signal-to-noise ratio of bytes in dB; infinite where there is no error.
fn psnr(mse: f64) -> f64 {
    10.0 * (255.0 * 255.0 / mse).log10()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::dit::DitConfig;
    use crate::tensor::Device;
    use graft_kernels::rng::Philox;

    fn data(n: usize) -> ImageSet {
        ImageSet {
            n,
            channels: 1,
            height: 8,
            width: 8,
            pixels: (0..n * 64).map(|i| (i * 29 % 256) as u8).collect(),
            labels: (0..n).map(|i| (i % 3) as u8).collect(),
            class_names: vec!["a", "b", "c"],
        }
    }

    #[test]
    fn errors_in_the_hole_by_hand() {
        // 4 x 4, the hole is the middle 2 x 2.
        assert_eq!((middle(4), middle(28), middle(1)), (1..3, 7..21, 0..1));
        let mut pixels = vec![100; 16];
        (pixels[5], pixels[10]) = (110, 80);
        let whole = Pictures::new("x", [1, 4, 4, 1], pixels).unwrap();
        let fill = flat(&whole, &(1..3)).unwrap();
        assert_eq!(fill.pixels(), [100; 16]);
        assert_eq!(squared_error(&whole, &fill, &(1..3)), 125.0);
        // Outside the hole nothing counts.
        let mut other = whole.pixels().to_vec();
        other[0] = 0;
        assert_eq!(squared_error(&whole, &Pictures::new("x", [1, 4, 4, 1], other).unwrap(), &(1..3)), 0.0);
        assert!((psnr(65.025) - 30.0).abs() < 1e-9);
        assert!(psnr(0.0).is_infinite());
    }

    #[test]
    fn known_pixels_survive_and_the_hole_is_filled() {
        let config = DitConfig { patch: 2, input_size: 8, in_channels: 1, classes: 3, ..DitConfig::plain(2, 32, 4) };
        let mut model = Dit::new(config, &Device::cpu(), 7).unwrap();
        let ids: Vec<_> = model.params.iter().map(|(id, _)| id).collect();
        for id in ids {
            let mut value = model.params.get(id).value.copy().unwrap();
            Philox::new(3, 1000 + id.index() as u64).fill_normal(value.f32s_mut().unwrap());
            value.f32s_mut().unwrap().iter_mut().for_each(|v| *v *= 0.1);
            model.params.set(id, value).unwrap();
        }
        let set = data(5);
        let whole = Pictures::of_set(&set, 0..5).unwrap();
        let images = tensor(&Device::cpu(), &whole, 0..5).unwrap();
        let labels: Vec<i32> = set.labels.iter().map(|&l| i32::from(l)).collect();
        for (sampler, rounds) in [("ddim", 1), ("ddim", 3), ("ddpm", 2), ("dpm++", 1)] {
            let run = |batch: usize| {
                let known = Known { mask: mask(&images, &(2..6)).unwrap(), images: images.clone(), rounds };
                let sampler = sampler.parse().unwrap();
                let base = Request { steps: 4, batch, sampler, known: Some(known), ..Request::new(labels.clone(), 3) };
                to_pixels(&generate(&model, &base, &mut |_| {}).unwrap()).unwrap()
            };
            let filled = run(5);
            assert_eq!(filled, run(2), "{sampler} {rounds}");
            let inside: Vec<usize> = places(&whole, &(2..6)).collect();
            for (at, (got, want)) in filled.iter().zip(whole.pixels()).enumerate() {
                assert!(
                    inside.contains(&(at % 64)) || got == want,
                    "{sampler} {rounds}: byte {at} is {got}, was {want}"
                );
            }
            assert!(inside.iter().any(|&at| filled[at] != whole.pixels()[at]));
        }
        let request = Request { steps: 3, ..Request::new(vec![0], 0) };
        let score = inpainting(&model, &set, None, 5, 2, &request, &mut |_| {}).unwrap();
        assert!(score.hole == 4 && score.rmse > 0.0 && score.agreement.is_none(), "{score:?}");
        assert!((score.psnr - psnr(score.rmse * score.rmse)).abs() < 1e-9);
        let again = inpainting(&model, &set, None, 5, 2, &request, &mut |_| {}).unwrap();
        assert_eq!(score, again);
        let refuse = |n, rounds, request: &Request| {
            inpainting(&model, &set, None, n, rounds, request, &mut |_| {}).unwrap_err().to_string()
        };
        assert!(refuse(6, 1, &request).contains("--n: number of images out of range"));
        assert!(refuse(5, 0, &request).contains("--rounds: out of range; is 0"));
        let multistep = Request { sampler: "dpm++".parse().unwrap(), ..request.clone() };
        assert!(refuse(5, 2, &multistep).contains("--rounds: this sampler looks back"));
    }
}
