//! `graft ablate PLAN --run DIR`: what each stage of a graft contributes.

use super::graft_run::Bars;
use super::{out, table::Table};
use crate::backend::Device;
use crate::error::{Error, Result};
use crate::graft::ablate::{self, HEADER, REPORT};
use crate::graft::plan::Plan;
use crate::graft::run::RunData;
use crate::io::atomic;
use serde_json::json;
use std::path::PathBuf;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Plan file.
    plan: PathBuf,
    /// Folder for the runs and the result; what it already has is not done again.
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Also graft the base's own operators into the same sites, started at random.
    #[arg(long)]
    controls: bool,
    /// Stop after this many updates of this call.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    stop_after: Option<u64>,
}

/// Runs the command.
pub fn run(args: &Args, json: bool) -> Result<()> {
    let device = Device::cpu();
    let plan = Plan::read(&args.plan)?;
    atomic::ensure_writable_dir(&args.run)?;
    let data = RunData::load(&plan.data)?;
    let mut bars = Bars::new([plan.distill.steps, plan.finetune.steps], &device, args.stop_after);
    let found = ablate::ablate(&plan, &args.run, args.controls, &data, &device, &mut |e| bars.report(e))?;
    bars.finish();
    let Some(found) = found else {
        return out::line(if json {
            json!({ "finished": false }).to_string()
        } else {
            "stopped; the same command goes on from here".to_string()
        });
    };
    if json {
        let value = serde_json::to_value(&found).map_err(|e| Error::failure("ablation", e.to_string()))?;
        return out::line(format!("{value:#}"));
    }
    let mut table = Table::new(&HEADER);
    for row in &found.rows {
        table.row(ablate::cells(row));
    }
    out::line(format!("{table}\n{}", args.run.join(REPORT).display()))
}
