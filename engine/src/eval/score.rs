//! Scores of generated images against real ones, in the feature space of the small classifier.
//!
//! A Fréchet distance from n samples is biased upwards by an amount that depends on n, so it means nothing alone:
//! beside it stands the same distance for n real images that the reference does not contain, over [`SPLITS`] splits.
//! Whether an edited model is still good is judged from both: see [`Baseline::accepts`].
//!
//! Each feature is divided by its standard deviation over the reference first. Otherwise a few features that vary
//! most would make up the distance, and their rare large values its noise.

use crate::error::{Error, Result};
use crate::eval::classifier::{Classifier, FEATURES, Reading};
use crate::eval::distances::{NEIGHBOURS, distances, order};
use crate::eval::frechet::Moments;
use crate::eval::kid::Subsets;
use crate::io::datasets::ImageSet;
use crate::io::pictures::Pictures;
use crate::tensor::{Device, Tensor};
use crate::train::batches;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Splits of the held-out real images.
pub const SPLITS: usize = 5;
/// Subsets of the kernel distance, each of at most this many images of either set.
const KID_SUBSETS: usize = 50;
const KID_SIZE: usize = 200;
/// Least deviation of a feature that it is divided by, relative to the largest: a unit that hardly ever responds to
/// real images must not outweigh all others.
const LEAST_DEVIATION: f64 = 0.01;
/// Random streams of the splits.
const SPLIT_STREAMS: u64 = 6 << 40;

/// Quality of a set of images.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Images scored.
    pub n: usize,
    /// Squared Fréchet distance to the reference; lower is better.
    pub frechet: f64,
    /// Kernel distance to the reference, unbiased, so it may be negative; lower is better.
    pub kid: f64,
    /// Fraction of the images inside the support of as many reference images.
    pub precision: f64,
    /// Fraction of as many reference images inside the support of the images.
    pub recall: f64,
    /// Fraction of the images that the classifier takes for the class they were asked to be; NaN where nobody asked.
    pub agreement: f64,
}

/// The scores of real images that the reference does not contain: what a perfect model would get.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// Mean over the splits.
    pub mean: Score,
    /// Standard deviation over the splits (denominator: splits less one); `n` is that of the mean.
    pub sd: Score,
    /// Splits.
    pub splits: usize,
    /// Whether no image is in two splits. Where images are shared, `sd` comes out somewhat small.
    pub disjoint: bool,
}

impl Baseline {
    /// Whether a model of Fréchet distance `after` is as good as the model it was made from, of distance `before`:
    /// its excess over real images is at most a quarter larger, two standard deviations of the measurement allowed.
    pub fn accepts(&self, before: f64, after: f64) -> bool {
        after - self.mean.frechet <= self.allowed(before)
    }

    /// The largest excess over real images that [`Baseline::accepts`] admits.
    pub fn allowed(&self, before: f64) -> f64 {
        1.25 * (before - self.mean.frechet) + 2.0 * self.sd.frechet
    }
}

/// Real images that samples are compared with, as the classifier sees them.
#[derive(Debug)]
pub struct Reference {
    /// In units of the deviations, as `moments`.
    reading: Reading,
    moments: Moments,
    /// What each feature is multiplied by.
    scale: Vec<f32>,
    seed: u64,
}

impl Reference {
    /// Reads all images of a set. `seed` chooses subsets wherever one is drawn.
    ///
    /// # Errors
    /// Images that the classifier does not take, or fewer than two.
    pub fn new(classifier: &Classifier, data: &ImageSet, seed: u64) -> Result<Reference> {
        Self::of_reading(read_set(classifier, data)?.0, seed)
    }

    /// As [`Reference::new`], of pictures without labels.
    ///
    /// # Errors
    /// As [`Reference::new`].
    pub fn of_pictures(classifier: &Classifier, pictures: &Pictures, seed: u64) -> Result<Reference> {
        Self::of_reading(read_pictures(classifier, pictures)?, seed)
    }

    fn of_reading(reading: Reading, seed: u64) -> Result<Reference> {
        let moments = Moments::from_features(&reading.features("reference")?);
        let deviations: Vec<f64> = (0..FEATURES).map(|i| moments.covariance()[i * (FEATURES + 1)].sqrt()).collect();
        let least = LEAST_DEVIATION * deviations.iter().fold(0.0f64, |m, &d| m.max(d));
        // Equal images give equal features up to the rounding of their mean.
        if least < 1e-9 {
            return Err(Error::failure("reference", "all images look the same").must("images that differ"));
        }
        let scale: Vec<f32> = deviations.iter().map(|d| (1.0 / d.max(least)) as f32).collect();
        let reading = scaled(&reading, &scale);
        let moments = Moments::from_features(&reading.features("reference")?);
        Ok(Reference { reading, moments, scale, seed })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.reading.len()
    }

