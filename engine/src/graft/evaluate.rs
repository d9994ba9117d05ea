//! The comparison before and after: samples of the same seeds and labels from every stage, scored and side by side.

use super::assemble::Stage as ModelStage;
use super::distill::HELD_OUT_LOG;
use super::run::{RunData, RunFolder};
use super::summary::{Summary, read_log};
use crate::autograd::Precision;
use crate::error::{Error, Result};
use crate::eval::classifier::Classifier;
use crate::eval::score::{Baseline, Reference, Score};
use crate::io::grid::{self, Layout};
use crate::io::png::{self, Image};
use crate::models::dit::{self, Dit};
use crate::report::chart::{LineChart, Series};
use crate::report::graft_run::{Cost, Figure, GraftRun, SiteResidual, Stage, Unit};
use crate::sample::pipeline::{Request, generate, to_pixels};
use crate::tensor::{Device, Tensor};
use crate::train::trainer::LOSS_LOG;
use serde::Serialize;
use serde_json::Value;
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
    /// Pictures, as a PNG sheet.
    #[serde(skip)]
    pub sheet: Vec<u8>,
}

/// Says how far the sampling is: (steps done, steps in all).
pub type Report<'r> = dyn FnMut(u64, u64) + Send + 'r;

struct Scorer {
    classifier: Classifier,
    reference: Reference,
    baseline: Baseline,
}

/// Samples the base and the models of a finished run, and scores them where the plan names a classifier.
///
/// # Errors
/// A model or classifier that cannot be read, or a model that does not make the images of the data set.
pub fn evaluate(run: &RunFolder, data: &RunData, device: &Device, report: &mut Report<'_>) -> Result<Evaluation> {
    let settings = &run.plan.eval;
    let scorer = match &settings.classifier {
        None => None,
        Some(folder) => {
            let classifier = Classifier::load(folder, device)?;
            let reference = Reference::new(&classifier, &data.train, settings.seed)?;
            let baseline = reference.baseline(&classifier, &data.held_out, settings.samples)?;
            Some(Scorer { classifier, reference, baseline })
        }
    };
    let stages = models(run);
    let shown = data.class_count().min(CLASSES) * PICTURES;
    let scored = if scorer.is_some() { settings.samples } else { 0 };
    let total = ((scored + shown) * settings.steps * stages.len()) as u64;
    let mut done = 0;
    let mut evaluated = Vec::new();
    for (name, folder) in stages {
        let model = dit::load(&folder, device)?;
        fits(&model, data)?;
        let mut draw = |labels: &[i32], seed: u64, guidance: f64| -> Result<Tensor> {
            let request = Request {
                sampler: settings.sampler.parse()?,
                steps: settings.steps,
                guidance,
                batch: BATCH,
                precision: Precision::from(run.plan.distill.dtype),
                ..Request::new(labels.to_vec(), seed)
            };
            let before = done;
            let images = generate(&model, &request, &mut |p| {
                done = before + (p.images * settings.steps + p.batch * p.step) as u64;
                report(done, total);
            })?;
            Ok(images)
        };
        let start = Instant::now();
        let score = match &scorer {
            None => None,
            Some(s) => Some(s.reference.score_samples(&s.classifier, settings.samples, &mut |labels, seed| {
                draw(labels, seed, settings.guidance)
            })?),
        };
        let seconds = start.elapsed().as_secs_f64() / settings.samples.max(1) as f64;
        let labels: Vec<i32> = (0..shown).map(|i| (i / PICTURES) as i32).collect();
        let pictures = draw(&labels, settings.seed, settings.picture_guidance)?;
        let sheet = sheet(&pictures, data)?;
        evaluated.push(Evaluated { name, score, seconds_per_image: score.map(|_| seconds), sheet });
    }
    Ok(Evaluation { real: scorer.map(|s| s.baseline), stages: evaluated })
}

