//! `graft gpu`: the battery for the first minutes on a GPU, most valuable first.
//!
//! | stage | what | why there |
//! |---|---|---|
//! | `probes` | recorded one-tile cases of every emulated instruction, bit by bit | what the emulator believes of the hardware |
//! | `conformance` | every operator against its oracle, in the type that its kernels are for | a time counts only where this passed |
//! | `operators` | times of every operator at the shapes of real models | |
//! | `models` | whole models | |
//! | `tune` | every way of running an operator | |
//! | `rest` | the other working type, compute-sanitizer | |
//! | `peers` | what PyTorch and others do at the same shapes, and whole models of theirs | it takes longest, and says nothing of whether ours is right |
//!
//! Every step is a process of its own with a time limit, and every stage has its share of the time ([`schedule`]). A row
//! is on disk when it is measured, whatever comes of its step, and a second run goes on after what is done. At the end
//! ours stands beside the best peer and the target. It needs this program, its archive of kernels, the recorded probes,
//! the contracts and the peers; nothing else.

mod pairs;
mod plan;
mod run;
mod schedule;
mod watch;

use crate::backend::{self, cuda};
use crate::cli::{out, table::Table};
use crate::error::{Error, Result};
use crate::io::files::slug;
use crate::report::results::rows::{self, Row};
use crate::report::results::targets::{self, Target};
use crate::tensor::DType;
use plan::{Stage, Step};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Minutes that are expected to be enough for every step.
const MINUTES: f64 = 40.0;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Folder for what came out, gone on with where it is there; of the GPU's name in benches/results where not given.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Show the steps with what they are expected to take and why some would be skipped; run nothing.
    #[arg(long)]
    dry_run: bool,
    /// Run nothing; pairs and table of what is in the folder.
    #[arg(long, conflicts_with = "dry_run")]
    report: bool,
    /// Minutes for everything. The default is enough for every step as far as can be told; with less every stage gets its
    /// share, and --dry-run says what is not reached.
    #[arg(long, default_value_t = MINUTES)]
    minutes: f64,
    /// Only these stages: probes, conformance, operators, models, tune, rest, peers.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Folder with the recorded probes.
    #[arg(long, value_name = "DIR", default_value = "tests/golden/probes")]
    probes: PathBuf,
    /// Folder of the programs that measure others at the same shapes, by GRAFT_PYTHON or python3.
    #[arg(long, value_name = "DIR", default_value = "tools/peers/gpu")]
    peers: PathBuf,
    /// What is aimed at.
    #[arg(long, value_name = "FILE", default_value = targets::FILE)]
    targets: PathBuf,
}

/// Runs the command.
pub fn run(args: &Args, json: bool) -> Result<()> {
    let mut chosen = Vec::new();
    for name in &args.only {
        chosen.push(Stage::named(name)?);
    }
    if !(args.minutes > 0.0) {
        return Err(Error::usage("--minutes", "out of range").is(args.minutes).must("above 0"));
    }
    let mut steps = plan::steps(&args.probes, &args.peers)?;
    steps.retain(|s| chosen.is_empty() || chosen.contains(&s.stage));
    let time = Duration::from_secs_f64(60.0 * args.minutes);
    if args.dry_run {
        let why = cuda::probe().err().map(|e| e.problem().to_string());
        return show(&steps, time, why.as_deref(), json);
    }
    let folder = match &args.out {
        Some(folder) => folder.clone(),
        None => Path::new("benches/results").join(slug(&backend::open_as("cuda", DType::F32)?.describe())),
    };
    if args.report {
        return report(&folder, &args.targets);
    }
    cuda::probe()?;
    let ran = run::battery(&steps, &folder, time);
    report(&folder, &args.targets)?;
    ran
}

