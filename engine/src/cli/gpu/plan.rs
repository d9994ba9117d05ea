//! What the battery does, in which order, and for how long at most.

use crate::error::{Error, Result};
use crate::io::files;
use crate::ops::contracts;
use std::path::Path;
use std::time::Duration;

/// A part of the battery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Probes,
    Conformance,
    Sanitizer,
    Operators,
    Models,
}

impl Stage {
    const ALL: [Stage; 5] = [Stage::Probes, Stage::Conformance, Stage::Sanitizer, Stage::Operators, Stage::Models];

    /// Name in flags and files.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Probes => "probes",
            Stage::Conformance => "conformance",
            Stage::Sanitizer => "sanitizer",
            Stage::Operators => "operators",
            Stage::Models => "models",
        }
    }

    /// The stage that a flag names.
    pub fn named(name: &str) -> Result<Stage> {
        Stage::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| {
            let names: Vec<&str> = Stage::ALL.into_iter().map(Stage::name).collect();
            Error::usage("--only", "unknown stage").is(format!("{name:?}")).must(names.join(", "))
        })
    }
}

/// One process of the battery.
#[derive(Clone, Debug)]
pub struct Step {
    /// Name, unique in the battery.
    pub name: String,
    /// Its part.
    pub stage: Stage,
    /// Program and arguments; `graft` is this program.
    pub command: Vec<String>,
    /// Longest run.
    pub limit: Duration,
    /// A step that must have passed: a time counts only where the check did.
    pub after: Option<String>,
    /// File for the lines of JSON that it prints; `{out}` in the command is the folder.
    pub rows: Option<&'static str>,
    /// Why it cannot run on this machine.
    pub missing: Option<String>,
}

impl Step {
    fn new(stage: Stage, what: &str, seconds: u64, command: &[&str]) -> Step {
        Step {
            name: format!("{}/{what}", stage.name()),
            stage,
            command: command.iter().map(|w| w.to_string()).collect(),
            limit: Duration::from_secs(seconds),
            after: None,
            rows: None,
            missing: None,
        }
    }
}

/// Operators in the order of what their speed is worth: those of the models' longest parts first.
const FIRST: [&str; 6] = ["gated_conv", "ln_modulate", "adamw", "attention", "gemm", "window_attention"];

/// Whole forward passes, by size of the model.
const MODELS: [&str; 2] = ["DiT-S/2", "DiT-XL/2"];

/// The battery. `probes` is the folder of recorded cases, `peers` a program that measures others.
///
/// # Errors
/// When the folder of probes cannot be read.
pub fn steps(probes: &Path, peers: Option<&Path>) -> Result<Vec<Step>> {
    let mut ops: Vec<&str> = contracts::OPS.iter().filter(|o| !o.elements.is_empty()).map(|o| o.name).collect();
    let place = |op: &str| FIRST.iter().position(|f| *f == op).unwrap_or(FIRST.len());
    ops.sort_by_key(|op| place(op));
    let mut steps = Vec::new();
    let folder = probes.display().to_string();
    let mut replay = Step::new(Stage::Probes, "replay", 60, &["graft", "op", "replay", &folder, "--backend", "cuda"]);
    if !probes.is_dir() || files::list(probes)?.is_empty() {
        replay.missing = Some(format!("no recorded probes in {folder}"));
    }
    steps.push(replay);
    let check = |op: &str| format!("{}/{op}", Stage::Conformance.name());
    for op in &ops {
        let command = ["graft", "op", "run", op, "--backend", "cuda"];
        steps.push(Step::new(Stage::Conformance, op, 60, &command));
    }
    let sanitizer = on_path("compute-sanitizer");
    for op in ops.iter().take(FIRST.len()) {
        let command = ["compute-sanitizer", "--error-exitcode", "1", "graft", "op", "run", op, "--backend", "cuda"];
        let mut step = Step::new(Stage::Sanitizer, op, 90, &command);
        step.after = Some(check(op));
        step.missing = (!sanitizer).then(|| "compute-sanitizer is not installed".to_string());
        steps.push(step);
    }
    for op in &ops {
        let bf16 = contracts::OPS.iter().any(|o| o.name == *op && o.elements.len() > 1);
        let element = if bf16 { "bf16" } else { "f32" };
        let command =
            ["graft", "--json", "op", "bench", op, "--backend", "cuda", "--element", element, "--gflop", "1e6"];
        let mut step = Step::new(Stage::Operators, op, 60, &command);
        step.after = Some(check(op));
        step.rows = Some("operators.jsonl");
        steps.push(step);
    }
    let script = peers.map_or("peers".to_string(), |p| p.display().to_string());
    let mut beside = Step::new(Stage::Operators, "peers", 240, &["python3", &script, "--out", "{out}/peers.jsonl"]);
    beside.missing = match peers {
        None => Some("no --peers script was given".to_string()),
        Some(path) if !path.is_file() => Some(format!("no file {script}")),
        Some(_) => None,
    };
    steps.push(beside);
    for size in MODELS {
        let command = ["graft", "--json", "gpu", "--model", size];
        let mut step = Step::new(Stage::Models, size, 90, &command);
        step.rows = Some("models.jsonl");
        steps.push(step);
    }
    Ok(steps)
}

/// Whether a program of this name lies in a folder of `PATH`.
fn on_path(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|p| std::env::split_paths(&p).any(|folder| folder.join(program).is_file()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_is_taken_before_its_check() {
        let steps = steps(Path::new("nowhere"), None).unwrap();
        assert!(steps[0].missing.as_deref().is_some_and(|why| why.contains("nowhere")));
        let mut names = Vec::new();
        for step in &steps {
            assert!(!names.contains(&step.name), "{}", step.name);
            assert!(step.after.as_ref().is_none_or(|after| names.contains(after)), "{}", step.name);
            names.push(step.name.clone());
        }
        let timed = steps.iter().filter(|s| s.rows == Some("operators.jsonl"));
        assert!(timed.clone().count() > 10 && timed.clone().all(|s| s.after.is_some()));
        assert_eq!(timed.clone().next().map(|s| s.name.as_str()), Some("operators/gated_conv"));
    }
}
