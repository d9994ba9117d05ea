//! The comparison before and after: samples of the same seeds and labels from every stage, scored and side by side.

use super::assemble::Stage as ModelStage;

use super::fidelity::Fidelity;
use super::run::{RunData, RunFolder};
use super::settings::EvalConfig;
use crate::autograd::Precision;
use crate::error::{Error, Result};
use crate::eval::classifier::Classifier;
use crate::eval::score::{Baseline, Reference, Score};
use crate::io::grid::{self, Layout};
use crate::io::png::{self, Image};
use crate::models::dit::{self, Dit};

use crate::sample::pipeline::{Request, generate, to_pixels};
use crate::tensor::{Device, Tensor};

use serde::Serialize;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

/// Images computed together: enough to fill the processor, few enough for a laptop's memory.
const BATCH: usize = 50;
/// Pictures of each class in the report, and most classes shown.
const PICTURES: usize = 8;
const CLASSES: usize = 10;
/// Magnification of small pictures on a sheet.
const COMFORTABLE: usize = 64;

/// Scores of every stage.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// Real images against the reference, where a classifier was given.
    pub real: Option<Baseline>,
    /// The stages in order, the base first.
    pub stages: Vec<Evaluated>,
}

/// One stage, sampled.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluated {
    /// `original`, `random`, `distilled` or `finetuned`.
    pub name: String,
    /// Scores of its samples.
    pub score: Option<Score>,
    /// Seconds per scored image.
    pub seconds_per_image: Option<f64>,
    /// Pictures, as a PNG sheet; empty where they cannot be shown.
    #[serde(skip)]
    pub sheet: Vec<u8>,
    /// How near the model is to the base, where it reads text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fidelity: Option<Fidelity>,
}

/// Says how far the sampling is: (steps done, steps in all).
pub type Report<'r> = dyn FnMut(u64, u64) + Send + 'r;

/// A classifier with what it has read of the real images.
pub struct Scorer {
    classifier: Classifier,
    reference: Reference,
    /// Scores of real images that the reference does not contain.
    pub baseline: Baseline,
}

impl Scorer {
    /// The scorer that a plan asks for; none where it names no classifier.
    ///
    /// # Errors
    /// A classifier that cannot be read, images that it does not take, or fewer of them than samples.
    pub fn new(settings: &EvalConfig, data: &RunData, device: &Device) -> Result<Option<Scorer>> {
        let Some(folder) = &settings.classifier else { return Ok(None) };
        let classifier = Classifier::load(folder, device)?;
        let reference = Reference::new(&classifier, &data.train, settings.seed)?;
        let baseline = reference.baseline(&classifier, &data.held_out, settings.samples)?;
        Ok(Some(Scorer { classifier, reference, baseline }))
    }
}

/// Draws samples of models and scores them, all in the same way.
pub struct Evaluator<'e> {
    /// Sampler, steps, guidance, number of samples and seed.
    pub settings: &'e EvalConfig,
    /// Arithmetic of products.
    pub precision: Precision,
    /// Images that the models make.
    pub data: &'e RunData,
    /// What scores; none where only pictures are wanted.
    pub scorer: Option<&'e Scorer>,
}

