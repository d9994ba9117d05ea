//! The comparison before and after of a model that reads text: how near every stage stays to the base model, on pairs
//! that were kept back.
//!
//! All stages are asked the same: the same timesteps and noise for the losses, the same prompts and seeds for the
//! samples.

use super::assemble::Stage as ModelStage;
use super::evaluate::{Evaluated, Evaluation, Report, models};
use super::lookup::Lookup;
use super::run::RunFolder;
use super::text_source::TextData;
use crate::autograd::{Graph, Precision, Var};
use crate::error::Result;
use crate::eval::retrieval::Retrieval;
use crate::io::grid::{self, Layout};
use crate::io::png::{self, Image};
use crate::models::pipeline::{Components, Overrides};
use crate::models::pixart::PixArt;
use crate::models::sites::{SiteConfig, SiteModel};
use crate::models::vae::{Decoder, Given};
use crate::sample::pipeline::to_pixels;
use crate::sample::schedule::Schedule;
use crate::sample::text::{self, Request};
use crate::tensor::{Device, Tensor};
use crate::train::batches::Batches;
use crate::train::sites::{Draw, SiteLearner as _};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

/// Steps from which timesteps and noise are drawn: beyond every step of training and of held-out residuals.
const STEPS: u64 = 1 << 38;
/// Pictures of a sheet and of a row of it.
const PICTURES: usize = 32;
const COLUMNS: usize = 8;
/// Magnification of small pictures on a sheet.
const COMFORTABLE: usize = 64;
/// Latents computed together, so that a batch of large ones does not fill the memory.
const BATCH_VALUES: usize = 1 << 16;

/// How near a model is to the base model, and how well it denoises.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fidelity {
    /// Noised held-out pairs that were asked about.
    pub questions: usize,
    /// Mean diffusion loss on them.
    pub loss: f64,
    /// ‖ε̂ − ε̂₀‖₂ / ‖ε̂₀‖₂ of the predicted noise against the base model's; 0 is the base itself.
    pub prediction: f64,
    /// Samples that were drawn with equal prompts and seeds.
    pub samples: usize,
    /// ‖x − x₀‖₂ / ‖x₀‖₂ of the samples against the base model's.
    pub sample: f64,
    /// How pictures of captions that no training saw were found among real ones, where the plan names such.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retrieval: Option<Retrieval>,
}

/// What a model answers.
#[derive(Clone)]
struct Answers {
    loss: f64,
    /// Predicted noise of every batch.
    predictions: Vec<Vec<f32>>,
    /// `[n, C, h, w]`.
    samples: Tensor,
    seconds_per_image: f64,
    retrieval: Option<Retrieval>,
}

/// Measures the base and the models of a finished run, each against the base.
///
/// # Errors
/// A model or an autoencoder that cannot be read.
pub fn evaluate(run: &RunFolder, data: &TextData, device: &Device, report: &mut Report<'_>) -> Result<Evaluation> {
    let captions = run.plan.eval.captions.as_deref();
    let lookup = captions.map(|folder| Lookup::new(&run.plan, folder, device)).transpose()?;
    let exam = Exam { run, data, device, lookup };
    let decoder = exam.decoder()?;
    let folders = models(run);
    let work = exam.work();
    let (mut base, mut stages): (Option<Answers>, Vec<Evaluated>) = (None, Vec::new());
    let total = work * folders.len() as u64;
    for (index, (name, folder)) in folders.into_iter().enumerate() {
        let answers = exam.ask(&folder, &mut |done| report(index as u64 * work + done, total))?;
        let first = base.get_or_insert_with(|| answers.clone());
        stages.push(Evaluated {
            name,
            score: None,
            seconds_per_image: Some(answers.seconds_per_image),
            sheet: sheet(&answers.samples, decoder.as_ref(), exam.precision())?,
            fidelity: Some(exam.compare(&answers, first)?),
        });
    }
    Ok(Evaluation { real: None, stages })
}

struct Exam<'e> {
    run: &'e RunFolder,
    data: &'e TextData,
    device: &'e Device,
    lookup: Option<Lookup>,
}

