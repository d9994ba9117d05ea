//! Denoising loss on images that a model was not trained on: how well it predicts the noise.
//!
//! Timesteps and noise are functions of the image's number and the seed alone, and the timesteps cover their range
//! evenly, so two models are compared on the same questions: differences of a fraction of a percent can be told from a
//! few hundred images, long before samples show them.

use crate::autograd::{Graph, Precision, Var};
use crate::error::{Error, Result};
use crate::eval::score::mean_sd;
use crate::io::datasets::ImageSet;
use crate::models::dit::{Dit, Run, Semantics};
use crate::ops::{add_noise, contracts};
use crate::sample::schedule::Schedule;
use crate::tensor::Tensor;
use crate::train::batches;
use graft_kernels::rng::{Philox, image_seed};
use serde::Serialize;

/// Random streams of the noise, one per repetition.
const NOISE_STREAMS: u64 = 8 << 40;
/// Parts that the timesteps are divided into.
pub const QUARTILES: usize = 4;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossSettings {
    /// Images, from the first one of the set.
    pub n: usize,
    /// Timesteps and noises for each image.
    pub repeats: usize,
    /// Seed of the noise.
    pub seed: u64,
    /// Images computed together; changes no bit of the result.
    pub batch: usize,
    /// Arithmetic of the products.
    pub precision: Precision,
}

impl Default for LossSettings {
    fn default() -> Self {
        LossSettings { n: 1000, repeats: 1, seed: 0, batch: 50, precision: Precision::F32 }
    }
}

/// Mean squared error of the predicted noise.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DenoisingLoss {
    /// Images.
    pub n: usize,
    /// Noises for each.
    pub repeats: usize,
    /// Mean over all; 1 is what a prediction of zero gets.
    pub mean: f64,
    /// Standard error of the mean of each quartile, combined: what another choice of images and noise would change.
    pub standard_error: f64,
    /// Means over the quarters of the timesteps, the cleanest first.
    pub quartiles: [f64; QUARTILES],
}

/// The timestep below `len` that question `i` asks about: multiples of the golden ratio modulo 1, which cover the range
/// evenly whatever their number.
fn timestep(i: usize, len: usize) -> usize {
    const RATIO: u64 = 0x9E37_79B9_7F4A_7C15; // of 2⁶⁴
    let place = (i as u64).wrapping_mul(RATIO) >> 32;
    ((place * len as u64) >> 32) as usize
}

/// Denoising loss of `model` on the first images of `data`, labels given.
///
/// `report` hears how many questions have been answered.
///
/// # Errors
/// Images or labels that do not fit the model, no images, more than there are, or a loss that is not finite.
pub fn denoising_loss(
    model: &Dit,
    data: &ImageSet,
    settings: LossSettings,
    report: &mut dyn FnMut(usize),
) -> Result<DenoisingLoss> {
    check(model, data, settings)?;
    let schedule = Schedule::default();
    let mut parts: [Vec<f64>; QUARTILES] = Default::default();
    let mut done = 0;
    for repeat in 0..settings.repeats {
        for start in (0..settings.n).step_by(settings.batch) {
            let indices: Vec<u32> = (start..settings.n.min(start + settings.batch)).map(|i| i as u32).collect();
            let times: Vec<usize> =
                indices.iter().map(|&i| timestep(repeat * settings.n + i as usize, schedule.len())).collect();
            let losses = batch_losses(model, data, &schedule, &indices, &times, repeat, settings)?;
            for (t, loss) in times.iter().zip(losses) {
                parts[t * QUARTILES / schedule.len()].push(loss);
            }
            done += indices.len();
            report(done);
        }
    }
    let count: usize = parts.iter().map(Vec::len).sum();
    let weighted = |of: fn(&[f64], f64) -> f64| parts.iter().map(|p| of(p, p.len() as f64 / count as f64)).sum::<f64>();
    let mean = weighted(|p, share| if p.is_empty() { 0.0 } else { share * mean_sd(p).0 });
    let variance =
        weighted(|p, share| if p.is_empty() { 0.0 } else { (share * mean_sd(p).1).powi(2) / p.len() as f64 });
    if !mean.is_finite() {
        return Err(Error::failure("denoising loss", "not finite").is(mean).must("finite").fix("check the model"));
    }
    Ok(DenoisingLoss {
        n: settings.n,
        repeats: settings.repeats,
        mean,
        standard_error: variance.sqrt(),
        quartiles: std::array::from_fn(|q| if parts[q].is_empty() { f64::NAN } else { mean_sd(&parts[q]).0 }),
    })
}

fn check(model: &Dit, data: &ImageSet, settings: LossSettings) -> Result<()> {
    let c = &model.config;
    let (found, want) = ([c.in_channels, c.input_size, c.input_size], [data.channels, data.height, data.width]);
    if found != want {
        return Err(Error::usage("model", "does not take the images of the data set")
            .is(format!("{found:?} (channels, rows, columns)"))
            .must(format!("{want:?}")));
    }
    if data.class_names.len() > c.classes {
        return Err(Error::usage("model", "has fewer classes than the data set")
            .is(c.classes)
            .must(data.class_names.len()));
    }
    if settings.n == 0 || settings.n > data.n {
        return Err(Error::usage("--n", "number of images out of range")
            .is(settings.n)
            .must(format!("1 to {}", data.n)));
    }
    for (name, value) in [("--repeats", settings.repeats), ("--batch", settings.batch)] {
        if value == 0 {
            return Err(Error::usage(name, "too few").is(0).must("at least 1"));
        }
    }
    Ok(())
}