/// The models of a run in the order of the method, those that are there.
fn models(run: &RunFolder) -> Vec<(String, PathBuf)> {
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

/// The page of a run.
///
/// # Errors
/// A damaged log.
pub fn page(run: &RunFolder, summary: &Summary, evaluation: &Evaluation) -> Result<GraftRun> {
    let count = summary.sites.len();
    let operators: Vec<&str> = {
        let mut kinds: Vec<&str> =
            summary.sites.iter().map(|s| s.after.split('(').next().unwrap_or(&s.after)).collect();
        kinds.sort_unstable();
        kinds.dedup();
        kinds
    };
    Ok(GraftRun {
        title: "Graft report".into(),
        summary: format!("{count} sites of {} now hold {}.", summary.base, operators.join(", ")),
        stages: evaluation
            .stages
            .iter()
            .filter(|s| s.name != ModelStage::Random.name())
            .map(|s| stage(s, summary))
            .collect(),
        real: evaluation.real.clone(),
        costs: costs(summary, evaluation),
        sites: summary
            .sites
            .iter()
            .map(|s| SiteResidual {
                site: format!("{}: {}", s.site, s.after),
                before: s.residual_initial.map(|r| r.relative),
                after: s.residual_distilled.map(|r| r.relative),
            })
            .collect(),
        curves: curves(run)?,
        tables: Vec::new(),
        plan: run.plan.text().to_string(),
        facts: facts(run, summary, evaluation),
    })
}

fn stage(s: &Evaluated, summary: &Summary) -> Stage {
    let note = match s.name.as_str() {
        "distilled" => format!("each new operator imitates the one it replaced: {} updates", summary.distill.steps),
        "finetuned" => format!("the whole model is trained on: {} updates", summary.finetune.map_or(0, |f| f.steps)),
        _ => "as it was pretrained".to_string(),
    };
    Stage { name: s.name.clone(), note, samples: Some(s.sheet.clone()), score: s.score }
}

fn costs(summary: &Summary, evaluation: &Evaluation) -> Vec<Cost> {
    let (before, after) = (&summary.cost_before, &summary.cost_after);
    let cost = |name: &str, unit, before, after| Cost { name: name.into(), unit, before, after };
    let mut rows = vec![
        cost("parameters", Unit::Count, before.params as f64, after.params as f64),
        cost("FLOPs of a forward pass", Unit::Count, before.flops, after.flops),
        cost("FLOPs of token mixing", Unit::Count, before.attn.flops_operator, after.attn.flops_operator),
    ];
    let seconds = |s: Option<&Evaluated>| s.and_then(|s| s.seconds_per_image);
    if let (Some(first), Some(last)) = (seconds(evaluation.stages.first()), seconds(evaluation.stages.last())) {
        rows.push(cost("time to sample an image", Unit::Seconds, first, last));
    }
    rows
}

fn curves(run: &RunFolder) -> Result<Vec<Figure<LineChart>>> {
    let step = |line: &Value| line["step"].as_f64();
    let mut sites: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for line in read_log(&run.distill_folder().join(LOSS_LOG))? {
        for (site, loss) in line["losses"].as_object().into_iter().flatten() {
            if let (Some(x), Some(y)) = (step(&line), loss.as_f64()) {
                sites.entry(site.clone()).or_default().push((x, y));
            }
        }
    }
    let finetune: Vec<(f64, f64)> = read_log(&run.finetune_folder().join(LOSS_LOG))?
        .iter()
        .filter_map(|line| Some((step(line)?, line["loss"].as_f64()?)))
        .collect();
    let chart = |title: &str, y_label: &str, log_y, series| LineChart {
        title: title.into(),
        x_label: "update".into(),
        y_label: y_label.into(),
        log_y,
        series,
    };
    let mut figures = Vec::new();
    if !sites.is_empty() {
        let series = sites.into_iter().map(|(name, points)| Series { name, points }).collect();
        figures.push(Figure {
            title: "Stage 1: each operator learns to imitate".into(),
            caption: "Loss of every new operator against the output of the one it replaces, on the same inputs.".into(),
            chart: chart("loss of stage 1", "loss", true, series),
        });
    }
    if !finetune.is_empty() {
        figures.push(Figure {
            title: "Stage 2: the model grows together".into(),
            caption: "Diffusion loss of the whole model while all parameters are trained.".into(),
            chart: chart(
                "loss of stage 2",
                "loss",
                true,
                vec![Series { name: "diffusion loss".into(), points: finetune }],
            ),
        });
    }
    Ok(figures)
}

fn facts(run: &RunFolder, summary: &Summary, evaluation: &Evaluation) -> Vec<(String, String)> {
    let e = &run.plan.eval;
    let mut rows = vec![
        ("program".to_string(), format!("graft {}", env!("CARGO_PKG_VERSION"))),
        ("base model".to_string(), summary.base.clone()),
        (
            "scored samples".to_string(),
            format!(
                "{} a stage, {} with {} steps, guidance {}, seed {}",
                e.samples, e.sampler, e.steps, e.guidance, e.seed
            ),
        ),
        ("pictures".to_string(), format!("guidance {}, the same seeds and labels at every stage", e.picture_guidance)),
        (
            "time of stage 1".to_string(),
            format!("{:.0} s for {} images", summary.distill.seconds, summary.distill.images),
        ),
    ];
    if let Some(f) = &summary.finetune {
        rows.push(("time of stage 2".to_string(), format!("{:.0} s for {} images", f.seconds, f.images)));
    }
    let control = evaluation.stages.iter().find(|s| s.name == ModelStage::Random.name()).and_then(|s| s.score);
    if let Some(score) = control {
        rows.push((
            "control: new operators at random".to_string(),
            format!("Fréchet distance {:.2}, right class {:.0} %", score.frechet, 100.0 * score.agreement),
        ));
    }
    rows.push(("residuals".to_string(), format!("held-out images, in {HELD_OUT_LOG}")));
    rows
}
