//! `graft op list|run|check`: the operators by themselves.

use super::{out, table::Table};
use crate::backend::{self, DeviceKind};
use crate::error::{Error, Result};
use crate::nn::operators::REGISTRY;
use crate::ops::check::{Row, Verdict, conformance};
use crate::ops::contracts;
use graft_kernels::OpInfo;
use serde_json::{Value, json};

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
    /// Run the cases of one operator and show the comparisons.
    Run {
        /// Name in the list.
        op: String,
        /// cpu, oracle, emu or cuda.
        #[arg(long, default_value = "cpu")]
        backend: String,
    },
    /// Compare every case with the oracle on every backend.
    Check {
        /// Only operators whose name contains this.
        #[arg(long, default_value = "")]
        filter: String,
        /// A backend whose rows must not be skipped.
        #[arg(long, value_name = "BACKEND")]
        require: Option<String>,
    },
}

/// Runs the command.
pub fn run(args: &Args, json: bool) -> Result<()> {
    match &args.command {
        OpCommand::List => list(json),
        OpCommand::Run { op, backend } => {
            if !contracts::OPS.iter().any(|o| o.name == op) {
                let names: Vec<&str> = contracts::OPS.iter().map(|o| o.name).collect();
                return Err(Error::usage("op", "unknown operator").is(format!("{op:?}")).must(names.join(", ")));
            }
            let device = backend::open(backend)?;
            let rows = conformance(&device, op)?.into_iter().filter(|r| r.op == op).collect();
            finish(rows, json)
        }
        OpCommand::Check { filter, require } => {
            let mut rows = conformance(&backend::open("cpu")?, filter)?;
            for kind in [DeviceKind::Emu, DeviceKind::Cuda] {
                rows.extend(absent(kind, filter));
            }
            if rows.is_empty() {
                return Err(Error::usage("--filter", "no such operator")
                    .is(format!("{filter:?}"))
                    .must("part of an operator's name"));
            }
            if let Some(name) = require {
                require_backend(&mut rows, name)?;
            }
            finish(rows, json)
        }
    }
}

/// Rows of a backend that cannot run here, with the reason.
fn absent(kind: DeviceKind, filter: &str) -> Vec<Row> {
    let why = match backend::open(&kind.to_string()) {
        Ok(_) => "no kernels for this operator yet".to_string(),
        Err(e) => e.problem().to_string(),
    };
    let chosen = contracts::OPS.iter().filter(|op| op.name.contains(filter));
    let rows = chosen.flat_map(|op| op.cases.iter().map(move |case| (op.name, *case)));
    rows.map(|(op, case)| Row { op, case, backend: kind, verdict: Verdict::Skip(why.clone()) }).collect()
}

fn require_backend(rows: &mut [Row], name: &str) -> Result<()> {
    let mut found = false;
    for row in rows.iter_mut().filter(|r| r.backend.to_string() == name) {
        found = true;
        if let Verdict::Skip(why) = &row.verdict {
            row.verdict = Verdict::Fail(format!("required, but skipped: {why}"));
        }
    }
    if found {
        Ok(())
    } else {
        Err(Error::usage("--require", "unknown backend").is(format!("{name:?}")).must("cpu, emu or cuda"))
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
            json!({ "op": row.op, "case": row.case, "backend": row.backend.to_string(), "verdict": verdict, "note": note })
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
                Verdict::Ok(_) => counts.passed += 1,
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
        Verdict::Fail(why) => ("FAIL", why.clone()),
        Verdict::Skip(why) => ("SKIP", why.clone()),
    }
}

/// The conformance table and, as its last line, the counts.
pub fn report(rows: &[Row]) -> String {
    let mut table = Table::new(&["operator", "case", "backend", "verdict", ""]);
    for row in rows {
        let (verdict, note) = words(row);
        table.row([row.op.to_string(), row.case.to_string(), row.backend.to_string(), verdict.to_string(), note]);
    }
    let Summary { passed, failed, skipped } = Summary::of(rows);
    format!("{table}{passed} passed, {failed} failed, {skipped} skipped\n")
}