/// Mean squared errors of one batch, one per image.
fn batch_losses(
    model: &Dit,
    data: &ImageSet,
    schedule: &Schedule,
    indices: &[u32],
    times: &[usize],
    repeat: usize,
    settings: LossSettings,
) -> Result<Vec<f64>> {
    let device = model.device();
    let batch = batches::images(device, data, indices)?;
    let (b, size) = (indices.len(), batch.images.len() / indices.len());
    let mut noise = device.empty(&[b, size])?;
    noise.edit(|noise| {
        for (values, &i) in noise.chunks_exact_mut(size).zip(indices) {
            Philox::new(image_seed(settings.seed, u64::from(i)), NOISE_STREAMS + repeat as u64).fill_normal(values);
        }
    })?;
    let levels: Vec<f32> = times
        .iter()
        .flat_map(|&t| [schedule.alpha_bar(t).sqrt() as f32, (1.0 - schedule.alpha_bar(t)).sqrt() as f32])
        .collect();
    let levels = Tensor::from_f32(device, &[b, 2], &levels)?;
    let x_t = add_noise(&batch.images.reshape(&[b, size])?, &noise, &levels, contracts::add_noise::Params {})?;
    let x_t = Var::constant(x_t.into_shape(batch.images.shape().dims())?);
    let t = Tensor::from_f32(device, &[b], &times.iter().map(|&t| t as f32).collect::<Vec<_>>())?;
    let y = Tensor::from_i32(device, &[b], &batch.labels)?;
    let g = Graph::inference(settings.precision);
    let run = Run { semantics: Semantics::ORIGINAL, checkpoint: false };
    let out = model.forward(&g, &x_t, &t, &y, run)?.into_tensor();
    // Variance channels, where there are any, follow the prediction of each image.
    let (out, noise) = (out.values()?, noise.values()?);
    let predictions = out.chunks_exact(out.len() / b);
    let error = |(predicted, noise): (&[f32], &[f32])| {
        let squares = noise.iter().zip(predicted).map(|(n, p)| f64::from(n - p).powi(2));
        squares.sum::<f64>() / size as f64
    };
    Ok(predictions.zip(noise.chunks_exact(size)).map(error).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::dit::DitConfig;
    use crate::tensor::Device;

    fn data(n: usize) -> ImageSet {
        ImageSet {
            n,
            channels: 1,
            height: 8,
            width: 8,
            pixels: (0..n * 64).map(|i| (i * 37 % 256) as u8).collect(),
            labels: (0..n).map(|i| (i % 3) as u8).collect(),
            class_names: vec!["a", "b", "c"],
        }
    }

    fn model(classes: usize) -> Dit {
        let config = DitConfig { patch: 2, input_size: 8, in_channels: 1, classes, ..DitConfig::plain(2, 32, 4) };
        Dit::new(config, &Device::cpu(), 7).unwrap()
    }

    #[test]
    fn timesteps_cover_the_range_evenly() {
        let seen: Vec<usize> = (0..1000).map(|i| timestep(i, 1000)).collect();
        // In every hundred questions each quarter of the range has its share, and no timestep is asked often.
        for (block, quarter) in seen.chunks(100).flat_map(|block| (0..4).map(move |q| (block, q))) {
            assert!((23..=27).contains(&block.iter().filter(|&&t| t / 250 == quarter).count()));
        }
        assert!((0..1000).all(|t| seen.iter().filter(|&&s| s == t).count() <= 2));
        assert_eq!((timestep(0, 1000), timestep(1, 1000), timestep(2, 1000)), (0, 618, 236));
        assert_eq!((timestep(5, 1), timestep(usize::MAX, 10)), (0, 3));
    }

    #[test]
    fn an_untrained_model_predicts_nothing_and_the_batch_changes_no_bit() {
        // The last layer of a new model is zero: its error is the mean square of the noise, about 1.
        let (model, data) = (model(3), data(60));
        let settings = |batch| LossSettings { n: 60, repeats: 2, batch, ..LossSettings::default() };
        let found = denoising_loss(&model, &data, settings(7), &mut |_| {}).unwrap();
        let mut direct = 0.0;
        for (i, repeat) in (0..60u64).flat_map(|i| [(i, 0), (i, 1)]) {
            let mut noise = [0.0; 64];
            Philox::new(i, NOISE_STREAMS + repeat).fill_normal(&mut noise);
            direct += noise.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / (64.0 * 120.0);
        }
        assert!((found.mean - direct).abs() < 1e-12, "{found:?} {direct}");
        assert!((found.mean - 1.0).abs() < 4.0 * found.standard_error && found.standard_error < 0.03, "{found:?}");
        assert!(found.quartiles.iter().all(|q| (q - 1.0).abs() < 0.2));
        assert_eq!(found, denoising_loss(&model, &data, settings(60), &mut |_| {}).unwrap());
        let other = denoising_loss(&model, &data, LossSettings { seed: 9, ..settings(7) }, &mut |_| {}).unwrap();
        assert_ne!(found.mean, other.mean);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (model, set) = (model(2), data(6));
        let run =
            |data: &ImageSet, settings| denoising_loss(&model, data, settings, &mut |_| {}).unwrap_err().to_string();
        let all = LossSettings { n: 6, ..LossSettings::default() };
        assert!(run(&set, all).contains("fewer classes"));
        let two = ImageSet { class_names: vec!["a", "b"], labels: vec![0; 6], ..set.clone() };
        assert!(run(&two, LossSettings { n: 7, ..all }).contains("--n: number of images out of range; is 7"));
        assert!(run(&two, LossSettings { repeats: 0, ..all }).contains("--repeats"));
        let wide = ImageSet { width: 4, height: 16, ..two };
        assert!(run(&wide, all).contains("does not take the images"));
    }
}