/// The pairs of a folder, written, and what its rows say of the targets.
fn report(folder: &Path, list: &Path) -> Result<()> {
    let pairs = pairs::of(folder)?;
    if !pairs.is_empty() {
        pairs::write(folder, &pairs)?;
    }
    if !list.is_file() {
        return out::line(format!("no table: {} is not there", list.display()));
    }
    let rows = rows::of_machine(folder)?;
    let mut targets = targets::read(list)?;
    targets.retain(|t| !t.device.is_empty());
    // The bounds are those of one GPU; rows of another stand beside them all the same.
    let mut others = BTreeSet::new();
    if let Some(device) = rows.first().map(Row::device) {
        let strange = targets.iter_mut().filter(|t| !device.contains(&t.device));
        others.extend(strange.map(|t| std::mem::replace(&mut t.device, device.to_string())));
    }
    out::line(table(&targets, &rows).to_string().trim_end())?;
    others.iter().try_for_each(|device| out::line(format!("gate and target are those of the {device}")))?;
    let absent: BTreeSet<String> = pairs
        .iter()
        .filter_map(|p| Some(format!("{}: {}", p["peer"]["name"].as_str()?, p["could_not_run"].as_str()?)))
        .collect();
    absent.iter().try_for_each(|why| out::line(format!("could not run: {why}")))
}

/// Every target with its measurement, the best peer of the worst case and how many times its speed ours is.
fn table(targets: &[Target], rows: &[Row]) -> Table {
    let mut table = Table::new(&["target", "gate", "aim", "unit", "ours", "", "best peer", "its time over ours"]);
    for answer in targets.iter().flat_map(|t| t.answers(rows)) {
        let target = answer.target;
        let worst = answer.cases.first().map(|(_, row)| *row);
        let beside = worst.and_then(|row| {
            let (name, ms) = target.best_peer(row, rows)?;
            Some([format!("{name}, {ms:.4} ms"), format!("{:.2}", ms / row.ms()?)])
        });
        let [gate, aim] = target.bounds();
        let [name, unit] = [&target.name, &target.measure].map(String::clone);
        let words = [name, gate, aim, unit, answer.measured(), answer.verdict().to_string()];
        table.row(words.into_iter().chain(beside.unwrap_or_else(|| ["-", "-"].map(String::from))));
    }
    table
}

/// The plan with the reasons why steps would be skipped; without a device as if there were one.
fn show(steps: &[Step], time: Duration, no_device: Option<&str>, json: bool) -> Result<()> {
    let reason = |step: &Step| step.missing.clone().or(no_device.map(str::to_string));
    let reached = schedule::reached(steps, time);
    let plan = || steps.iter().zip(&reached);
    if json {
        let record = |(s, reached): (&Step, &bool)| serde_json::json!({ "step": s.name, "stage": s.stage.name(), "command": s.command, "expected_s": s.expected, "limit_s": s.limit.as_secs(), "reached": reached, "skip": reason(s) });
        return out::line(format!("{:#}", serde_json::Value::from(plan().map(record).collect::<Vec<_>>())));
    }
    let minutes = |time: Duration| format!("{:.1} min", time.as_secs_f64() / 60.0);
    let mut table = Table::new(&["step", "expected", "in all", "command", ""]);
    let mut all = Duration::ZERO;
    for (step, reached) in plan() {
        let note = match (&step.missing, reached, no_device) {
            (None, false, _) => format!("NOT REACHED in {}", minutes(time)),
            (Some(why), ..) => format!("SKIP {why}"),
            (None, true, Some(why)) => format!("SKIP {why}"),
            (None, true, None) => String::new(),
        };
        all += step.cost();
        table.row([step.name.clone(), format!("{} s", step.expected), minutes(all), step.command.join(" "), note]);
    }
    let skipped = steps.iter().filter(|s| reason(s).is_some()).count();
    out::line(format!("{table}{} steps, {skipped} would be skipped", steps.len()))?;
    let late = plan().filter(|(step, reached)| step.missing.is_none() && !**reached).count();
    out::line(format!("{late} would not be reached in {}", minutes(time)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_enough_for_every_step() {
        let mut steps = plan::steps(Path::new("nowhere"), Path::new("none")).unwrap();
        steps.iter_mut().for_each(|step| step.missing = None);
        assert!(schedule::reached(&steps, Duration::from_secs_f64(60.0 * MINUTES)).iter().all(|reached| *reached));
    }
}
