//! `graft op list|run|check|bench|tune|replay`: the operators by themselves.

mod replay;
mod tune;

use super::{bench, out, table::Table};
use crate::backend::{self, DeviceKind};
use crate::error::{Error, Result};
use crate::nn::operators::REGISTRY;
use crate::ops::check::{Row, Subject, Verdict, conformance};
use crate::ops::contracts;
use crate::tensor::DType;
use graft_kernels::OpInfo;
use graft_kernels::emu::Build;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: OpCommand,
}

#[derive(clap::Subcommand)]
enum OpCommand {
    /// Operators of the engine, and those that can sit at a site of a block.
    List,
    /// Run the tiny cases of one operator on one backend and show the comparisons.
    Run {
        /// Name in the list.
        op: String,
        /// cpu, oracle, emu or cuda.
        #[arg(long, default_value = "cpu")]
        backend: String,
        /// Working type of a GPU: f32 or bf16; both where it is not given.
        #[arg(long)]
        element: Option<String>,
        /// Only this way of running it on a GPU; each that takes a case where it is not given.
        #[arg(long)]
        way: Option<String>,
    },
    /// Compare every case with the oracle.
    Check {
        /// Only operators whose name contains this; all where it is not given.
        #[arg(value_name = "OP", default_value = "")]
        name: String,
        /// The same as OP.
        #[arg(long, conflicts_with = "name")]
        filter: Option<String>,
        /// Every operator.
        #[arg(long, conflicts_with_all = ["name", "filter"])]
        all: bool,
        /// cpu, emu, cuda; asan or tsan (the emulator with a checker); plan (entry points and choice of kernels on the
        /// shapes of real models). All of cpu, emu, cuda and plan where none is given.
        #[arg(long, value_delimiter = ',')]
        backend: Vec<String>,
        /// Working type of a GPU: f32 or bf16; both where it is not given.
        #[arg(long)]
        element: Option<String>,
        /// Order in which the emulator's warps and copies advance.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Only this way of running it on a GPU; each that takes a case where it is not given.
        #[arg(long)]
        way: Option<String>,
        /// With a checker, every case; otherwise those that reach another kernel.
        #[arg(long)]
        every: bool,
        /// A backend whose rows must not be skipped.
        #[arg(long, value_name = "BACKEND")]
        require: Option<String>,
    },
    /// Run recorded launches of the probes on a device and compare every byte.
    Replay {
        /// Folder with the recordings.
        folder: PathBuf,
        /// emu or cuda.
        #[arg(long, default_value = "emu")]
        backend: String,
    },
    /// Measure every way of running an operator at the shapes of real models, and keep the fastest of each.
    Tune {
        /// Only operators whose name contains this.
        #[arg(default_value = "")]
        filter: String,
        /// The GPU to measure.
        #[arg(long, default_value = "cuda")]
        backend: String,
        /// Working type of the GPU: f32 or bf16.
        #[arg(long, default_value = "bf16")]
        element: String,
        /// Only cases whose name contains this.
        #[arg(long, default_value = "")]
        case: String,
        /// Measurements of each.
        #[arg(long, default_value_t = 20)]
        samples: usize,
        /// The table whose rows are replaced or added, kernels-cu/tuned.csv of the sources; a new one where there is
        /// none. Nothing is written where it is not given.
        #[arg(long, value_name = "FILE")]
        write: Option<PathBuf>,
        /// Add the times of every way of a call to this file when they are measured.
        #[arg(long, value_name = "FILE")]
        rows: Option<PathBuf>,
    },
    /// Measure both passes at the shapes of real models: `graft bench op`.
    Bench(bench::OpArgs),
}

