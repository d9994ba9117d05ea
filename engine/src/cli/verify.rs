//! `graft verify DIR…`.

use super::{Dtype, out, table};
use crate::backend;
use crate::error::{Error, Result};
use crate::verify::{self, Outcome, Verdict};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Folders; every folder below them with a case.json is a case.
    #[arg(required = true, value_name = "DIR")]
    folders: Vec<PathBuf>,
    /// Arithmetic; bf16 where a case has a tolerance for it.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
    /// What computes the models: cpu, oracle, emu or cuda.
    #[arg(long, default_value = "cpu", value_name = "NAME")]
    backend: String,
}

/// Runs the command.
pub fn run(args: &Args, json: bool) -> Result<()> {
    let mut table = table::Table::new(&["case", "tensor", "worst", "rel rms", "tolerance", "verdict"]);
    let outcomes = verify::run_on(&backend::open(&args.backend)?, &args.folders, args.dtype.into(), &mut |outcome| {
        if !json {
            rows(&mut table, outcome);
        }
    })?;
    let failed = outcomes.iter().filter(|o| o.failed()).count();
    let skipped = outcomes.iter().filter(|o| o.skipped().is_some()).count();
    let passed = outcomes.len() - failed - skipped;
    if json {
        let cases: Vec<Value> = outcomes.iter().map(record).collect();
        out::line(format!("{:#}", json!({ "passed": passed, "failed": failed, "skipped": skipped, "cases": cases })))?;
    } else {
        out::line(format!("{table}{passed} passed, {failed} failed, {skipped} skipped"))?;
    }
    if failed == 0 {
        return Ok(());
    }
    let first = outcomes.iter().find(|o| o.failed()).map_or("", |o| o.name.as_str());
    Err(Error::failure("verify", format!("{failed} of {} cases failed", outcomes.len())).is(format!("{first} first")))
}

fn rows(table: &mut table::Table, outcome: &Outcome) {
    for row in &outcome.rows {
        let number = |v: f64| if v.is_nan() { "-".to_string() } else { format!("{v:.1e}") };
        let verdict = match &row.verdict {
            Verdict::Pass => "ok".to_string(),
            Verdict::Fail(why) => format!("FAIL {why}"),
            Verdict::Skip(why) => format!("SKIP {why}"),
        };
        let tensor = row.tensor.clone();
        table.row([
            outcome.name.clone(),
            tensor,
            number(row.worst),
            number(row.relative),
            row.tolerance.clone(),
            verdict,
        ]);
    }
}

fn record(outcome: &Outcome) -> Value {
    let rows: Vec<Value> = outcome
        .rows
        .iter()
        .map(|row| {
            let problem = match &row.verdict {
                Verdict::Pass => Value::Null,
                Verdict::Fail(why) | Verdict::Skip(why) => json!(why),
            };
            json!({
                "tensor": row.tensor,
                "worst": row.worst,
                "relative_rms": row.relative,
                "tolerance": row.tolerance,
                "passed": row.verdict == Verdict::Pass,
                "problem": problem,
            })
        })
        .collect();
    json!({ "case": outcome.name, "folder": outcome.folder.display().to_string(), "passed": outcome.passed(), "skipped": outcome.skipped(), "rows": rows })
}
