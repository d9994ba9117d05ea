//! The page of a run, from its summary, its logs and the comparison of its models.

use super::assemble::Stage as ModelStage;
use super::distill::HELD_OUT_LOG;
use super::evaluate::{Evaluated, Evaluation};
use super::fidelity;
use super::run::RunFolder;
use super::summary::{Summary, read_log};
use crate::error::Result;
use crate::report::chart::{LineChart, Series};
use crate::report::graft_run::{Cost, Figure, GraftRun, SiteResidual, Stage, Table, Unit};
use crate::train::trainer::LOSS_LOG;
use serde_json::Value;
use std::collections::BTreeMap;

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
        tables: tables(evaluation),
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
    Stage { name: s.name.clone(), note, samples: (!s.sheet.is_empty()).then(|| s.sheet.clone()), score: s.score }
}

/// How near the stages of a model that reads text are to the base.
fn tables(evaluation: &Evaluation) -> Vec<Table> {
    let Some((header, rows)) = fidelity::table(&evaluation.stages) else { return Vec::new() };
    let Some(first) = evaluation.stages.iter().find_map(|s| s.fidelity) else { return Vec::new() };
    let mut caption = format!(
        "On pairs that were kept back: mean diffusion loss of {} noised latents; distance of the predicted noise, and of \
         {} samples with the same prompts and seeds, to those of the base model, relative to their size: 0 is the base \
         itself.",
        first.questions, first.samples
    );
    if let Some(retrieval) = first.retrieval {
        caption += &format!(
            " Pictures of {} captions that no training saw are looked up by coarse colours among {:.0} real ones of their \
             style: how often the one that was asked for is the nearest, and how many are nearer than it; half of them by \
             chance.",
            retrieval.n, retrieval.candidates
        );
    }
    vec![Table { title: "Nearness to the base model".into(), caption, header, rows }]
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
        log_x: false,
        log_y,
        series,
    };
    let mut figures = Vec::new();
    if !sites.is_empty() {
        let series = sites.into_iter().map(|(name, points)| Series::curve(name, points)).collect();
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
            chart: chart("loss of stage 2", "loss", true, vec![Series::curve("diffusion loss", finetune)]),
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