/// Runs the command.
pub fn run(args: &Args, json: bool) -> Result<()> {
    match &args.command {
        OpCommand::List => list(json),
        OpCommand::Run { op, backend, element, way } => {
            if !contracts::OPS.iter().any(|o| o.name == op) {
                let names: Vec<&str> = contracts::OPS.iter().map(|o| o.name).collect();
                return Err(Error::usage("op", "unknown operator").is(format!("{op:?}")).must(names.join(", ")));
            }
            let way = way.as_deref().map(bench::known_way).transpose()?;
            let mut rows = Vec::new();
            for subject in subjects(backend, element.as_deref(), 0, false)? {
                rows.extend(conformance(&subject, &format!("={op}"), way)?);
            }
            if rows.is_empty() {
                return Err(Error::failure("op run", "no kernel").is(op).fix("use --backend cpu"));
            }
            finish(rows, json)
        }
        OpCommand::Check { name, filter, all: _, backend, element, seed, way, every, require } => {
            let filter = filter.as_deref().unwrap_or(name);
            if !contracts::OPS.iter().any(|op| op.name.contains(filter)) {
                return Err(Error::usage("--filter", "no such operator")
                    .is(format!("{filter:?}"))
                    .must("part of an operator's name"));
            }
            let way = way.as_deref().map(bench::known_way).transpose()?;
            let all = ["cpu", "emu", "plan", "cuda"].map(String::from);
            let mut rows = Vec::new();
            for name in if backend.is_empty() { &all[..] } else { backend } {
                match subjects(name, element.as_deref(), *seed, *every) {
                    Ok(found) => {
                        for subject in found {
                            rows.extend(conformance(&subject, filter, way)?);
                        }
                    }
                    // Only a name that was asked for must run; a machine without a GPU is no failure of the rest.
                    Err(e) if !backend.is_empty() => return Err(e),
                    Err(e) => rows.extend(absent(name, &e, filter)),
                }
            }
            if let Some(name) = require {
                require_backend(&mut rows, name)?;
            }
            finish(rows, json)
        }
        OpCommand::Replay { folder, backend } => replay::run(&backend::open(backend)?, folder),
        OpCommand::Tune { filter, backend, element, case, samples, write, rows } => {
            let device = backend::open_as(backend, backend::element(element)?)?;
            let choice = tune::Choice { filter, case, samples: *samples };
            tune::run(&device, &choice, [write.as_deref(), rows.as_deref()], json)
        }
        OpCommand::Bench(args) => bench::run_op(args, json),
    }
}

/// What a `--backend` and an `--element` ask for.
///
/// # Errors
/// An unknown name, or a backend that this machine cannot run.
pub fn subjects(name: &str, element: Option<&str>, seed: u64, every: bool) -> Result<Vec<Subject>> {
    let elements = match element {
        None => vec![DType::F32, DType::BF16],
        Some(element) => vec![backend::element(element)?],
    };
    let checked =
        |build| Ok(elements.iter().map(|&element| Subject::Checked { element, build, seed, every }).collect());
    match name {
        "asan" => checked(Build::Asan),
        "tsan" => checked(Build::Tsan),
        "plan" => Ok(elements.into_iter().map(Subject::Plan).collect()),
        "emu" => elements.into_iter().map(|e| Ok(Subject::Device(backend::emu::open(e, seed)?))).collect(),
        "cuda" => elements.into_iter().map(|e| Ok(Subject::Device(backend::open_as("cuda", e)?))).collect(),
        host => Ok(vec![Subject::Device(backend::open(host)?)]),
    }
}

/// Rows of a backend that cannot run here, with the reason.
fn absent(name: &str, why: &Error, filter: &str) -> Vec<Row> {
    let kind = if name == "cuda" { DeviceKind::Cuda } else { DeviceKind::Emu };
    let chosen = contracts::OPS.iter().filter(|op| op.name.contains(filter) && !op.elements.is_empty());
    let rows = chosen.flat_map(|op| op.cases.iter().map(move |case| (op.name, *case)));
    let verdict = Verdict::Skip(why.problem().to_string());
    rows.map(|(op, case)| Row { op, case, backend: name.to_string(), kind, verdict: verdict.clone() }).collect()
}

fn require_backend(rows: &mut [Row], name: &str) -> Result<()> {
    let mut found = false;
    for row in rows.iter_mut().filter(|r| r.kind.to_string() == name) {
        found = true;
        if let Verdict::Skip(why) = &row.verdict {
            row.verdict = Verdict::Fail(format!("required, but skipped: {why}"));
        }
    }
    if found {
        Ok(())
    } else {
        Err(Error::usage("--require", "no row of that backend").is(format!("{name:?}")).must("cpu, emu or cuda"))
    }
}

