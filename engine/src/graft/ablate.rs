//! What each stage contributes: the base and the graft with random operators, after stage 1 alone, after stage 2 alone
//! and after both, all scored in the same way; beside it, where asked for, the self-graft of the same sites, which
//! says what the procedure itself costs.
//!
//! | in the folder | what |
//! |---|---|
//! | `graft/` | the run folder of the plan |
//! | `direct/` | stage 2 from random operators: checkpoint, log, `model/` |
//! | `control/` | the run folder of the self-graft |
//! | `ablation.json`, `ablation.html` | the rows |
//!
//! Everything resumes as runs do.

use super::assemble::{self, Stage};
use super::evaluate::{Evaluated, Evaluator, Scorer};
use super::plan::{Assignment, Plan};
use super::run::{self, Event, Report, RunData, RunFolder};
use super::settings::Start;
use super::summary::Summary;
use crate::autograd::Precision;
use crate::error::{Error, Result};
use crate::eval::score::Baseline;
use crate::io::json;
use crate::models::dit::{self, Dit};
use crate::nn::operators::Site;
use crate::report::format::{percent, seconds, significant};
use crate::report::graft_run::{self, GraftRun, SiteResidual, Table};
use crate::tensor::Device;
use serde::Serialize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

const GRAFT: &str = "graft";
const DIRECT: &str = "direct";
const CONTROL: &str = "control";
const RESULT: &str = "ablation.json";
/// The page that people look at.
pub const REPORT: &str = "ablation.html";

/// All rows.
#[derive(Clone, Debug, Serialize)]
pub struct Ablation {
    /// Real images against the reference, where the plan names a classifier.
    pub real: Option<Baseline>,
    /// The base first, then the graft, then the control.
    pub rows: Vec<Row>,
}

/// A model of the ablation.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Whether it is the self-graft.
    pub control: bool,
    /// Updates of stage 1 and of stage 2 that its operators have had; none for the base.
    pub updates: Option<[u64; 2]>,
    /// Mean over the sites of the relative held-out residual, where the operators were not finetuned.
    pub residual: Option<f64>,
    /// Name, scores, time of an image.
    #[serde(flatten)]
    pub evaluated: Evaluated,
}

/// A model to be scored.
struct Candidate {
    name: &'static str,
    control: bool,
    folder: PathBuf,
    updates: Option<[u64; 2]>,
    residual: Option<f64>,
}

/// Runs everything that a folder does not have yet, and writes the result to it. Nothing where `report` broke off.
///
/// # Errors
/// Those of the stages and of the comparison.
pub fn ablate(
    plan: &Plan,
    dir: &Path,
    controls: bool,
    data: &RunData,
    device: &Device,
    report: &mut Report<'_>,
) -> Result<Option<Ablation>> {
    let graft = RunFolder::create(plan.clone(), &dir.join(GRAFT))?;
    if !run::train(&graft, data, device, report)? || !direct(&graft, &dir.join(DIRECT), data, device, report)? {
        return Ok(None);
    }
    let summary = Summary::gather::<Dit>(&graft)?;
    let mut candidates = candidates(&graft, &summary, Some(&dir.join(DIRECT)));
    candidates.insert(
        0,
        Candidate { name: "original", control: false, folder: plan.base.clone(), updates: None, residual: None },
    );
    if controls {
        let control = RunFolder::create(self_graft(&graft)?, &dir.join(CONTROL))?;
        if !run::train(&control, data, device, report)? {
            return Ok(None);
        }
        candidates.extend(self::candidates(&control, &Summary::gather::<Dit>(&control)?, None));
    }
    let ablation = score(plan, candidates, data, device, report)?;
    page(plan, &ablation, &summary).write(&dir.join(REPORT))?;
    let value = serde_json::to_value(&ablation).map_err(|e| Error::failure("ablation", e.to_string()))?;
    json::write(&dir.join(RESULT), &value)?;
    Ok(Some(ablation))
}

/// The plan of a run with the base's own operators, started at random, in the same sites.
fn self_graft(run: &RunFolder) -> Result<Plan> {
    let base = dit::describe(&run.plan.base)?;
    let mut assignments = run.decided()?.resolve(&base)?;
    for Assignment { block, site, spec, start, .. } in &mut assignments {
        let own = base.blocks.get(*block).map(|b| match site {
            Site::Attn => b.attn.clone(),
            Site::Mlp => b.mlp.clone(),
            // What a pair does to its blocks has no operator of the base beside it.
            Site::BlockPair => spec.clone(),
        });
        (*spec, *start) = (own.unwrap_or_else(|| spec.clone()), Start::Random);
    }
    run.plan.with_grafts(&assignments)
}

/// Stage 2 from the operators as they were initialised; returns whether it is finished.
fn direct(run: &RunFolder, dir: &Path, data: &RunData, device: &Device, report: &mut Report<'_>) -> Result<bool> {
    let model = dir.join("model");
    if model.join("config.json").exists() {
        return Ok(true);
    }
    let mut finetuner = run::stage2::<Dit>(run, &run.model_folder(Stage::Random), &dir.join("finetune"), device)?;
    let mut stopped = false;
    let finished = finetuner.run(&data.train, &mut |p| {
        let flow = report(Event::Finetune(p));
        stopped |= flow == ControlFlow::Break(());
        flow
    })?;
    if finished {
        assemble::save(&finetuner.model()?, &model, &run.decided()?, Stage::Finetuned)?;
    }
    Ok(finished && !stopped)
}