    /// Never true; present because a length is.
    pub fn is_empty(&self) -> bool {
        self.reading.is_empty()
    }

    /// Scores of images that were asked to be of the classes `labels`; no label where nobody asked.
    ///
    /// # Errors
    /// Too few images (at least 5), more than the reference has, or labels that do not fit them.
    pub fn score(&self, samples: &Reading, labels: &[i32]) -> Result<Score> {
        let n = samples.len();
        if !(NEIGHBOURS + 2..=self.len()).contains(&n) {
            return Err(Error::usage("--n", "number of images out of range").is(n).must(format!(
                "{} to {}, as many as the reference has",
                NEIGHBOURS + 2,
                self.len()
            )));
        }
        let own = scaled(samples, &self.scale);
        let (generated, reference) = (own.features("samples")?, self.reading.features("reference")?);
        let subsets = Subsets { count: KID_SUBSETS, size: n.min(KID_SIZE), seed: self.seed };
        let found = distances(&reference, &self.moments, &generated, subsets)?;
        Ok(Score {
            n,
            frechet: found.frechet,
            kid: found.kid,
            precision: found.precision,
            recall: found.recall,
            agreement: if labels.is_empty() { f64::NAN } else { samples.agreement(labels)? },
        })
    }

    /// Scores of real images outside the reference, over [`SPLITS`] random subsets of `n`.
    ///
    /// The subsets are consecutive parts of one shuffle where `held_out` has enough images for that; otherwise each
    /// is drawn on its own, without replacement, and two of them may share images.
    ///
    /// # Errors
    /// Fewer than `n` images, or as [`Reference::score`].
    pub fn baseline(&self, classifier: &Classifier, held_out: &ImageSet, n: usize) -> Result<Baseline> {
        let (reading, labels) = read_set(classifier, held_out)?;
        let disjoint = n.saturating_mul(SPLITS) <= reading.len();
        if n > reading.len() {
            return Err(Error::usage("--n", "more images than held-out real ones")
                .is(n)
                .must(format!("at most {}", reading.len())));
        }
        let scores = (0..SPLITS).map(|split| {
            let (stream, start) = if disjoint { (0, split * n) } else { (split as u64, 0) };
            let chosen = &order(reading.len(), self.seed, SPLIT_STREAMS + stream)[start..start + n];
            let labels: Vec<i32> = chosen.iter().map(|&i| labels[i as usize]).collect();
            self.score(&reading.select(chosen), &labels)
        });
        let scores = scores.collect::<Result<Vec<_>>>()?;
        let (mean, sd) = Score::summary(&scores);
        Ok(Baseline { mean, sd, splits: SPLITS, disjoint })
    }

    /// Scores `n` samples of a model, classes in turn. `draw` makes images `[B, 1, 28, 28]` of the given labels, the
    /// first one from `seed`; samples are rounded to bytes, as the real images are.
    ///
    /// # Errors
    /// Those of `draw`, and as [`Reference::score`].
    pub fn score_samples(
        &self,
        classifier: &Classifier,
        n: usize,
        seed: u64,
        draw: &mut dyn FnMut(&[i32], u64) -> Result<Tensor>,
    ) -> Result<Score> {
        let labels: Vec<i32> = (0..n).map(|i| (i % classifier.classes()) as i32).collect();
        let images = rounded(&draw(&labels, seed)?)?;
        self.score(&classifier.read(&images)?, &labels)
    }
}

impl Score {
    /// Mean, and standard deviation with one less in the denominator (0 of a single score), of at least one score.
    pub fn summary(scores: &[Score]) -> (Score, Score) {
        (combine(scores, |v| mean_sd(v).0), combine(scores, |v| mean_sd(v).1))
    }
}

/// Mean and standard deviation (denominator: one less) of at least one value.
pub fn mean_sd(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let squares = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>();
    (mean, (squares / values.len().saturating_sub(1).max(1) as f64).sqrt())
}

/// What the classifier says of pictures.
///
/// # Errors
/// Pictures that the classifier does not take.
pub fn read_pictures(classifier: &Classifier, pictures: &Pictures) -> Result<Reading> {
    const CHUNK: usize = 1000;
    let mut reading = Reading { features: Vec::new(), classes: Vec::new() };
    for start in (0..pictures.n).step_by(CHUNK) {
        let images = tensor(classifier.device(), pictures, start..pictures.n.min(start + CHUNK))?;
        let part = classifier.read(&images)?;
        reading.features.extend(part.features);
        reading.classes.extend(part.classes);
    }
    Ok(reading)
}