impl Evaluator<'_> {
    fn shown(&self) -> usize {
        self.data.class_count().min(CLASSES) * PICTURES
    }

    /// Sampling steps that a model takes, images times steps.
    pub fn work(&self) -> u64 {
        let scored = if self.scorer.is_some() { self.settings.samples } else { 0 };
        ((scored + self.shown()) * self.settings.steps) as u64
    }

    /// Samples and scores one model; `report` hears the sampling steps done.
    ///
    /// # Errors
    /// A model that does not make the images of the data set.
    pub fn model(&self, name: &str, model: &Dit, report: &mut (dyn FnMut(u64) + Send)) -> Result<Evaluated> {
        fits(model, self.data)?;
        let settings = self.settings;
        let mut done = 0;
        let mut draw = |labels: &[i32], seed: u64, guidance: f64| -> Result<Tensor> {
            let request = Request {
                sampler: settings.sampler.parse()?,
                steps: settings.steps,
                guidance,
                batch: BATCH,
                precision: self.precision,
                ..Request::new(labels.to_vec(), seed)
            };
            let before = done;
            generate(model, &request, &mut |p| {
                done = before + (p.images * settings.steps + p.batch * p.step) as u64;
                report(done);
            })
        };
        let start = Instant::now();
        let score = match self.scorer {
            None => None,
            Some(s) => Some(s.reference.score_samples(
                &s.classifier,
                settings.samples,
                settings.seed,
                &mut |labels, seed| draw(labels, seed, settings.guidance),
            )?),
        };
        let seconds = start.elapsed().as_secs_f64() / settings.samples.max(1) as f64;
        let labels: Vec<i32> = (0..self.shown()).map(|i| (i / PICTURES) as i32).collect();
        let pictures = draw(&labels, settings.seed, settings.picture_guidance)?;
        let sheet = sheet(&pictures, self.data)?;
        Ok(Evaluated {
            name: name.to_string(),
            score,
            seconds_per_image: score.map(|_| seconds),
            sheet,
            fidelity: None,
        })
    }
}

/// Samples the base and the models of a finished run, and scores them where the plan names a classifier.
///
/// # Errors
/// A model or classifier that cannot be read, or a model that does not make the images of the data set.
pub fn evaluate(run: &RunFolder, data: &RunData, device: &Device, report: &mut Report<'_>) -> Result<Evaluation> {
    let settings = &run.plan.eval;
    let scorer = Scorer::new(settings, data, device)?;
    let precision = Precision::from(run.plan.distill.dtype);
    let evaluator = Evaluator { settings, precision, data, scorer: scorer.as_ref() };
    let models = models(run);
    let (each, total) = (evaluator.work(), evaluator.work() * models.len() as u64);
    let mut stages = Vec::with_capacity(models.len());
    for (index, (name, folder)) in models.into_iter().enumerate() {
        let model = dit::load(&folder, device)?;
        stages.push(evaluator.model(&name, &model, &mut |done| report(index as u64 * each + done, total))?);
    }
    Ok(Evaluation { real: scorer.map(|s| s.baseline), stages })
}

/// The models of a run in the order of the method, those that are there.
pub(super) fn models(run: &RunFolder) -> Vec<(String, PathBuf)> {
    let mut found = vec![("original".to_string(), run.plan.base.clone())];
    for stage in [ModelStage::Random, ModelStage::Distilled, ModelStage::Finetuned] {
        if run.has(stage) {
            found.push((stage.name().to_string(), run.model_folder(stage)));
        }
    }
    found
}

fn fits(model: &Dit, data: &RunData) -> Result<()> {
    let (c, d) = (&model.config, &data.train);
    if (c.in_channels, c.input_size) == (d.channels, d.height) && c.classes == data.class_count() {
        return Ok(());
    }
    Err(Error::failure("eval", "the model does not make the images of the data set")
        .is(format!("{} channels of {1} x {1} in {2} classes", c.in_channels, c.input_size, c.classes))
        .must(format!("{} channels of {1} x {1} in {2} classes", d.channels, d.height, data.class_count())))
}

fn sheet(images: &Tensor, data: &RunData) -> Result<Vec<u8>> {
    let (side, channels) = (images.dim(2), images.dim(1));
    let pixels = to_pixels(images)?;
    let pictures: Vec<Image> = pixels
        .chunks(side * side * channels)
        .map(|p| Image::new(side, side, channels, p.to_vec()))
        .collect::<Result<_>>()?;
    let names = &data.train.class_names;
    let row_captions = names.iter().take(CLASSES).map(|name| name.to_string()).collect();
    let upscale = (COMFORTABLE / side).clamp(1, 8);
    let sheet = grid::grid(&pictures, &Layout { upscale, row_captions, ..Layout::new(PICTURES) })?;
    png::encode(&sheet, &BTreeMap::new())
}
