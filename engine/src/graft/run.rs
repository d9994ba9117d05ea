//! The run folder, and the stages in order.
//!
//! | in the folder | what |
//! |---|---|
//! | `plan.toml` | the plan as it was when the run began |
//! | `layers.json`, `locality.json`, `select/` | layers that the base model decided, and from what |
//! | `distill/`, `finetune/` | checkpoint, loss log and held-out residuals of the two stages |
//! | `distill/part-0-of-4/` | the same for a part of the sites, where several processes share stage 1 |
//! | `random/`, `stage1/`, `stage2/` | models: sites as initialised (the control), distilled, finetuned |
//! | `stage2-adapter/` | stage 2's adapters in PEFT's layout, where the plan keeps them |
//! | `samples-*.png`, `report.html` | pictures of every stage, and the page that compares them |
//! | `summary.json` | costs, residuals, losses, scores, times |
//!
//! A model folder is complete once it has its `config.json`, which is written last. A run that is stopped at any
//! moment, kill included, goes on from its last checkpoint when it is started again.

use super::assemble::{self, Stage};
use super::cache::Filling;
use super::choose;
use super::distill::{self, Distiller};
use super::evaluate::Evaluation;
use super::finetune::{Finetuner, Start};
use super::memory;
use super::page;
use super::parts::{self, Part};
use super::plan::Plan;
pub use super::source::RunData;
use super::source::RunSource;
use super::summary::Summary;
use crate::error::{Error, Result};
use crate::io::atomic::{self, RunLock, ensure_writable_dir, remove_leftovers};
use crate::io::{hash, json};
use crate::models::sites::SiteModel;
use crate::models::{PLAN, STAGES, pipeline};
use crate::tensor::{Device, MemoryPlan};
use crate::train::sites::SiteLearner;
use crate::train::trainer;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

const SUMMARY: &str = "summary.json";
/// The page that people look at.
pub const REPORT: &str = "report.html";

/// A folder that belongs to one plan, held by this process.
pub struct RunFolder {
    /// The folder.
    pub dir: PathBuf,
    /// Its plan.
    pub plan: Plan,
    _lock: RunLock,
}

