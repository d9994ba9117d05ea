//! `graft run P --run DIR`, and the two stages alone: `graft distill P --run DIR`, `graft finetune --run DIR`.
//!
//! `graft distill --sites 0/4` trains a quarter of the sites; when all four are done, `graft distill` gathers them.

use super::{progress, synthesize};
use crate::autograd::Precision;
use crate::backend::{self, Device};
use crate::error::{Error, Result};
use crate::graft::assemble::Stage;
use crate::graft::parts::Part;
use crate::graft::plan::Plan;
use crate::graft::run::{self, Event, RunData, RunFolder};
use crate::graft::source::{RunSource, reads_text};
use crate::graft::summary::{StageSummary, Summary};
use crate::graft::text_source::TextData;
use crate::tensor::DType;
use crate::train::config::Dtype;
use indicatif::ProgressBar;
use std::ops::ControlFlow;
use std::path::PathBuf;

/// Arguments of the commands that start from a plan.
#[derive(clap::Args)]
pub struct PlanArgs {
    /// Plan file.
    plan: PathBuf,
    #[command(flatten)]
    common: RunArgs,
}

/// Arguments of stage 1 alone.
#[derive(clap::Args)]
pub struct DistillArgs {
    #[command(flatten)]
    plan: PlanArgs,
    /// Train only the sites i of the plan with i mod n = I, beside other processes that train theirs; then `merge`, or
    /// nothing, gathers the parts.
    #[arg(long, value_name = "I/N|merge")]
    sites: Option<String>,
}