/// Pictures `range` as `[n, C, H, W]` in [−1, 1].
///
/// # Errors
/// When memory runs out.
pub fn tensor(device: &Device, pictures: &Pictures, range: Range<usize>) -> Result<Tensor> {
    let (c, area) = (pictures.channels, pictures.height * pictures.width);
    let mut images = device.empty(&[range.len(), c, pictures.height, pictures.width])?;
    for (image, index) in images.f32s_mut()?.chunks_mut(c * area).zip(range) {
        let source = pictures.image(index);
        for (at, value) in image.iter_mut().enumerate() {
            *value = f32::from(source[at % area * c + at / area]) / 127.5 - 1.0;
        }
    }
    Ok(images)
}

/// A reading with each feature multiplied by its factor.
fn scaled(reading: &Reading, scale: &[f32]) -> Reading {
    let rows = reading.features.chunks_exact(scale.len());
    let features = rows.flat_map(|row| row.iter().zip(scale).map(|(x, factor)| x * factor)).collect();
    Reading { features, classes: reading.classes.clone() }
}

/// Reads every image of a set, with its labels.
fn read_set(classifier: &Classifier, data: &ImageSet) -> Result<(Reading, Vec<i32>)> {
    let all: Vec<u32> = (0..data.n as u32).collect();
    let batch = batches::images(classifier.device(), data, &all)?;
    Ok((classifier.read(&batch.images)?, batch.labels))
}

/// Values cut to [−1, 1] and rounded to the 256 greys of a byte.
fn rounded(images: &Tensor) -> Result<Tensor> {
    let bytes = images.f32s()?.iter().map(|v| ((v + 1.0) * 127.5).round().clamp(0.0, 255.0) / 127.5 - 1.0);
    Tensor::from_f32(images.device(), images.shape().dims(), &bytes.collect::<Vec<_>>())
}

