//! Planted bugs: each `kernels-cu/<op>/mutants.toml` lists wrong versions of its sources, and every one must be caught
//! without a GPU. `make mutants` runs it.
//!
//! A mutant is a text of a source and what replaces it. The operator's conformance runs on the mutated sources, first
//! on the plain emulator (three seeds, both working types), then with the address checker, then with the race checker,
//! until a row fails. Survivors are listed; one whose `survives` says why it cannot be caught here is expected. The run
//! fails when fewer than 95 % are caught, or an expectation is wrong. Arguments choose mutants by part of
//! `<op>: <what>`.

mod mutant;

use graft_engine::backend::emu::SOURCES;
use graft_engine::cli::op::subjects;
use graft_engine::ops::check::{Verdict, conformance};
use graft_kernels::emu::process;
use mutant::Mutant;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

/// Names the operator that a child process checks, its backend and seed.
const CHILD: &str = "GRAFT_MUTANT_CHILD";

/// Longest run of a child; a hang is a catch.
const PATIENCE: Duration = Duration::from_secs(240);

/// What runs on a mutant, in order of cost.
const CHECKS: [(&str, u64); 5] = [("emu", 0), ("emu", 1), ("emu", 2), ("asan", 0), ("tsan", 0)];

/// Share of mutants that must be caught.
const GATE: f64 = 0.95;

fn main() -> ExitCode {
    if let Ok(task) = std::env::var(CHILD) {
        return child(&task);
    }
    let filter: Vec<String> = std::env::args().skip(1).collect();
    match run(&filter) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("mutants: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(filter: &[String]) -> Result<bool, String> {
    // Where the sources are: those of this repository, unless the variable of the emulator names others.
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let root = std::env::var_os(SOURCES).map_or(here, PathBuf::from);
    let mut mutants = mutant::all(&root)?;
    mutants.retain(|m| filter.is_empty() || filter.iter().any(|f| m.to_string().contains(f.as_str())));
    let start = Instant::now();
    let (mut caught, mut wrong, mut survivors) = (0, 0, Vec::new());
    let mut sound = None;
    for mutant in &mutants {
        let folder = root.join("target/mutants");
        // Where the operator itself fails, every catch would be one in name only.
        if sound != Some(mutant.op.as_str()) {
            mutant::copy(&root, &folder)?;
            if let Some(how) = hunt(mutant, &folder)? {
                return Err(format!("{} fails without a planted bug: {how}", mutant.op));
            }
            sound = Some(mutant.op.as_str());
        }
        mutant.plant(&root, &folder)?;
        match hunt(mutant, &folder)? {
            Some(how) => {
                caught += 1;
                println!("caught    {mutant}: {how}");
                if mutant.survives.is_some() {
                    wrong += 1;
                    println!("          but its entry says that it survives: remove that");
                }
            }
            None => {
                println!("SURVIVED  {mutant}: {}", mutant.survives.as_deref().unwrap_or("nobody knows why"));
                survivors.push(mutant);
            }
        }
    }
    let unexplained = survivors.iter().filter(|m| m.survives.is_none()).count();
    println!(
        "mutants: {caught} of {} caught, {unexplained} survivors without a reason, {:.0} s",
        mutants.len(),
        start.elapsed().as_secs_f64()
    );
    Ok(!mutants.is_empty() && caught as f64 >= GATE * mutants.len() as f64 && wrong == 0)
}

/// The check that fails on a planted mutant, and what it says.
fn hunt(mutant: &Mutant, folder: &Path) -> Result<Option<String>, String> {
    for (backend, seed) in CHECKS {
        let task = format!("{} {backend} {seed}", mutant.op);
        let (good, said) = start(&task, folder)?;
        if said.contains("does not compile") {
            return Err(format!("{mutant}: {said}"));
        }
        if !good {
            let line = said.lines().find(|l| !l.trim().is_empty()).unwrap_or("the process died");
            let line: String = line.chars().take(150).collect();
            return Ok(Some(format!("{backend} seed {seed}: {line}")));
        }
    }
    Ok(None)
}

/// Runs a check in a process of its own: whether it was good, and what it said.
fn start(task: &str, folder: &Path) -> Result<(bool, String), String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut command = Command::new(program);
    command.env(CHILD, task).env(SOURCES, folder);
    let done = process::run(&mut command, PATIENCE).map_err(|e| format!("{command:?}: {e}"))?;
    Ok(match done.status {
        None => (false, "takes too long".to_string()),
        Some(status) => (status.success(), done.stdout),
    })
}

fn child(task: &str) -> ExitCode {
    let words: Vec<&str> = task.split(' ').collect();
    let [op, backend, seed] = words[..] else { return ExitCode::FAILURE };
    let checked = subjects(backend, None, seed.parse().unwrap_or(0), false).and_then(|found| {
        let mut failed = 0;
        for subject in found {
            for row in &conformance(&subject, &format!("={op}"), None)? {
                if let Verdict::Fail(why) = &row.verdict {
                    println!("{} on {}: {}", row.case, row.backend, why.lines().next().unwrap_or_default());
                    failed += 1;
                }
            }
        }
        Ok(failed)
    });
    match checked {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(e) => {
            println!("{e}");
            ExitCode::FAILURE
        }
    }
}
