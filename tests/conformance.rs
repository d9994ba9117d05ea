//! Conformance: operator × case × backend, every output against the oracle.
//!
//! The emulator's rows are skipped where there is no C++ compiler; `REQUIRE_EMU=1` makes that a failure. `EMU_SOAK=1`
//! runs more seeds and every case in the builds with a checker. An argument chooses operators by part of their name.

use graft_engine::backend::DeviceKind;
use graft_engine::cli::op::{Summary, report, subjects};
use graft_engine::error::{Error, Result};
use graft_engine::ops::check::{Row, Verdict, conformance};
use graft_kernels::generated::OPS;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
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

/// A part of the work that one thread does at a time.
#[derive(Clone)]
struct Share {
    backend: &'static str,
    element: Option<&'static str>,
    seed: u64,
    every: bool,
    filter: String,
}

/// What the process itself runs is one piece of work, because libraries of the emulator are loaded once in a process. The
/// builds with a checker are programs of their own, mostly compiled here: as many at a time as there are processors, the
/// slow ones first.
fn run(filter: &str, soak: bool) -> Result<Vec<Row>> {
    let seeds = if soak { 0..10 } else { 0..3 };
    let own = [("cpu", 0), ("plan", 0), ("cuda", 0)].into_iter().chain(seeds.map(|seed| ("emu", seed)));
    let share = |backend, element, seed, filter: &str| {
        let every = backend == "asan" || soak;
        Share { backend, element, seed, every, filter: filter.to_string() }
    };
    let mut work = vec![own.map(|(backend, seed)| share(backend, None, seed, filter)).collect::<Vec<_>>()];
    let chosen = OPS.iter().filter(|op| op.name.contains(filter) && !op.elements.is_empty());
    for (build, element) in [("tsan", "bf16"), ("asan", "bf16"), ("tsan", "f32"), ("asan", "f32")] {
        work.extend(chosen.clone().map(|op| vec![share(build, Some(element), 0, &format!("={}", op.name))]));
    }
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((at, shares)) = Some(next.fetch_add(1, Relaxed)).and_then(|at| Some((at, work.get(at)?)))
                {
                    let of_share = |share| (of_backend(share), at, share);
                    let finished: Vec<_> = shares.iter().map(of_share).collect();
                    done.lock().unwrap_or_else(PoisonError::into_inner).extend(finished);
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(_, at, _)| *at);
    let mut seconds: Vec<(String, f64)> = Vec::new();
    let mut rows = Vec::new();
    for ((found, took), _, share) in done {
        let name = format!("{}, {}, seed {}", share.backend, share.element.unwrap_or("every type"), share.seed);
        match seconds.iter_mut().find(|(known, _)| *known == name) {
            Some((_, sum)) => *sum += took,
            None => seconds.push((name, took)),
        }
        rows.extend(found?);
    }
    seconds.iter().for_each(|(name, sum)| println!("conformance: {name}: {sum:.1} s of work"));
    Ok(rows)
}

/// The rows of a share, and the seconds that they took.
fn of_backend(share: &Share) -> (Result<Vec<Row>>, f64) {
    let start = Instant::now();
    let rows = || match subjects(share.backend, share.element, share.seed, share.every) {
        Ok(found) => {
            let rows: Result<Vec<_>> = found.iter().map(|subject| conformance(subject, &share.filter, None)).collect();
            Ok(rows?.concat())
        }
        Err(e) => Ok(vec![skipped(share.backend, &e)]),
    };
    (rows(), start.elapsed().as_secs_f64())
}

fn skipped(backend: &str, why: &Error) -> Row {
    let kind = if backend == "cuda" { DeviceKind::Cuda } else { DeviceKind::Emu };
    let verdict = Verdict::Skip(why.problem().to_string());
    Row { op: "all", case: "all", backend: backend.to_string(), kind, verdict }
}
