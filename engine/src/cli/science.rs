//! `graft science STUDY --run DIR`: the jobs of a study, and its report.

use super::graft_run::Bars;
use super::out;
use crate::error::{Error, Result};
use crate::graft::run::RunData;
use crate::graft::science::{self, Job, Runner, Study, Tier};
use crate::io::atomic::{self, RunLock};
use crate::report::format::significant;
use crate::tensor::Device;
use std::path::PathBuf;
use std::str::FromStr;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Study file.
    study: PathBuf,
    /// Folder of its runs. A stopped study goes on from where it was.
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Rows that are run.
    #[arg(long, value_enum, default_value_t)]
    tier: Tier,
    /// Run only these rows.
    #[arg(long, value_name = "ROW")]
    only: Vec<String>,
    /// Run every k-th job from the i-th: parts of a study can run apart, in one folder.
    #[arg(long, value_name = "I/K", default_value = "0/1")]
    jobs: Part,
    /// Say which jobs there are and which are done, and run nothing.
    #[arg(long)]
    list: bool,
    /// Write the report to this folder as well: `report.html`, `table.md` and the raw rows in `rows.jsonl`.
    #[arg(long, value_name = "DIR")]
    publish: Option<PathBuf>,
}

/// A part of the jobs: those whose number leaves `index` when divided by `of`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    index: usize,
    of: usize,
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Part, String> {
        let parts = text.split_once('/').and_then(|(i, k)| Some((i.parse().ok()?, k.parse().ok()?)));
        match parts {
            Some((index, of)) if index < of => Ok(Part { index, of }),
            _ => Err("must be I/K with I from 0 to K-1, such as 0/4".to_string()),
        }
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let study = Study::read(&args.study)?;
    if let Some(name) = args.only.iter().find(|name| study.rows.iter().all(|row| row.name != **name)) {
        let names: Vec<&str> = study.rows.iter().map(|row| row.name.as_str()).collect();
        return Err(Error::usage("--only", "no such row").is(name).must(format!("one of {}", names.join(", "))));
    }
    // Rows that are asked for by name are run whatever their tier.
    let tier = if args.only.is_empty() { args.tier } else { Tier::Full };
    let jobs: Vec<Job<'_>> = study
        .jobs(tier)
        .into_iter()
        .filter(|job| args.only.is_empty() || args.only.contains(&job.row.name))
        .enumerate()
        .filter(|(i, _)| i % args.jobs.of == args.jobs.index)
        .map(|(_, job)| job)
        .collect();
    if args.list {
        for job in &jobs {
            let state = if job.result(&args.run)?.is_some() { "done" } else { "open" };
            out::line(format!("{state}  {} seed {}", job.row.name, job.seed))?;
        }
        return Ok(());
    }
    let device = Device::cpu();
    let runner = Runner::open(&study, &args.run, RunData::load(&study.settings()?.data)?, &device)?;
    for (index, job) in jobs.iter().enumerate() {
        if job.result(&args.run)?.is_some() {
            continue;
        }
        let plan = study.plan(job.row, job.seed)?;
        let mut bars = Bars::new([plan.distill.steps, plan.finetune.steps], &device, None);
        let result = runner.run(*job, &mut |e| bars.report(e));
        bars.finish();
        let done = match result {
            Ok(done) => done,
            // Another process of the same study works on it.
            Err(e) if e.problem() == RunLock::IN_USE => continue,
            Err(e) => return Err(e.context(format!("{} seed {}", job.row.name, job.seed))),
        };
        let frechet = done.and_then(|r| r.last()?.score).map_or("not scored".to_string(), |s| significant(s.frechet));
        out::line(format!("{}/{}  {} seed {}: Fréchet {frechet}", index + 1, jobs.len(), job.row.name, job.seed))?;
        publish(&study, args)?;
    }
    publish(&study, args)
}

fn publish(study: &Study, args: &Args) -> Result<()> {
    let report = science::report(study, &args.run)?;
    report.write(&args.run.join("report.html"))?;
    let Some(folder) = &args.publish else { return Ok(()) };
    atomic::ensure_writable_dir(folder)?;
    report.write(&folder.join("report.html"))?;
    atomic::write_bytes(&folder.join("table.md"), report.markdown().as_bytes())?;
    let mut rows = String::new();
    for job in study.jobs(Tier::Full) {
        if let Some(result) = job.result(&args.run)? {
            rows += &format!("{}\n", result.json()?);
        }
    }
    atomic::write_bytes(&folder.join("rows.jsonl"), rows.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts() {
        assert_eq!("1/4".parse(), Ok(Part { index: 1, of: 4 }));
        for wrong in ["4/4", "1", "a/2", "0/0", "-1/2"] {
            assert!(wrong.parse::<Part>().is_err(), "{wrong}");
        }
    }
}
