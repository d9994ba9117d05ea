//! Studies: many grafts of one base under the same settings, each scored in the same way, in one table.
//!
//! A job is a row with a seed. It has its own run folder `RUN/<row>/seed-<n>`, and is done once its `result.json` is
//! there; jobs may be split over processes and machines that share the folder. The report is made from the results
//! that are there and says of the others that they were not run.

mod page;
mod result;
mod spec;

pub use page::report;
pub use result::{JobResult, Scored};
pub use spec::{Control, Row, Study, Tier};

use super::assemble::{self, Stage};
use super::evaluate::{Evaluator, Scorer};
use super::finetune::{Finetuner, Start};
use super::plan::Plan;
use super::run::{self, Event, Report, RunData, RunFolder};
use super::summary::{self, Summary};
use crate::autograd::Precision;
use crate::error::{Error, Result};
use crate::eval::loss::{LossSettings, denoising_loss};
use crate::io::atomic::{self, RunLock, ensure_writable_dir};
use crate::io::{hash, json};
use crate::models::dit::{self, Dit};
use crate::tensor::Device;
use crate::train::trainer::{CHECKPOINT, LOSS_LOG};
use std::path::{Path, PathBuf};

const RESULT: &str = "result.json";
/// Held-out images on which the denoising loss is measured, the same for every model.
const LOSS_IMAGES: usize = 2000;
/// Scores of real images at the count of the samples.
const REAL: &str = "real.json";

/// A row with a seed.
#[derive(Clone, Copy, Debug)]
pub struct Job<'s> {
    /// The row.
    pub row: &'s Row,
    /// The seed.
    pub seed: u64,
}

impl Job<'_> {
    /// Its folder.
    pub fn folder(&self, run: &Path) -> PathBuf {
        run.join(&self.row.name).join(format!("seed-{}", self.seed))
    }

    /// Its result, where it is done.
    ///
    /// # Errors
    /// A result that is damaged.
    pub fn result(&self, run: &Path) -> Result<Option<JobResult>> {
        let path = self.folder(run).join(RESULT);
        if path.exists() { JobResult::read(&path).map(Some) } else { Ok(None) }
    }
}

impl Study {
    /// Jobs of a tier in the order of the file, first seeds first, so that a study that is broken off has something of
    /// every row.
    pub fn jobs(&self, tier: Tier) -> Vec<Job<'_>> {
        let rows: Vec<&Row> = self.rows.iter().filter(|row| row.tier <= tier).collect();
        let most = rows.iter().map(|row| row.seeds.len()).max().unwrap_or(0);
        let job = |row: &&'_ Row, i: usize| row.seeds.get(i).copied();
        (0..most).flat_map(|i| rows.iter().filter_map(move |row| Some(Job { row, seed: job(row, i)? }))).collect()
    }
}

/// Runs jobs of one study.
pub struct Runner<'s> {
    study: &'s Study,
    folder: &'s Path,
    device: &'s Device,
    data: RunData,
    scorer: Option<Scorer>,
    base: Dit,
    base_digest: String,
}