impl Exam<'_> {
    fn precision(&self) -> Precision {
        self.run.plan.distill.dtype.into()
    }

    /// Samples drawn of each model: one of every pair kept back, unless the plan wants fewer.
    fn count(&self) -> usize {
        self.run.plan.eval.samples.min(self.data.held_out.len())
    }

    fn batch(&self) -> usize {
        self.run.plan.distill.batch.min(self.data.held_out.len())
    }

    fn work(&self) -> u64 {
        let looked_up = self.lookup.as_ref().map_or(0, |lookup| lookup.prompts.len());
        ((self.count() + looked_up) * self.run.plan.eval.steps) as u64
    }

    /// What turns latents into pictures; none where the latents are pictures, or nothing is there that could.
    fn decoder(&self) -> Result<Option<Decoder>> {
        if self.data.held_out.about.factor == 1 {
            return Ok(None);
        }
        let parts = Components::find(&self.run.plan.base, &Overrides::default())?;
        let given = Given { groups: None, scaling: None };
        parts.vae.as_deref().map(|vae| Decoder::load(vae, self.device, given)).transpose()
    }

    fn ask(&self, folder: &Path, report: &mut (dyn FnMut(u64) + Send)) -> Result<Answers> {
        let model = PixArt::load(folder, self.device)?;
        let (loss, predictions) = self.denoise(&model)?;
        let start = Instant::now();
        let held_out = &self.data.held_out;
        let prompts = (0..self.count()).map(|i| held_out.text(i, self.device)).collect::<Result<_>>()?;
        let samples = self.sample(&model, prompts, &held_out.null(self.device)?, report)?;
        let seconds_per_image = start.elapsed().as_secs_f64() / self.count().max(1) as f64;
        let retrieval = match &self.lookup {
            None => None,
            Some(lookup) => {
                let before = (self.count() * self.run.plan.eval.steps) as u64;
                let mut later = |done| report(before + done);
                Some(lookup.find(&self.sample(&model, lookup.prompts.clone(), &lookup.null, &mut later)?)?)
            }
        };
        self.device.trim();
        Ok(Answers { loss, predictions, samples, seconds_per_image, retrieval })
    }

    fn denoise(&self, model: &PixArt) -> Result<(f64, Vec<Vec<f32>>)> {
        let (settings, schedule) = (&self.run.plan.distill, Schedule::default());
        let mut batches = Batches::new(&self.data.held_out, self.batch(), settings.seed)?;
        let [channels, side] = model.config.picture();
        let (mut loss, mut predictions) = (0.0, Vec::new());
        for i in 0..settings.held_out {
            let draw = Draw { schedule: &schedule, dropout: 0.0, seed: settings.seed, step: STEPS + i };
            let noised = model.noised(&self.data.held_out, batches.chosen(i), &draw)?;
            let g = Graph::inference(self.precision());
            let x = Var::constant(noised.x_t.clone());
            let out = model.predict(&g, &x, &noised.t, &noised.condition, false, None)?;
            loss += f64::from(noised.loss(&g, &out, model.config.learns_variance())?.tensor().values()?[0]);
            let (all, noise) = (out.tensor().values()?, channels * side * side);
            let images = all.chunks(all.len() / out.dim(0).max(1));
            predictions.push(images.flat_map(|image| image[..noise].iter().copied()).collect());
        }
        Ok((loss / settings.held_out.max(1) as f64, predictions))
    }

    fn sample(
        &self,
        model: &PixArt,
        prompts: Vec<Tensor>,
        null: &Tensor,
        report: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Tensor> {
        let (settings, held_out) = (&self.run.plan.eval, &self.data.held_out);
        let nulls = vec![null.clone(); prompts.len()];
        let [channels, height, width] = held_out.about.latent;
        let request = Request {
            sampler: settings.sampler.parse()?,
            steps: settings.steps,
            guidance: settings.guidance,
            batch: (BATCH_VALUES / (channels * height * width)).max(1),
            precision: self.precision(),
            factor: held_out.about.factor,
            prediction: held_out.about.prediction,
            ..Request::new(prompts, nulls, [height, width], settings.seed)
        };
        text::generate(model, &request, &mut |p, _| {
            report((p.images * settings.steps + p.batch * p.step) as u64);
            Ok(())
        })
    }

    fn compare(&self, answers: &Answers, base: &Answers) -> Result<Fidelity> {
        let pairs = answers.predictions.iter().flatten().zip(base.predictions.iter().flatten());
        let prediction = relative(pairs.map(|(a, b)| (*a, *b)));
        let (own, theirs) = (answers.samples.values()?, base.samples.values()?);
        Ok(Fidelity {
            questions: self.batch() * self.run.plan.distill.held_out as usize,
            loss: answers.loss,
            prediction,
            samples: self.count(),
            sample: relative(own.iter().copied().zip(theirs.iter().copied())),
            retrieval: answers.retrieval,
        })
    }
}