/// The models of a run, with that of stage 2 alone between its own.
fn candidates(run: &RunFolder, summary: &Summary, direct: Option<&Path>) -> Vec<Candidate> {
    let control = direct.is_none();
    let steps = [run.plan.distill.steps, run.plan.finetune.steps];
    let mean = |of: fn(&super::summary::SiteSummary) -> Option<super::distill::Residual>| {
        let found: Vec<f64> = summary.sites.iter().filter_map(of).map(|r| r.relative).collect();
        (!found.is_empty()).then(|| found.iter().sum::<f64>() / found.len() as f64)
    };
    let stage = |name, stage, updates, residual| Candidate {
        name,
        control,
        folder: run.model_folder(stage),
        updates: Some(updates),
        residual,
    };
    let mut found = vec![
        stage("random", Stage::Random, [0, 0], mean(|s| s.residual_initial)),
        stage("stage 1 only", Stage::Distilled, [steps[0], 0], mean(|s| s.residual_distilled)),
    ];
    if let Some(direct) = direct {
        let folder = direct.join("model");
        found.push(Candidate { name: "stage 2 only", control, folder, updates: Some([0, steps[1]]), residual: None });
    }
    found.push(stage("both stages", Stage::Finetuned, steps, None));
    found
}

fn score(
    plan: &Plan,
    candidates: Vec<Candidate>,
    data: &RunData,
    device: &Device,
    report: &mut Report<'_>,
) -> Result<Ablation> {
    let scorer = Scorer::new(&plan.eval, data, device)?;
    let precision = Precision::from(plan.distill.dtype);
    let evaluator = Evaluator { settings: &plan.eval, precision, data, scorer: scorer.as_ref() };
    let (each, total) = (evaluator.work(), evaluator.work() * candidates.len() as u64);
    let mut rows = Vec::with_capacity(candidates.len());
    for (index, c) in candidates.into_iter().enumerate() {
        let model = dit::load(&c.folder, device)?;
        let evaluated = evaluator.model(c.name, &model, &mut |done| {
            // The comparison writes nothing before its end: it is not broken off in between.
            let _ = report(Event::Evaluate(index as u64 * each + done, total));
        })?;
        rows.push(Row { control: c.control, updates: c.updates, residual: c.residual, evaluated });
    }
    Ok(Ablation { real: scorer.map(|s| s.baseline), rows })
}

/// Names of the columns of [`cells`].
pub const HEADER: [&str; 9] = [
    "model",
    "stage 1",
    "stage 2",
    "residual",
    "Fréchet distance",
    "kernel distance",
    "precision / recall",
    "right class",
    "time of an image",
];

/// A row as text; a dash where there is no number.
pub fn cells(row: &Row) -> Vec<String> {
    let dash = || "-".to_string();
    let e = &row.evaluated;
    let updates = |i: usize| row.updates.map_or_else(dash, |u| u[i].to_string());
    let score = |f: fn(&crate::eval::score::Score) -> String| e.score.as_ref().map_or_else(dash, f);
    vec![
        if row.control { format!("self-graft, {}", e.name) } else { e.name.clone() },
        updates(0),
        updates(1),
        row.residual.map_or_else(dash, significant),
        score(|s| format!("{:.2}", s.frechet)),
        score(|s| format!("{:.4}", s.kid)),
        score(|s| format!("{} / {}", percent(s.precision), percent(s.recall))),
        score(|s| percent(s.agreement)),
        e.seconds_per_image.map_or_else(dash, seconds),
    ]
}

fn page(plan: &Plan, ablation: &Ablation, summary: &Summary) -> GraftRun {
    let note = |r: &Row| match r.updates {
        None => "as it was pretrained".to_string(),
        Some([first, second]) => format!("{first} updates of stage 1, {second} of stage 2"),
    };
    let stages = ablation.rows.iter().filter(|r| !r.control);
    let e = &plan.eval;
    GraftRun {
        title: "Ablation of the two stages".into(),
        summary: format!(
            "{} sites of {}, trained by either stage, by both and by none.",
            summary.sites.len(),
            summary.base
        ),
        stages: stages
            .map(|r| graft_run::Stage {
                name: r.evaluated.name.clone(),
                note: note(r),
                samples: Some(r.evaluated.sheet.clone()),
                score: r.evaluated.score,
            })
            .collect(),
        real: ablation.real.clone(),
        sites: summary
            .sites
            .iter()
            .map(|s| SiteResidual {
                site: format!("{}: {}", s.site, s.after),
                before: s.residual_initial.map(|r| r.relative),
                after: s.residual_distilled.map(|r| r.relative),
            })
            .collect(),
        tables: vec![Table {
            title: "All rows".into(),
            caption: "Updates of each stage, mean relative residual of the sites on held-out images, and scores. A \
                      self-graft puts the base's own operators in the same sites, started at random: what it loses is \
                      the cost of the procedure."
                .into(),
            header: HEADER.map(String::from).into(),
            rows: ablation.rows.iter().map(cells).collect(),
        }],
        plan: plan.text().to_string(),
        facts: vec![
            ("program".into(), format!("graft {}", env!("CARGO_PKG_VERSION"))),
            (
                "scored samples".into(),
                format!(
                    "{} a row, {} with {} steps, guidance {}, seed {}",
                    e.samples, e.sampler, e.steps, e.guidance, e.seed
                ),
            ),
        ],
        ..GraftRun::default()
    }
}