impl<'s> Runner<'s> {
    /// Reads base model and classifier; `data` is what the study's `[data]` names.
    ///
    /// # Errors
    /// When one of them cannot be read, or they do not fit each other.
    pub fn open(study: &'s Study, folder: &'s Path, data: RunData, device: &'s Device) -> Result<Runner<'s>> {
        ensure_writable_dir(folder)?;
        let plan = study.settings()?;
        let scorer = Scorer::new(&plan.eval, &data, device)?;
        let base = dit::load(&plan.base, device)?;
        let base_digest = assemble::digest(&base)?;
        if let Some(scorer) = &scorer {
            let real = serde_json::to_value(&scorer.baseline).map_err(|e| Error::failure(REAL, e.to_string()))?;
            json::write(&folder.join(REAL), &real)?;
        }
        Ok(Runner { study, folder, device, data, scorer, base, base_digest })
    }

    /// Runs one job from where it was left; returns nothing where `report` broke it off.
    ///
    /// # Errors
    /// Those of the stages, a folder that another process uses, or one that holds another job.
    pub fn run(&self, job: Job<'_>, report: &mut Report<'_>) -> Result<Option<JobResult>> {
        let plan = self.study.plan(job.row, job.seed)?;
        let folder = job.folder(self.folder);
        let identity = self.identity(job, &plan);
        if let Some(done) = job.result(self.folder)? {
            if done.identity == identity {
                return Ok(Some(done));
            }
            return Err(Error::usage(folder.display().to_string(), "holds the result of another job")
                .must("one of this study, base and settings")
                .fix("use another --run folder, or remove this one"));
        }
        let result = match job.row.control {
            Some(control) => self.control(control, &plan, &folder, report)?,
            None => self.graft(job, plan, &folder, report)?,
        };
        let Some(measured) = result else { return Ok(None) };
        let result = JobResult { row: job.row.name.clone(), seed: job.seed, identity, ..measured };
        for stage in &result.stages {
            atomic::write_bytes(&folder.join(format!("samples-{}.png", stage.name)), &stage.sheet)?;
        }
        json::write(&folder.join(RESULT), &result.json()?)?;
        // What only a resumption needs is large, and nothing is left to resume.
        for stage in ["distill", "finetune"] {
            let checkpoint = folder.join(stage).join(CHECKPOINT);
            if checkpoint.exists() {
                atomic::remove(&checkpoint)?;
            }
        }
        Ok(Some(result))
    }

    /// What a result depends on.
    fn identity(&self, job: Job<'_>, plan: &Plan) -> String {
        let scored: Vec<&str> = job.row.scored().iter().map(|s| s.name()).collect();
        let kind = job.row.control.map_or("graft".to_string(), |c| format!("{c:?}"));
        let eval = serde_json::json!(plan.eval);
        hash::sha256(format!("{kind} {} {eval} {scored:?} {}", plan.identity(), self.base_digest).as_bytes())
    }

    fn graft(&self, job: Job<'_>, plan: Plan, folder: &Path, report: &mut Report<'_>) -> Result<Option<JobResult>> {
        let run = RunFolder::create(plan, folder)?;
        if !run::train(&run, &self.data, self.device, report)? {
            return Ok(None);
        }
        let summary = Summary::gather::<Dit>(&run)?;
        let mut stages = Vec::new();
        for stage in job.row.scored() {
            let model = dit::load(&run.model_folder(stage), self.device)?;
            stages.push(self.score(&run.plan, stage.name(), &model, report)?);
        }
        Ok(Some(JobResult::of_graft(&summary, self.base.config.depth(), stages)))
    }

    fn control(
        &self,
        control: Control,
        plan: &Plan,
        folder: &Path,
        report: &mut Report<'_>,
    ) -> Result<Option<JobResult>> {
        ensure_writable_dir(folder)?;
        let _lock = RunLock::acquire(folder)?;
        if control == Control::Base {
            let scored = self.score(plan, "original", &self.base, report)?;
            return Ok(Some(JobResult::of_control(None, scored)));
        }
        let stage = folder.join("finetune");
        let load = || dit::load(&plan.base, self.device);
        let base = if plan.finetune.needs_base() { Some(load()?) } else { None };
        let start = Start { grafted: load()?, sites: &[], base };
        let fingerprint = hash::sha256(format!("{} {}", plan.identity(), self.base_digest).as_bytes());
        let mut finetuner = Finetuner::open(start, &plan.finetune, &stage, fingerprint)?;
        if !finetuner.run(&self.data.train, &mut |p| report(Event::Finetune(p)))? {
            return Ok(None);
        }
        let scored = self.score(plan, Stage::Finetuned.name(), &finetuner.model()?, report)?;
        let log = summary::finetune_stage(&stage.join(LOSS_LOG), plan)?;
        Ok(Some(JobResult::of_control(Some(log), scored)))
    }

    fn score(&self, plan: &Plan, name: &str, model: &Dit, report: &mut Report<'_>) -> Result<Scored> {
        let (settings, precision) = (&plan.eval, Precision::from(plan.distill.dtype));
        let evaluator = Evaluator { settings, precision, data: &self.data, scorer: self.scorer.as_ref() };
        let work = evaluator.work();
        let evaluated = evaluator.model(name, model, &mut |done| {
            // Sampling is short and writes nothing before its end: it cannot be broken off in between.
            let _ = report(Event::Evaluate(done, work));
        })?;
        let questions = LossSettings { n: LOSS_IMAGES.min(self.data.held_out.n), precision, ..LossSettings::default() };
        let loss = denoising_loss(model, &self.data.held_out, questions, &mut |_| {})?;
        Ok(Scored::new(evaluated, loss.mean))
    }
}