/// Arguments of all of them.
#[derive(clap::Args)]
pub struct RunArgs {
    /// Run folder: checkpoints, curves, models. A stopped run goes on from its last checkpoint.
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Stop after this many updates of this call.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    stop_after: Option<u64>,
    /// What runs the operators: cpu, oracle, emu or cuda.
    #[arg(long, default_value = "cpu", value_name = "NAME")]
    backend: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Runs `graft run`.
pub fn run(args: &PlanArgs) -> Result<()> {
    let plan = Plan::read(&args.plan)?;
    match reads_text(&plan) {
        false => run_on::<RunData>(plan, &args.common),
        true => run_on::<TextData>(plan, &args.common),
    }
}

fn run_on<D: RunSource>(plan: Plan, args: &RunArgs) -> Result<()> {
    let device = open(&args.backend, &[plan.distill.dtype, plan.finetune.dtype])?;
    let folder = RunFolder::create(plan, &args.run)?;
    if let Some(config) = &folder.plan.synthesize {
        synthesize::for_plan(&folder.plan, config, &args.backend)?;
    }
    let mut bars = Bars::new(steps(&folder), &device, args.stop_after);
    let data = D::load(&folder.plan.data)?;
    let summary = run::run(&folder, &data, &device, &mut |e| bars.report(e))?;
    bars.finish();
    conclude(&folder, summary.as_ref(), args)
}

/// Runs `graft distill`.
pub fn distill(args: &DistillArgs) -> Result<()> {
    let (sites, args) = (&args.sites, &args.plan);
    let part = sites.as_deref().filter(|text| *text != "merge").map(str::parse::<Part>).transpose()?;
    let plan = Plan::read(&args.plan)?;
    match (reads_text(&plan), part) {
        (false, Some(part)) => distill_part::<RunData>(plan, &args.common, part),
        (true, Some(part)) => distill_part::<TextData>(plan, &args.common, part),
        (reads_text, None) => {
            let (dtype, folder) = (plan.distill.dtype, RunFolder::create(plan, &args.common.run)?);
            match reads_text {
                false => stage(&folder, &args.common, dtype, run::distill::<RunData>),
                true => stage(&folder, &args.common, dtype, run::distill::<TextData>),
            }
        }
    }
}

fn distill_part<D: RunSource>(plan: Plan, args: &RunArgs, part: Part) -> Result<()> {
    let device = open(&args.backend, &[plan.distill.dtype])?;
    let folder = RunFolder::share(plan, &args.run)?;
    let mut bars = Bars::new(steps(&folder), &device, args.stop_after);
    let data = D::load(&folder.plan.data)?;
    let finished = run::distill_part(&folder, part, &data, &device, &mut |e| bars.report(e))?;
    bars.finish();
    if finished && !args.json {
        println!("sites {part} are distilled; when all parts are, the same command without --sites gathers them");
        return Ok(());
    }
    if finished {
        println!("{}", serde_json::json!({ "finished": true, "sites": part.to_string() }));
        return Ok(());
    }
    conclude(&folder, None, args)
}

/// Runs `graft finetune`.
pub fn finetune(args: &RunArgs) -> Result<()> {
    let folder = RunFolder::open(&args.run)?;
    match reads_text(&folder.plan) {
        false => stage(&folder, args, folder.plan.finetune.dtype, run::finetune::<RunData>),
        true => stage(&folder, args, folder.plan.finetune.dtype, run::finetune::<TextData>),
    }
}

/// Updates of the two stages.
fn steps(folder: &RunFolder) -> [u64; 2] {
    [folder.plan.distill.steps, folder.plan.finetune.steps]
}

type StageFn<D> = fn(&RunFolder, &D, &Device, &mut run::Report<'_>) -> Result<bool>;

/// The device that runs stages; a GPU computes in the type that the plan has for all of them.
fn open(backend: &str, dtypes: &[Dtype]) -> Result<Device> {
    let element = dtypes.first().map_or(DType::F32, |dtype| Precision::from(*dtype).into());
    let device = backend::open_as(backend, element)?;
    match dtypes.iter().any(|dtype| *dtype != dtypes[0]) && device.is_gpu() {
        false => Ok(device),
        true => Err(Error::usage("distill.dtype, finetune.dtype", "differ, and a GPU computes in one type")
            .is(format!("{dtypes:?}"))
            .must("the same")
            .fix("run the stages one by one: graft distill, then graft finetune")),
    }
}

fn stage<D: RunSource>(folder: &RunFolder, args: &RunArgs, dtype: Dtype, stage: StageFn<D>) -> Result<()> {
    let device = open(&args.backend, &[dtype])?;
    let mut bars = Bars::new(steps(folder), &device, args.stop_after);
    let data = D::load(&folder.plan.data)?;
    let finished = stage(folder, &data, &device, &mut |e| bars.report(e))?;
    bars.finish();
    let summary = if finished { Some(run::finish::<D::Model>(folder, None)?) } else { None };
    conclude(folder, summary.as_ref(), args)
}

fn conclude(folder: &RunFolder, summary: Option<&Summary>, args: &RunArgs) -> Result<()> {
    let Some(summary) = summary else {
        // Breaking off was asked for by --stop-after.
        if args.json {
            println!("{}", serde_json::json!({ "finished": false }));
        } else {
            println!("stopped; the same command goes on from here");
        }
        return Ok(());
    };
    if args.json {
        println!("{:#}", summary.json()?);
        return Ok(());
    }
    for line in super::layers::chosen(&folder.decided()?) {
        println!("{line}");
    }
    println!("{:<16} {:<20} {:<20} {:>10} {:>10}", "site", "before", "after", "initial", "distilled");
    for s in &summary.sites {
        let relative =
            |r: Option<crate::graft::distill::Residual>| r.map_or("-".into(), |r| format!("{:.4}", r.relative));
        println!(
            "{:<16} {:<20} {:<20} {:>10} {:>10}",
            s.site,
            s.before,
            s.after,
            relative(s.residual_initial),
            relative(s.residual_distilled)
        );
    }
    println!("(relative error on held-out images)\n");
    print_stage("stage 1", &summary.distill);
    if let Some(finetune) = &summary.finetune {
        print_stage("stage 2", finetune);
    }
    for stage in [Stage::Random, Stage::Distilled, Stage::Finetuned].into_iter().filter(|s| folder.has(*s)) {
        println!("{:<10} {}", stage.name(), folder.model_folder(stage).display());
    }
    Ok(())
}

fn print_stage(name: &str, s: &StageSummary) {
    println!(
        "{name}: {} updates, {} images, {:.1} s, loss {:.4} -> {:.4}",
        s.steps, s.images, s.seconds, s.loss_first, s.loss_last
    );
}

/// A bar for each stage, shown when its first word comes.
pub(super) struct Bars<'d> {
    device: &'d Device,
    steps: [u64; 2],
    bar: Option<(usize, ProgressBar)>,
    smoothed: Option<f64>,
    left: Option<u64>,
}

impl<'d> Bars<'d> {
    /// Bars for `steps` updates of the two stages; the report breaks after `stop_after` of them.
    pub fn new(steps: [u64; 2], device: &'d Device, stop_after: Option<u64>) -> Bars<'d> {
        Bars { device, steps, bar: None, smoothed: None, left: stop_after }
    }

    /// Shows an event.
    pub fn report(&mut self, event: Event<'_>) -> ControlFlow<()> {
        let (stage, step, loss, rate) = match event {
            Event::Distill(p) => (0, p.step, p.mean_loss(), p.images_per_second),
            Event::Finetune(p) => (1, p.step, p.loss, p.images_per_second),
            Event::Evaluate(done, total) => {
                self.counted(2, "compare", done, total);
                return ControlFlow::Continue(());
            }
            Event::Choose(p) => {
                // Two bars: one for the sampling, one for each short stage 1.
                self.counted(if p.what == "locality" { 3 } else { 4 }, p.what, p.done, p.total);
                return ControlFlow::Continue(());
            }
            Event::Memory(stage, plan) => {
                self.finish();
                eprintln!("memory of stage {stage}: {plan}");
                return ControlFlow::Continue(());
            }
            Event::Cache(filling) => {
                if self.bar.as_ref().is_none_or(|(shown, _)| *shown != 5) {
                    self.finish();
                    eprintln!("{filling}");
                }
                self.counted(5, "cache", filling.batches[0], filling.batches[1]);
                return ControlFlow::Continue(());
            }
        };
        if self.bar.as_ref().is_none_or(|(shown, _)| *shown != stage) {
            self.finish();
            let bar = progress::bar(self.steps[stage], ["distill", "finetune"][stage]);
            (self.bar, self.smoothed) = (Some((stage, bar)), None);
        }
        let loss = self.smoothed.map_or(loss, |s| 0.95 * s + 0.05 * loss);
        self.smoothed = Some(loss);
        if let Some((_, bar)) = &self.bar {
            bar.set_position(step);
            let mib = self.device.memory().peak >> 20;
            bar.set_message(format!("loss {loss:.4} {rate:.0} images/s {mib} MiB"));
        }
        self.left = self.left.map(|n| n.saturating_sub(1));
        if self.left == Some(0) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    fn counted(&mut self, stage: usize, what: &'static str, done: u64, total: u64) {
        if self.bar.as_ref().is_none_or(|(shown, _)| *shown != stage) {
            self.finish();
            self.bar = Some((stage, progress::bar(total, what)));
        }
        if let Some((_, bar)) = &self.bar {
            bar.set_position(done);
        }
    }

    /// Leaves the last bar as it is.
    pub fn finish(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish();
        }
    }
}
