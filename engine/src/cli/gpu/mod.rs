//! `graft gpu`: the battery for the first minutes on a GPU, most valuable first.
//!
//! | stage | what | why first |
//! |---|---|---|
//! | `probes` | recorded one-tile cases of every emulated instruction, bit by bit | what the emulator believes of the hardware |
//! | `conformance` | every operator against its oracle | a time counts only where this passed |
//! | `sanitizer` | compute-sanitizer over the small cases | |
//! | `operators` | times of every operator at the shapes of real models; what PyTorch does beside it | |
//! | `models` | whole forward passes | |
//!
//! Every step is a process of its own with a time limit. What is done is written to `battery.jsonl` in the folder, and
//! a second run goes on after it. It needs this program, its archive of kernels and the recorded probes, nothing else.

mod model;
mod plan;
mod run;

use crate::backend::cuda;
use crate::cli::{out, table::Table};
use crate::error::{Error, Result};
use plan::{Stage, Step};
use std::path::PathBuf;
use std::time::Duration;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Folder for what came out; a folder that is there is gone on with.
    #[arg(long, value_name = "DIR", default_value = "gpu-results")]
    out: PathBuf,
    /// Show the steps and why some would be skipped; run nothing.
    #[arg(long)]
    dry_run: bool,
    /// Minutes for everything.
    #[arg(long, default_value_t = 9.0)]
    minutes: f64,
    /// Only these stages: probes, conformance, sanitizer, operators, models.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Folder with the recorded probes.
    #[arg(long, value_name = "DIR", default_value = "tests/golden/probes")]
    probes: PathBuf,
    /// A program that measures others at the same shapes and takes `--out FILE`.
    #[arg(long, value_name = "SCRIPT")]
    peers: Option<PathBuf>,
    /// Measure the forward pass of one model instead, with random weights.
    #[arg(long, value_name = "SIZE", hide = true)]
    model: Option<String>,
}

/// Runs the command.
pub fn run(args: &Args, json: bool) -> Result<()> {
    if let Some(size) = &args.model {
        return model::run(size, json);
    }
    let mut chosen = Vec::new();
    for name in &args.only {
        chosen.push(Stage::named(name)?);
    }
    if !(args.minutes > 0.0) {
        return Err(Error::usage("--minutes", "out of range").is(args.minutes).must("above 0"));
    }
    let mut steps = plan::steps(&args.probes, args.peers.as_deref())?;
    steps.retain(|s| chosen.is_empty() || chosen.contains(&s.stage));
    let device = cuda::probe();
    if args.dry_run {
        let why = device.err().map(|e| e.problem().to_string());
        return show(&steps, why.as_deref(), json);
    }
    device?;
    run::battery(&steps, &args.out, Duration::from_secs_f64(60.0 * args.minutes))
}

/// The plan with the reasons why steps would be skipped.
fn show(steps: &[Step], no_device: Option<&str>, json: bool) -> Result<()> {
    let reason = |step: &Step| step.missing.clone().or(no_device.map(str::to_string));
    if json {
        let record = |s: &Step| serde_json::json!({ "step": s.name, "stage": s.stage.name(), "command": s.command, "limit_s": s.limit.as_secs(), "skip": reason(s) });
        return out::line(format!("{:#}", serde_json::Value::from(steps.iter().map(record).collect::<Vec<_>>())));
    }
    let mut table = Table::new(&["step", "limit", "command", ""]);
    for step in steps {
        let note = reason(step).map_or(String::new(), |why| format!("SKIP {why}"));
        table.row([step.name.clone(), format!("{} s", step.limit.as_secs()), step.command.join(" "), note]);
    }
    let skipped = steps.iter().filter(|s| reason(s).is_some()).count();
    out::line(format!("{table}{} steps, {skipped} would be skipped", steps.len()))
}