/// ‖a − b‖₂ / ‖b‖₂.
fn relative(pairs: impl Iterator<Item = (f32, f32)>) -> f64 {
    let (mut error, mut size) = (0.0, 0.0);
    for (a, b) in pairs {
        error += f64::from(a - b).powi(2);
        size += f64::from(b).powi(2);
    }
    if error == 0.0 { 0.0 } else { (error / size).sqrt() }
}

/// The first samples as a PNG sheet; empty where latents cannot be shown.
fn sheet(samples: &Tensor, decoder: Option<&Decoder>, precision: Precision) -> Result<Vec<u8>> {
    let (n, channels) = (samples.dim(0).min(PICTURES), samples.dim(1));
    let each = samples.len() / samples.dim(0).max(1);
    let shape = [n, channels, samples.dim(2), samples.dim(3)];
    let first = Tensor::from_f32(samples.device(), &shape, &samples.values()?[..n * each])?;
    let pictures = match decoder {
        Some(decoder) => decoder.decode(&first, precision, &mut |_, _| {})?,
        None if [1, 3].contains(&channels) => first,
        None => return Ok(Vec::new()),
    };
    let (channels, height, width) = (pictures.dim(1), pictures.dim(2), pictures.dim(3));
    let pixels = to_pixels(&pictures)?;
    let images: Vec<Image> = pixels
        .chunks(channels * height * width)
        .map(|p| Image::new(width, height, channels, p.to_vec()))
        .collect::<Result<_>>()?;
    let upscale = (COMFORTABLE / height.max(1)).clamp(1, 8);
    png::encode(&grid::grid(&images, &Layout { upscale, ..Layout::new(COLUMNS) })?, &BTreeMap::new())
}

/// Header and rows of a table of stages; nothing where none was measured like this.
pub(super) fn table(stages: &[Evaluated]) -> Option<(Vec<String>, Vec<Vec<String>>)> {
    let measured: Vec<(&Evaluated, Fidelity)> = stages.iter().filter_map(|s| Some((s, s.fidelity?))).collect();
    let found = measured.first()?.1.retrieval.is_some();
    let mut header = vec!["model", "held-out loss", "prediction", "samples"];
    if found {
        header.extend(["own picture nearest", "candidates nearer"]);
    }
    header.push("time a sample");
    let row = |(stage, fidelity): &(&Evaluated, Fidelity)| {
        let name = match stage.name == ModelStage::Random.name() {
            true => "new operators at random (control)".to_string(),
            false => stage.name.clone(),
        };
        let numbers = [fidelity.loss, fidelity.prediction, fidelity.sample].map(|number| format!("{number:.4}"));
        let mut row: Vec<String> = [name].into_iter().chain(numbers).collect();
        if let Some(retrieval) = fidelity.retrieval {
            row.extend([retrieval.first, retrieval.nearer].map(|share| format!("{:.1} %", 100.0 * share)));
        }
        row.push(stage.seconds_per_image.map_or(String::new(), |s| format!("{s:.2} s")));
        row
    };
    Some((header.into_iter().map(String::from).collect(), measured.iter().map(row).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_relative_to_the_base() {
        assert!((relative([(1.0, 2.0), (2.0, 2.0)].into_iter()) - (1.0f64 / 8.0).sqrt()).abs() < 1e-12);
        assert_eq!(relative([(0.0, 0.0)].into_iter()), 0.0);
        assert!(relative([(f32::NAN, 1.0)].into_iter()).is_nan());
    }
}
