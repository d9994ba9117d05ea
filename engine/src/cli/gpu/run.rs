//! Runs the steps: each in a process of its own, within its time and that of the whole.

use super::plan::{RAW, Step};
use super::watch::Watch;
use crate::cli::out;
use crate::error::{Error, Result};
use crate::io::atomic;
use crate::io::jsonl::{self, JsonLog};
use graft_kernels::emu::process::{self, Finished};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// What was done, a line a step.
const LOG: &str = "raw/battery.jsonl";

/// Messages of compute-sanitizer that say it cannot work with the device: no finding about a kernel.
const UNSUPPORTED: [&str; 2] = ["Device not supported", "not supported on this device"];

/// Runs what is not done yet.
pub fn battery(steps: &[Step], folder: &Path, time: Duration) -> Result<()> {
    atomic::ensure_writable_dir(&folder.join(RAW))?;
    let watch = Watch::start();
    let log = folder.join(LOG);
    let mut done = finished(&log)?;
    let mut log = JsonLog::resume(&log, u64::MAX)?;
    let begun = Instant::now();
    let (mut failed, mut skipped) = (0, 0);
    for step in steps {
        if done.get(&step.name).is_some_and(|v| v == "ok") {
            out::line(format!("{:<32} ok (before)", step.name))?;
            continue;
        }
        let left = time.saturating_sub(begun.elapsed());
        let outcome = match reason(step, &done, left) {
            Some(why) => Outcome { verdict: "skip", note: why, seconds: 0.0, rows: Vec::new() },
            None => start(step, folder, step.limit.min(left))?,
        };
        let state = watch.as_ref().map_or(Value::Null, Watch::since);
        failed += usize::from(outcome.verdict == "fail");
        skipped += usize::from(outcome.verdict == "skip");
        out::line(format!("{:<32} {} {:.1} s {}", step.name, outcome.verdict, outcome.seconds, outcome.note))?;
        // A row of a step that failed is no result.
        if let (Some(file), "ok") = (step.rows, outcome.verdict) {
            let mut rows = JsonLog::resume(&folder.join(file), u64::MAX)?;
            for mut row in outcome.rows {
                row["gpu"] = state.clone();
                rows.append(&row)?;
            }
        }
        let Outcome { verdict, note, seconds, .. } = outcome;
        let record = json!({ "step": step.name, "verdict": verdict, "seconds": seconds, "note": note, "gpu": state });
        log.append(&record)?;
        done.insert(step.name.clone(), verdict.to_string());
    }
    out::line(format!("{} steps, {failed} failed, {skipped} skipped; in {}", steps.len(), folder.display()))?;
    if failed == 0 { Ok(()) } else { Err(Error::failure("gpu", format!("{failed} steps failed"))) }
}

struct Outcome {
    verdict: &'static str,
    note: String,
    seconds: f64,
    rows: Vec<Value>,
}

/// Last verdict of every step of the runs before.
fn finished(log: &Path) -> Result<BTreeMap<String, String>> {
    let records = if log.is_file() { jsonl::read(log)? } else { Vec::new() };
    Ok(records
        .iter()
        .filter_map(|v| Some((v["step"].as_str()?.to_string(), v["verdict"].as_str()?.to_string())))
        .collect())
}

/// Why a step is not run.
fn reason(step: &Step, done: &BTreeMap<String, String>, left: Duration) -> Option<String> {
    if let Some(why) = &step.missing {
        return Some(why.clone());
    }
    if let Some(after) = step.after.as_ref().filter(|after| done.get(*after).is_none_or(|v| v != "ok")) {
        return Some(format!("{after} has not passed"));
    }
    (left < Duration::from_secs(2)).then(|| "the time is over".to_string())
}

fn start(step: &Step, folder: &Path, limit: Duration) -> Result<Outcome> {
    let failed = |e: std::io::Error| Error::failure(&step.name, format!("cannot be started: {e}"));
    let this = std::env::current_exe().map_err(failed)?.display().to_string();
    let place = folder.display().to_string();
    let words = step.command.iter().map(|w| if w == "graft" { this.clone() } else { w.replace("{out}", &place) });
    let words: Vec<String> = words.collect();
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    let begun = Instant::now();
    let Finished { status, stdout, stderr } = process::run(&mut command, limit).map_err(failed)?;
    let seconds = begun.elapsed().as_secs_f64();
    let said = || [&stdout, &stderr].into_iter().flat_map(|t| t.lines()).rfind(|l| !l.trim().is_empty());
    let note = said().unwrap_or_default().trim().to_string();
    let verdict = match status {
        None => {
            return Ok(Outcome {
                verdict: "fail",
                note: format!("took longer than {limit:.0?}"),
                seconds,
                rows: Vec::new(),
            });
        }
        Some(status) if status.success() => "ok",
        Some(_) if UNSUPPORTED.iter().any(|u| stdout.contains(u) || stderr.contains(u)) => "skip",
        Some(_) => "fail",
    };
    let rows = stdout.lines().filter_map(|line| serde_json::from_str(line).ok()).filter(Value::is_object).collect();
    Ok(Outcome { verdict, note, seconds, rows })
}

#[cfg(test)]
mod tests {
    use super::super::plan::Stage;
    use super::*;
    use crate::io::files::test_dir;

    fn step(name: &str, shell: &str) -> Step {
        Step {
            name: name.to_string(),
            stage: Stage::Operators,
            command: ["sh", "-c", shell].map(String::from).to_vec(),
            expected: 1,
            limit: Duration::from_millis(400),
            after: None,
            rows: Some("rows.jsonl"),
            missing: None,
        }
    }

    #[test]
    fn rows_of_failed_steps_are_not_kept_and_a_second_run_goes_on() {
        let folder = test_dir("battery");
        let mut steps = vec![
            step("good", "echo '{\"ms\":1}'"),
            step("bad", "echo '{\"ms\":2}'; exit 1"),
            step("slow", "echo '{\"ms\":3}'; sleep 5"),
            step("later", "echo '{\"ms\":4}'"),
        ];
        steps[3].after = Some("bad".to_string());
        let time = Duration::from_secs(60);
        assert!(battery(&steps, &folder, time).unwrap_err().to_string().contains("2 steps failed"));
        let rows = || -> Vec<f64> {
            jsonl::read(&folder.join("rows.jsonl")).unwrap().iter().map(|row| row["ms"].as_f64().unwrap()).collect()
        };
        assert_eq!(rows(), [1.0]);
        steps[1] = step("bad", "echo '{\"ms\":2}'");
        steps.remove(2);
        battery(&steps, &folder, time).unwrap();
        assert_eq!(rows(), [1.0, 2.0, 4.0]);
        battery(&steps, &folder, Duration::ZERO).unwrap();
    }
}
