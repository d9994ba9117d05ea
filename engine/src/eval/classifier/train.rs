//! Training of the classifier: shuffled epochs, images shifted by a few pixels, AdamW, averaged weights at the end.

use super::Classifier;
use crate::autograd::{Graph, Precision};
use crate::error::{Error, Result};
use crate::io::datasets::ImageSet;
use crate::ops::contracts;
use crate::tensor::{Device, Tensor};
use crate::train::batches::Batches;
use crate::train::optimizer::{AdamW, AdamWSettings, LrSchedule};
use graft_kernels::rng::Philox;
use std::ops::ControlFlow;

/// Random streams of the shifts, one per step.
const SHIFT_STREAMS: u64 = 4 << 40;

/// How a classifier is trained; every result is a function of these and the data.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Passes over the data.
    pub epochs: u64,
    /// Images per update.
    pub batch: usize,
    /// Seed of weights, order and shifts.
    pub seed: u64,
    /// Largest shift of an image in pixels, along each axis.
    pub shift: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Arithmetic of products.
    pub precision: Precision,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { epochs: 6, batch: 128, seed: 0, shift: 1, lr: 2e-3, precision: Precision::F32 }
    }
}

/// A word to the caller after each update.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Updates done.
    pub step: u64,
    /// Updates in all.
    pub steps: u64,
    /// Cross-entropy of the update's batch, in nats.
    pub loss: f64,
}

/// Trains a classifier on grey images of 28 x 28; the result has the moving average of the weights.
///
/// # Errors
/// Images of another shape, settings out of range, a loss that is not finite, or "stopped" when `report` breaks.
pub fn train(
    data: &ImageSet,
    device: &Device,
    settings: Settings,
    report: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Classifier> {
    let mut classifier = Classifier::new(data.class_names.len(), device, settings.seed)?;
    let optimiser = AdamWSettings {
        lr: settings.lr,
        weight_decay: 0.05,
        warmup: 200,
        schedule: LrSchedule::Cosine,
        clip: 1.0,
        ema: 0.998,
        ..AdamWSettings::default()
    };
    let mut optimiser = AdamW::new(optimiser, &classifier.params)?;
    let mut batches = Batches::new(data, settings.batch, settings.seed)?;
    let steps = settings.epochs * batches.per_epoch();
    for step in 0..steps {
        let batch = batches.get(device, step)?;
        let mut rng = Philox::new(settings.seed, SHIFT_STREAMS + step);
        let images = shifted(&batch.images, settings.shift, &mut rng)?;
        let labels = Tensor::from_i32(device, &[batch.labels.len()], &batch.labels)?;
        let (loss, grads) = {
            let g = Graph::training(settings.precision);
            let tokens = classifier.tokens(&g, &images)?;
            let logits = classifier.logits(&g, &tokens)?;
            let loss = g.cross_entropy(&logits, &labels, contracts::cross_entropy::Params {})?;
            (f64::from(loss.tensor().f32s()?[0]), g.backward(&loss)?)
        };
        if !loss.is_finite() {
            return Err(Error::failure(format!("step {step}"), "the loss is not finite").is(loss).fix("lower --lr"));
        }
        let lr = optimiser.settings.lr_at(step, steps);
        optimiser.update(&mut classifier.params, &grads, lr)?;
        if report(Progress { step: step + 1, steps, loss }).is_break() {
            return Err(Error::failure("training", "stopped"));
        }
    }
    for slot in optimiser.slots() {
        if let Some(average) = &slot.ema {
            let shape = classifier.params.get(slot.id).value.shape();
            classifier.params.set(slot.id, average.copy()?.into_shape(shape.dims())?)?;
        }
    }
    Ok(classifier)
}

/// Moves each image of `[B, 1, H, W]` by up to `most` pixels along each axis; what comes into view is black (−1).
fn shifted(images: &Tensor, most: usize, rng: &mut Philox) -> Result<Tensor> {
    let (h, w) = (images.dim(2), images.dim(3));
    let mut out = images.device().empty(images.shape().dims())?;
    let pairs = out.f32s_mut()?.chunks_exact_mut(h * w).zip(images.f32s()?.chunks_exact(h * w));
    for (target, source) in pairs {
        let mut draw = || rng.below(2 * most as u32 + 1) as isize - most as isize;
        let (down, right) = (draw(), draw());
        for (y, row) in target.chunks_exact_mut(w).enumerate() {
            for (x, value) in row.iter_mut().enumerate() {
                let from = (y.checked_add_signed(-down), x.checked_add_signed(-right));
                *value = match from {
                    (Some(y), Some(x)) if y < h && x < w => source[y * w + x],
                    _ => -1.0,
                };
            }
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shifts_move_and_fill_with_black() {
        let device = Device::cpu();
        let mut pixels = [0.0; 5 * 5];
        pixels[12] = 1.0;
        let image = Tensor::from_f32(&device, &[64, 1, 5, 5], &pixels.repeat(64)).unwrap();
        let out = shifted(&image, 1, &mut Philox::new(1, 0)).unwrap();
        let mut places = std::collections::BTreeSet::new();
        for image in out.f32s().unwrap().chunks(25) {
            let at = image.iter().position(|&v| v == 1.0).unwrap();
            let (down, right) = (at as isize / 5 - 2, at as isize % 5 - 2);
            assert!(down.abs() <= 1 && right.abs() <= 1);
            places.insert(at);
            // Rows and columns that came into view are black, the others keep their grey.
            let black = image.iter().filter(|&&v| v == -1.0).count();
            assert_eq!(black as isize, 25 - (5 - down.abs()) * (5 - right.abs()));
        }
        assert_eq!(places.len(), 9);
        assert_eq!(shifted(&image, 0, &mut Philox::new(1, 0)).unwrap().f32s().unwrap(), image.f32s().unwrap());
    }

    /// Three classes that differ in where the light is.
    fn toy(n: usize) -> ImageSet {
        let image =
            |i: usize| (0..784).map(move |p| if p / 28 / 10 == i % 3 { 200 } else { (p * 7 + i * 31) as u8 % 64 });
        ImageSet {
            n,
            channels: 1,
            height: 28,
            width: 28,
            pixels: (0..n).flat_map(image).collect(),
            labels: (0..n).map(|i| (i % 3) as u8).collect(),
            class_names: vec!["top", "middle", "bottom"],
        }
    }

    #[test]
    fn a_simple_task_is_learnt_the_same_way_each_time() {
        let (device, data) = (Device::cpu(), toy(48));
        let settings = Settings { epochs: 10, batch: 16, shift: 1, ..Settings::default() };
        let run = || {
            let mut losses = Vec::new();
            let trained = train(&data, &device, settings, &mut |p| {
                losses.push(p.loss);
                ControlFlow::Continue(())
            });
            (trained.unwrap(), losses)
        };
        let (first, losses) = run();
        assert_eq!(losses.len(), 30);
        assert!(losses[0] > 0.8 && losses[29] < 0.3, "{losses:?}");
        let (second, same) = run();
        assert_eq!(losses, same);
        let values =
            |c: &Classifier| -> Vec<f32> { c.params.iter().flat_map(|(_, p)| p.value.to_vec().unwrap()).collect() };
        assert_eq!(values(&first), values(&second));
    }

    #[test]
    fn a_caller_may_stop_it() {
        let stopped = train(&toy(6), &Device::cpu(), Settings { batch: 6, ..Settings::default() }, &mut |_| {
            ControlFlow::Break(())
        });
        assert_eq!(stopped.unwrap_err().problem(), "stopped");
    }
}