/// A word from a stage in progress.
#[derive(Clone, Copy, Debug)]
pub enum Event<'e> {
    /// A step of the choice of layers that the base model decides.
    Choose(choose::Progress),
    /// What a stage (1 or 2) that is about to begin needs.
    Memory(usize, &'e MemoryPlan),
    /// A batch that stage 1 is about to add to its cache of activations.
    Cache(&'e Filling),
    /// An update of stage 1.
    Distill(&'e distill::Progress),
    /// An update of stage 2.
    Finetune(&'e trainer::Progress),
    /// Sampling steps of the comparison: done, and in all.
    Evaluate(u64, u64),
}

/// Receives events; breaking stops the stage after a checkpoint.
pub type Report<'r> = dyn FnMut(Event<'_>) -> ControlFlow<()> + Send + 'r;

impl RunFolder {
    /// The folder for a plan, created where it is missing.
    ///
    /// # Errors
    /// A folder that cannot be written, that another process uses, or that belongs to another plan.
    pub fn create(plan: Plan, dir: &Path) -> Result<RunFolder> {
        let folder = RunFolder::take(plan, dir, RunLock::acquire)?;
        let stages = [Stage::Random, Stage::Distilled, Stage::Finetuned].map(|stage| folder.model_folder(stage));
        for written in stages.iter().filter(|f| f.is_dir()).chain([&folder.dir]) {
            remove_leftovers(written)?;
        }
        Ok(folder)
    }

    /// The folder for a plan, together with other processes that each train a part of it.
    ///
    /// # Errors
    /// As [`RunFolder::create`].
    pub fn share(plan: Plan, dir: &Path) -> Result<RunFolder> {
        RunFolder::take(plan, dir, RunLock::share)
    }

    fn take(plan: Plan, dir: &Path, lock: fn(&Path) -> Result<RunLock>) -> Result<RunFolder> {
        ensure_writable_dir(dir)?;
        let lock = lock(dir)?;
        let path = dir.join(PLAN);
        if path.exists() && Plan::read(&path)?.identity() != plan.identity() {
            return Err(Error::usage(dir.display().to_string(), "the run folder belongs to another plan")
                .is(format!("grafts and settings of {}", path.display()))
                .must("those of the plan given")
                .fix("use another --run folder, or take that plan"));
        }
        atomic::write_bytes(&path, plan.text().as_bytes())?;
        Ok(RunFolder { dir: dir.to_path_buf(), plan, _lock: lock })
    }

    /// A folder that an earlier call has created.
    ///
    /// # Errors
    /// A folder without a plan, or that another process uses.
    pub fn open(dir: &Path) -> Result<RunFolder> {
        let path = dir.join(PLAN);
        if !path.exists() {
            return Err(Error::usage(path.display().to_string(), "not a run folder")
                .must("a folder that `graft distill` has filled")
                .fix("run `graft distill PLAN --run DIR` first, or `graft run PLAN --run DIR` for everything"));
        }
        RunFolder::create(Plan::read(&path)?, dir)
    }

    /// Folder of stage 1's checkpoint and logs.
    pub fn distill_folder(&self) -> PathBuf {
        self.dir.join("distill")
    }

    /// Folder of stage 2's checkpoint and logs.
    pub fn finetune_folder(&self) -> PathBuf {
        self.dir.join("finetune")
    }

    /// Folder of stage 2's adapters, where they are kept.
    pub fn adapter_folder(&self) -> PathBuf {
        self.dir.join("stage2-adapter")
    }

    /// Folder of the model of a stage.
    pub fn model_folder(&self, stage: Stage) -> PathBuf {
        self.dir.join(match stage {
            Stage::Random => "random",
            Stage::Distilled => STAGES[1],
            Stage::Finetuned => STAGES[0],
        })
    }

    /// Whether the model of a stage is there, complete.
    pub fn has(&self, stage: Stage) -> bool {
        self.model_folder(stage).join("config.json").exists()
    }

    /// The plan with the layers that the base model has decided.
    ///
    /// # Errors
    /// A damaged file.
    pub fn decided(&self) -> Result<Plan> {
        choose::kept(&self.plan, &self.dir)
    }

    fn save<M: SiteModel>(&self, model: &M, stage: Stage) -> Result<()> {
        let folder = self.model_folder(stage);
        if M::HAS_PARTS {
            // Before the configuration, which says that the folder is complete.
            pipeline::write_base(&folder, &self.plan.base)?;
        }
        assemble::save(model, &folder, &self.decided()?, stage)
    }
}

/// Stage 1, from where it was left; returns whether it is finished. Writes the random control at its beginning and
/// the distilled model at its end. Where it was begun in parts, these must be finished, and are gathered.
///
/// # Errors
/// Those of the base model, the data and [`Distiller`].
pub fn distill<D: RunSource>(run: &RunFolder, data: &D, device: &Device, report: &mut Report<'_>) -> Result<bool> {
    distill_all(run, data, device, memory::program(data, device), report)
}

/// [`distill`] by a process that takes `program` bytes besides.
fn distill_all<D: RunSource>(
    run: &RunFolder,
    data: &D,
    device: &Device,
    program: usize,
    report: &mut Report<'_>,
) -> Result<bool> {
    let folder = run.distill_folder();
    let base = D::Model::load(&run.plan.base, device)?;
    let chosen = D::choose(&run.plan, &base, Some(&run.dir), Some(data), &mut |p| report(Event::Choose(p)))?;
    let Some(plan) = &chosen else { return Ok(false) };
    let [needed, _] = memory::plan::<D>(plan, None, program)?;
    let _ = report(Event::Memory(1, &needed));
    let assignments = plan.resolve(base.config())?;
    let fingerprint = fingerprint(plan, &assemble::digest(&base)?);
    let begun = parts::begun(&folder)?;
    let mut distiller = Distiller::open(&base, &assignments, &plan.distill, &folder, fingerprint.clone())?;
    if !run.has(Stage::Random) {
        run.save(&distiller.initial_model()?, Stage::Random)?;
    }
    match begun[..] {
        [] => {}
        [of] => parts::gather(&mut distiller, &folder, of, plan.distill.steps, &fingerprint)?,
        _ => {
            return Err(Error::usage(folder.display().to_string(), "stage 1 was begun in different numbers of parts")
                .is(begun.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and "))
                .must("one number")
                .fix("remove the part folders of all but one"));
        }
    }
    if distiller.step() < plan.distill.steps
        && !distiller.fill_cache(data.train(), &mut |filling| report(Event::Cache(filling)))?
    {
        return Ok(false);
    }
    distiller.run(data.train(), data.held_out(), &mut |p| report(Event::Distill(p)))?;
    let finished = distiller.step() >= plan.distill.steps;
    if finished && !run.has(Stage::Distilled) {
        run.save(&distiller.model()?, Stage::Distilled)?;
    }
    Ok(finished)
}

/// Stage 1 of a part of the sites, from where it was left; returns whether it is finished. [`distill`] gathers the
/// parts when all of them are.
///
/// # Errors
/// As [`distill`]; a stage 1 that was begun, or has been gathered, as a whole.
pub fn distill_part<D: RunSource>(
    run: &RunFolder,
    part: Part,
    data: &D,
    device: &Device,
    report: &mut Report<'_>,
) -> Result<bool> {
    let (plan, stage) = (&run.plan, run.distill_folder());
    if stage.join(trainer::CHECKPOINT).exists() {
        return Err(Error::usage("--sites", "stage 1 of this run is not split")
            .is(format!("{} is there", stage.join(trainer::CHECKPOINT).display()))
            .must("a run whose parts have not been gathered")
            .fix("go on without --sites, or use another --run folder"));
    }
    let program = memory::program(data, device);
    let base = D::Model::load(&plan.base, device)?;
    let chosen = D::choose(plan, &base, Some(&run.dir), Some(data), &mut |p| report(Event::Choose(p)))?;
    let Some(plan) = &chosen else { return Ok(false) };
    let [needed, _] = memory::plan::<D>(plan, Some(part), program)?;
    let _ = report(Event::Memory(1, &needed));
    let own = part.choose(&plan.resolve(base.config())?)?;
    let fingerprint = part.fingerprint(&fingerprint(plan, &assemble::digest(&base)?));
    let mut distiller = Distiller::open(&base, &own, &plan.distill, &part.folder(&stage), fingerprint)?;
    if distiller.step() < plan.distill.steps
        && !distiller.fill_cache(data.train(), &mut |filling| report(Event::Cache(filling)))?
    {
        return Ok(false);
    }
    distiller.run(data.train(), data.held_out(), &mut |p| report(Event::Distill(p)))?;
    Ok(distiller.step() >= plan.distill.steps)
}

/// Stage 2, from where it was left; returns whether it is finished. Writes the finetuned model at its end.
///
/// # Errors
/// A run whose stage 1 is not finished, and those of the data and [`Finetuner`].
pub fn finetune<D: RunSource>(run: &RunFolder, data: &D, device: &Device, report: &mut Report<'_>) -> Result<bool> {
    finetune_all(run, data, device, memory::program(data, device), report)
}

/// [`finetune`] by a process that takes `program` bytes besides.
fn finetune_all<D: RunSource>(
    run: &RunFolder,
    data: &D,
    device: &Device,
    program: usize,
    report: &mut Report<'_>,
) -> Result<bool> {
    let plan = &run.plan;
    let folder = run.model_folder(Stage::Distilled);
    if !run.has(Stage::Distilled) {
        return Err(Error::usage(folder.display().to_string(), "stage 1 is not finished")
            .must("a distilled model")
            .fix("run `graft distill PLAN --run DIR` to its end first"));
    }
    assemble::check_origin(&folder, plan)?;
    let [_, needed] = memory::plan::<D>(&run.decided()?, None, program)?;
    let _ = report(Event::Memory(2, &needed));
    let mut finetuner = stage2::<D::Model>(run, &folder, &run.finetune_folder(), device)?;
    let finished = finetuner.run(data.train(), &mut |p| report(Event::Finetune(p)))?;
    if finished && plan.finetune.lora().keep_adapters {
        finetuner.save_adapters(&run.adapter_folder())?;
    }
    if finished && !run.has(Stage::Finetuned) {
        run.save(&finetuner.model()?, Stage::Finetuned)?;
    }
    Ok(finished)
}

/// Stage 2 of a run's plan on the model in `from`, with its checkpoint in `to`.
///
/// # Errors
/// A model that cannot be read, and those of [`Finetuner::open`].
pub(super) fn stage2<M: SiteLearner>(run: &RunFolder, from: &Path, to: &Path, device: &Device) -> Result<Finetuner<M>> {
    let plan = &run.plan;
    let grafted = M::load(from, device)?;
    let mut fingerprint = fingerprint(plan, &assemble::digest(&grafted)?);
    let sites = run.decided()?.resolve(&M::describe(&plan.base)?)?;
    let base = if plan.finetune.needs_base() { Some(M::load(&plan.base, device)?) } else { None };
    if let Some(base) = &base {
        fingerprint += &format!(" teacher:{}", assemble::digest(base)?);
    }
    Finetuner::open(Start { grafted, sites: &sites, base }, &plan.finetune, to, fingerprint)
}

/// Both stages, from where they were left; returns whether they are finished.
///
/// # Errors
/// Those of [`distill`] and [`finetune`].
pub fn train<D: RunSource>(run: &RunFolder, data: &D, device: &Device, report: &mut Report<'_>) -> Result<bool> {
    let mut stopped = false;
    let mut watched = |event: Event<'_>| {
        let flow = report(event);
        stopped |= flow.is_break();
        flow
    };
    // Asked once: later this process also holds what stage 1 has left.
    let program = memory::program(data, device);
    let distilled = distill_all(run, data, device, program, &mut watched)?;
    // Who stops at the very last update of stage 1 does not want stage 2 to begin.
    if !distilled || stopped {
        return Ok(false);
    }
    // Buffers of stage 1 have other sizes.
    device.trim();
    finetune_all(run, data, device, program, report)
}

/// Everything: stage 1, stage 2, comparison, report. Returns the summary, or nothing where `report` broke off.
///
/// # Errors
/// Those of [`distill`] and [`finetune`].
pub fn run<D: RunSource>(
    run: &RunFolder,
    data: &D,
    device: &Device,
    report: &mut Report<'_>,
) -> Result<Option<Summary>> {
    if !train(run, data, device, report)? {
        return Ok(None);
    }
    device.trim();
    let evaluation = data.evaluate(run, device, &mut |done, total| {
        // The comparison is short and writes nothing before its end: it cannot be broken off in between.
        let _ = report(Event::Evaluate(done, total));
    })?;
    finish::<D::Model>(run, Some(evaluation)).map(Some)
}

/// What follows the last stage: gathers the numbers of the run and writes them to its folder, and the report where
/// the stages were compared.
///
/// # Errors
/// A damaged log, or a full disk.
pub fn finish<M: SiteModel>(run: &RunFolder, evaluation: Option<Evaluation>) -> Result<Summary> {
    let mut summary = Summary::gather::<M>(run)?;
    if let Some(evaluation) = &evaluation {
        for stage in evaluation.stages.iter().filter(|stage| !stage.sheet.is_empty()) {
            atomic::write_bytes(&run.dir.join(format!("samples-{}.png", stage.name)), &stage.sheet)?;
        }
        page::page(run, &summary, evaluation)?.write(&run.dir.join(REPORT))?;
    }
    summary.evaluation = evaluation;
    json::write(&run.dir.join(SUMMARY), &summary.json()?)?;
    Ok(summary)
}

/// What a checkpoint must have come from: this plan, on a start with this digest.
fn fingerprint(plan: &Plan, start: &str) -> String {
    format!("plan={:.16} base={start:.16}", hash::sha256(plan.identity().as_bytes()))
}