/// One number per metric out of several scores, which are at least one.
fn combine(scores: &[Score], reduce: impl Fn(&[f64]) -> f64) -> Score {
    let of = |metric: fn(&Score) -> f64| reduce(&scores.iter().map(metric).collect::<Vec<_>>());
    Score {
        n: scores[0].n,
        frechet: of(|s| s.frechet),
        kid: of(|s| s.kid),
        precision: of(|s| s.precision),
        recall: of(|s| s.recall),
        agreement: of(|s| s.agreement),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use graft_kernels::rng::Philox;

    /// Noise images in three classes of brightness.
    fn data(n: usize, seed: u64) -> ImageSet {
        let mut rng = Philox::new(seed, 0);
        let pixels = (0..n * 784).map(|i| (rng.below(100) + 70 * (i / 784 % 3) as u32) as u8).collect();
        let labels = (0..n).map(|i| (i % 3) as u8).collect();
        ImageSet { n, channels: 1, height: 28, width: 28, pixels, labels, class_names: vec!["dark", "grey", "light"] }
    }

    fn classifier() -> Classifier {
        Classifier::new(3, &Device::cpu(), 1).unwrap()
    }

    #[test]
    fn real_images_score_better_than_distorted_ones() {
        let (classifier, held_out) = (classifier(), data(120, 2));
        let reference = Reference::new(&classifier, &data(200, 1), 0).unwrap();
        let baseline = reference.baseline(&classifier, &held_out, 24).unwrap();
        assert!(baseline.disjoint && baseline.mean.n == 24 && baseline.splits == 5);
        assert!(baseline.sd.frechet > 0.0 && baseline.sd.frechet < baseline.mean.frechet);
        let images = batches::images(&Device::cpu(), &held_out, &(0..24).collect::<Vec<_>>()).unwrap().images;
        let draw = |scale: f32| {
            reference.score_samples(&classifier, 24, 0, &mut |labels, seed| {
                assert_eq!((labels.len(), &labels[..4], seed), (24, &[0, 1, 2, 0][..], 0));
                let values: Vec<f32> = images.f32s()?.iter().map(|v| v * scale).collect();
                Tensor::from_f32(&Device::cpu(), &[24, 1, 28, 28], &values)
            })
        };
        let (same, flat) = (draw(1.0).unwrap(), draw(0.2).unwrap());
        assert!(same.frechet < 2.0 * baseline.mean.frechet, "{same:?} {baseline:?}");
        assert!(
            flat.frechet > 1.5 * same.frechet && flat.kid > same.kid && flat.precision < same.precision,
            "{flat:?} {same:?}"
        );
        assert!(baseline.accepts(same.frechet, same.frechet) && !baseline.accepts(same.frechet, flat.frechet));
        // The whole of the larger set allows no disjoint splits any more.
        assert!(!reference.baseline(&classifier, &held_out, 60).unwrap().disjoint);
        assert_eq!(reference.baseline(&classifier, &held_out, 121).unwrap_err().exit_code(), 2);
        assert_eq!(reference.baseline(&classifier, &held_out, 4).unwrap_err().exit_code(), 2);
    }

    #[test]
    fn features_count_in_units_of_their_deviation() {
        let reference = Reference::new(&classifier(), &data(200, 1), 0).unwrap();
        let variances: Vec<f64> = (0..FEATURES).map(|i| reference.moments.covariance()[i * (FEATURES + 1)]).collect();
        assert!(variances.iter().all(|&v| v <= 1.0 + 1e-5), "{variances:?}");
        assert!(variances.iter().filter(|&&v| (v - 1.0).abs() < 1e-5).count() > FEATURES / 2, "{variances:?}");
        let reading = Reading { features: vec![3.0; 2 * FEATURES], classes: vec![0, 1] };
        assert_eq!(scaled(&reading, &[2.0; FEATURES]).features, [6.0; 2 * FEATURES]);
        let flat = ImageSet { pixels: vec![7; 3 * 784], ..data(3, 1) };
        assert_eq!(Reference::new(&classifier(), &flat, 0).unwrap_err().problem(), "all images look the same");
    }

    #[test]
    fn the_criterion_by_hand() {
        let score = |frechet| Score { n: 500, frechet, kid: 0.0, precision: 0.0, recall: 0.0, agreement: 0.0 };
        let baseline = Baseline { mean: score(2.0), sd: score(0.5), splits: 5, disjoint: true };
        // 1.25 · (6 − 2) + 2 · 0.5 = 6.
        assert_eq!(baseline.allowed(6.0), 6.0);
        assert!(baseline.accepts(6.0, 8.0) && !baseline.accepts(6.0, 8.01));
        // A starting model that beats held-out images leaves no room but the measurement's.
        assert!(baseline.accepts(2.0, 3.0) && !baseline.accepts(1.0, 2.0));
    }

    #[test]
    fn splits_are_averaged() {
        let score = |frechet| Score { n: 7, frechet, kid: -frechet, precision: 0.5, recall: 0.25, agreement: 1.0 };
        let (mean, sd) = Score::summary(&[score(1.0), score(3.0)]);
        assert_eq!(mean, Score { n: 7, frechet: 2.0, kid: -2.0, precision: 0.5, recall: 0.25, agreement: 1.0 });
        assert!((sd.frechet - 2f64.sqrt()).abs() < 1e-12 && sd.precision == 0.0);
        assert_eq!(mean_sd(&[5.0]), (5.0, 0.0));
    }

    #[test]
    fn pictures_are_read_as_the_data_set_they_are_of() {
        let (classifier, set) = (classifier(), data(12, 3));
        let pictures = Pictures::of_set(&set, 0..12).unwrap();
        assert_eq!(read_pictures(&classifier, &pictures).unwrap(), read_set(&classifier, &set).unwrap().0);
        assert!(Pictures::of_set(&set, 5..13).is_err());
        let colours = Pictures::new("x", [1, 1, 2, 3], vec![0, 51, 102, 153, 204, 255]).unwrap();
        let values = tensor(&Device::cpu(), &colours, 0..1).unwrap();
        let want = [0.0f32, 153.0, 51.0, 204.0, 102.0, 255.0].map(|v| v / 127.5 - 1.0);
        assert_eq!((values.shape().dims(), values.f32s().unwrap()), (&[1, 3, 1, 2][..], &want[..]));
        let reference = Reference::of_pictures(&classifier, &pictures, 0).unwrap();
        let reading = read_pictures(&classifier, &pictures).unwrap();
        assert!(reference.score(&reading, &[]).unwrap().agreement.is_nan());
    }

    #[test]
    fn samples_are_rounded_to_bytes() {
        let t = Tensor::from_f32(&Device::cpu(), &[1, 4], &[-3.0, 3.0, 0.0, 0.001]).unwrap();
        let want = [-1.0, 1.0, 128.0 / 127.5 - 1.0, 128.0 / 127.5 - 1.0];
        assert_eq!(rounded(&t).unwrap().f32s().unwrap(), want);
    }
}
