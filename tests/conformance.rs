//! Conformance: operator × case × backend, every output against the oracle.
//!
//! The emulator's rows are skipped where there is no C++ compiler; `REQUIRE_EMU=1` makes that a failure. `EMU_SOAK=1`
//! runs more seeds and every case in the builds with a checker. An argument chooses operators by part of their name.

use graft_engine::backend::DeviceKind;
use graft_engine::cli::op::{Summary, report, subjects};
use graft_engine::error::{Error, Result};
use graft_engine::ops::check::{Row, Verdict, conformance};
use std::process::ExitCode;
use std::time::Instant;

fn main() -> ExitCode {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let set = |name| std::env::var_os(name).is_some_and(|v| v != "0");
    let rows = match run(&filter, set("EMU_SOAK")) {
        Ok(rows) => rows,
        Err(e) => {
            eprintln!("conformance: {e}");
            return ExitCode::FAILURE;
        }
    };
    print!("{}", report(&rows));
    let missing = |kind| rows.iter().any(|r| r.kind == kind && matches!(r.verdict, Verdict::Skip(_)));
    let required = [("REQUIRE_EMU", DeviceKind::Emu), ("REQUIRE_GPU", DeviceKind::Cuda)];
    if let Some((name, kind)) = required.into_iter().find(|(name, kind)| set(name) && missing(*kind)) {
        println!("conformance: {name} is set, and rows of {kind} were skipped");
        return ExitCode::FAILURE;
    }
    if Summary::of(&rows).good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(filter: &str, soak: bool) -> Result<Vec<Row>> {
    let seeds = if soak { 0..10 } else { 0..3 };
    let mut plan: Vec<(&str, u64)> = vec![("cpu", 0), ("plan", 0), ("cuda", 0)];
    plan.extend(seeds.map(|seed| ("emu", seed)));
    let mut rows = Vec::new();
    for (backend, seed) in plan {
        rows.extend(of_backend(backend, None, seed, false, filter)?);
    }
    // The builds with a checker are programs of their own, mostly compiled here: two at a time.
    let checked = ["f32", "bf16"].map(|element| {
        let filter = filter.to_string();
        std::thread::spawn(move || {
            let mut rows = of_backend("asan", Some(element), 0, true, &filter)?;
            rows.extend(of_backend("tsan", Some(element), 0, soak, &filter)?);
            Ok::<_, Error>(rows)
        })
    });
    for thread in checked {
        let died = |_| Error::failure("conformance", "a thread died");
        rows.extend(thread.join().map_err(died)??);
    }
    Ok(rows)
}

fn of_backend(backend: &str, element: Option<&str>, seed: u64, every: bool, filter: &str) -> Result<Vec<Row>> {
    let start = Instant::now();
    let mut rows = Vec::new();
    match subjects(backend, element, seed, every) {
        Ok(found) => {
            for subject in found {
                rows.extend(conformance(&subject, filter, None)?);
            }
        }
        Err(e) => rows.push(skipped(backend, &e)),
    }
    let element = element.unwrap_or("every type");
    println!("conformance: {backend}, {element}, seed {seed}: {:.1} s", start.elapsed().as_secs_f64());
    Ok(rows)
}

fn skipped(backend: &str, why: &Error) -> Row {
    let kind = if backend == "cuda" { DeviceKind::Cuda } else { DeviceKind::Emu };
    let verdict = Verdict::Skip(why.problem().to_string());
    Row { op: "all", case: "all", backend: backend.to_string(), kind, verdict }
}