fn list(json: bool) -> Result<()> {
    if json {
        let op = |o: &OpInfo| json!({ "name": o.name, "summary": o.summary, "backward": o.backward, "cases": o.cases });
        let site = |k: &crate::nn::operators::Kind| json!({ "name": k.name, "site": k.site, "summary": k.summary, "options": k.options });
        let ops: Vec<Value> = contracts::OPS.iter().map(op).collect();
        let sites: Vec<Value> = REGISTRY.iter().map(site).collect();
        return out::line(format!("{:#}", json!({ "operators": ops, "site_operators": sites })));
    }
    let mut table = Table::new(&["operator", "backward", "cases", "what it does"]);
    for op in contracts::OPS {
        let backward = if op.backward { "yes" } else { "-" };
        table.row([op.name.to_string(), backward.to_string(), op.cases.len().to_string(), op.summary.to_string()]);
    }
    let mut sites = Table::new(&["at a site", "site", "options (default)", "what it does"]);
    for kind in REGISTRY {
        let options: Vec<String> = kind.options.iter().map(|(name, default)| format!("{name} ({default})")).collect();
        sites.row([kind.name.to_string(), kind.site.to_string(), options.join(", "), kind.summary.to_string()]);
    }
    out::line(format!("{table}\n{sites}").trim_end())
}

fn finish(rows: Vec<Row>, json: bool) -> Result<()> {
    let summary = Summary::of(&rows);
    if json {
        let record = |row: &Row| {
            let (verdict, note) = words(row);
            json!({ "op": row.op, "case": row.case, "backend": row.backend, "verdict": verdict, "note": note })
        };
        let list: Vec<Value> = rows.iter().map(record).collect();
        out::line(format!(
            "{:#}",
            json!({ "rows": list, "passed": summary.passed, "failed": summary.failed, "skipped": summary.skipped })
        ))?;
    } else {
        out::bytes(report(&rows).as_bytes())?;
    }
    if summary.good() {
        Ok(())
    } else {
        Err(Error::failure("op check", format!("{} rows failed", summary.failed))
            .is(format!("{} passed", summary.passed)))
    }
}

/// How many rows passed, failed and were skipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Within their bounds.
    pub passed: usize,
    /// Not.
    pub failed: usize,
    /// Not run.
    pub skipped: usize,
}

impl Summary {
    /// Counts rows.
    pub fn of(rows: &[Row]) -> Summary {
        let mut counts = Summary::default();
        for row in rows {
            match row.verdict {
                Verdict::Ok(_) | Verdict::Planned(_) => counts.passed += 1,
                Verdict::Fail(_) => counts.failed += 1,
                Verdict::Skip(_) => counts.skipped += 1,
            }
        }
        counts
    }

    /// Whether something passed and nothing failed.
    pub fn good(self) -> bool {
        self.failed == 0 && self.passed > 0
    }
}

fn words(row: &Row) -> (&'static str, String) {
    match &row.verdict {
        Verdict::Ok(c) => ("ok", format!("worst {:.2} of its bound, rel rms {:.1e}", c.worst, c.rel_rms)),
        Verdict::Planned(launches) => ("ok", format!("planned, launches: {launches}")),
        Verdict::Fail(why) => ("FAIL", why.clone()),
        Verdict::Skip(why) => ("SKIP", why.clone()),
    }
}

/// The conformance table and, as its last line, the counts.
pub fn report(rows: &[Row]) -> String {
    let mut table = Table::new(&["operator", "case", "backend", "verdict", ""]);
    for row in rows {
        let (verdict, note) = words(row);
        table.row([row.op.to_string(), row.case.to_string(), row.backend.clone(), verdict.to_string(), note]);
    }
    let Summary { passed, failed, skipped } = Summary::of(rows);
    format!("{table}{passed} passed, {failed} failed, {skipped} skipped\n")
}
