//! Runs the steps: each in a process of its own, within its time and that of the whole.

use super::plan::{RAW, Step};
use super::schedule::{Round, Schedule, beside};
use super::watch::Watch;
use crate::cli::out;
use crate::error::{Error, Result};
use crate::io::atomic;
use crate::io::jsonl::{self, JsonLog};
use graft_kernels::emu::process::{self, Finished};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What was done, a line a step.
const LOG: &str = "raw/battery.jsonl";

/// What steps that failed wrote, a file each.
const FAILED: &str = "raw/failed";

/// Messages of compute-sanitizer that say it cannot work with the device: no finding about a kernel.
const UNSUPPORTED: [&str; 2] = ["Device not supported", "not supported on this device"];

/// Runs what is not done yet.
pub fn battery(steps: &[Step], folder: &Path, time: Duration) -> Result<()> {
    atomic::ensure_writable_dir(&folder.join(RAW))?;
    atomic::ensure_writable_dir(&folder.join(FAILED))?;
    let watch = Watch::start();
    let log = folder.join(LOG);
    let mut done = finished(&log)?;
    let mut log = JsonLog::resume(&log, u64::MAX)?;
    let begun = Instant::now();
    let before = |step: &&Step| done.get(&step.name).is_some_and(|verdict| verdict == "ok");
    steps.iter().filter(before).try_for_each(|step| out::line(format!("{:<32} ok (before)", step.name)))?;
    let mut over: BTreeSet<&str> = steps.iter().filter(before).map(|step| step.name.as_str()).collect();
    let runs = |step: &&Step| step.missing.is_none() && !over.contains(step.name.as_str());
    let mut schedule = Schedule::new(time, steps.iter().filter(runs));
    let (mut failed, mut skipped) = (0, 0);
    // Checks run side by side: they have no times. Everything else has the GPU to itself.
    let groups = || steps.chunk_by(|a, b| a.beside && b.beside);
    for (round, group) in [Round::Shares, Round::Rest].into_iter().flat_map(|round| groups().map(move |g| (round, g))) {
        let chosen: Vec<&Step> = group.iter().filter(|step| !over.contains(step.name.as_str())).collect();
        let outcomes = side_by_side(&chosen, |step| {
            let room = schedule.room(step, round, begun.elapsed());
            match (reason(step, &done), room) {
                (None, Some(limit)) => start(step, folder, limit).map(Some),
                // It may have its turn when all stages had theirs.
                _ if round == Round::Shares => Ok(None),
                (why, _) => Ok(Some(Outcome::without("skip", why.unwrap_or("the time is over".to_string()), 0.0))),
            }
        });
        let state = watch.as_ref().map_or(Value::Null, Watch::since);
        for (step, outcome) in chosen.into_iter().zip(outcomes) {
            let Some(Outcome { verdict, note, said, seconds }) = outcome? else { continue };
            over.insert(&step.name);
            schedule.ran(step.stage);
            failed += usize::from(verdict == "fail");
            skipped += usize::from(verdict == "skip");
            out::line(format!("{:<32} {verdict} {seconds:.1} s {note}", step.name))?;
            if verdict == "fail" && !said.is_empty() {
                let file = folder.join(FAILED).join(format!("{}.txt", step.name.replace(['/', ' '], "-")));
                atomic::write_bytes(&file, said.as_bytes())?;
            }
            let record =
                json!({ "step": step.name, "verdict": verdict, "seconds": seconds, "note": note, "gpu": state });
            log.append(&record)?;
            done.insert(step.name.clone(), verdict.to_string());
        }
    }
    out::line(format!("{} steps, {failed} failed, {skipped} skipped; in {}", steps.len(), folder.display()))?;
    if failed == 0 { Ok(()) } else { Err(Error::failure("gpu", format!("{failed} steps failed"))) }
}

struct Outcome {
    verdict: &'static str,
    note: String,
    /// All that it wrote.
    said: String,
    seconds: f64,
}

impl Outcome {
    /// One that wrote nothing.
    fn without(verdict: &'static str, note: String, seconds: f64) -> Outcome {
        Outcome { verdict, note, said: String::new(), seconds }
    }
}

/// Does `work` for every step, at most [`beside`] at a time; what came of each, in their order.
fn side_by_side<T: Send>(steps: &[&Step], work: impl Fn(&Step) -> T + Sync) -> Vec<T> {
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..beside().min(steps.len()) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(step) = steps.get(at) else { break };
                    let outcome = work(step);
                    found.lock().unwrap_or_else(PoisonError::into_inner).push((at, outcome));
                }
            });
        }
    });
    let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    found.sort_by_key(|(at, _)| *at);
    found.into_iter().map(|(_, outcome)| outcome).collect()
}

/// Last verdict of every step of the runs before.
fn finished(log: &Path) -> Result<BTreeMap<String, String>> {
    let records = if log.is_file() { jsonl::read(log)? } else { Vec::new() };
    Ok(records
        .iter()
        .filter_map(|v| Some((v["step"].as_str()?.to_string(), v["verdict"].as_str()?.to_string())))
        .collect())
}

/// Why a step cannot run.
fn reason(step: &Step, done: &BTreeMap<String, String>) -> Option<String> {
    if let Some(why) = &step.missing {
        return Some(why.clone());
    }
    let after = step.after.as_ref().filter(|after| done.get(*after).is_none_or(|v| v != "ok"));
    after.map(|after| format!("{after} has not passed"))
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
    let said = format!("{stdout}{stderr}");
    let note = said.lines().rfind(|l| !l.trim().is_empty()).unwrap_or_default().trim().to_string();
    let verdict = match status {
        None => {
            return Ok(Outcome { said, ..Outcome::without("fail", format!("took longer than {limit:.0?}"), seconds) });
        }
        Some(status) if status.success() => "ok",
        Some(_) if UNSUPPORTED.iter().any(|u| stdout.contains(u) || stderr.contains(u)) => "skip",
        Some(_) => "fail",
    };
    Ok(Outcome { verdict, note, said, seconds })
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
            beside: name == "good" || name == "bad",
            missing: None,
        }
    }

    #[test]
    fn what_was_measured_before_a_step_was_ended_is_kept_and_a_second_run_goes_on() {
        let folder = test_dir("battery");
        let mut steps = vec![
            step("good", "exit 0"),
            step("bad", "exit 1"),
            step("slow", "echo 3 >> {out}/rows; sleep 5; echo 3 >> {out}/rows"),
            step("later", "echo 4 >> {out}/rows"),
        ];
        steps[3].after = Some("bad".to_string());
        let time = Duration::from_secs(60);
        assert!(battery(&steps, &folder, time).unwrap_err().to_string().contains("2 steps failed"));
        let rows = || std::fs::read_to_string(folder.join("rows")).unwrap();
        assert_eq!(rows(), "3\n");
        let verdicts = || finished(&folder.join(LOG)).unwrap().into_values().collect::<Vec<_>>();
        assert_eq!(verdicts(), ["fail", "ok", "skip", "fail"]);
        steps[1] = step("bad", "exit 0");
        steps.remove(2);
        battery(&steps, &folder, time).unwrap();
        assert_eq!(rows(), "3\n4\n");
        assert_eq!(verdicts(), ["ok", "ok", "ok", "fail"]);
        battery(&steps, &folder, Duration::ZERO).unwrap();
    }
}
