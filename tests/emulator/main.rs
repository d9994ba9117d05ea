//! The emulator: its instructions against plain loops and against tables made by CuTe, its reports against planted
//! faults, correct kernels under many schedules and in all three builds.
//!
//! Rows are `ok`, `FAIL` or `SKIP` with the reason; the counts come last. `REQUIRE_EMU=1` makes a skipped row fail,
//! `EMU_SOAK=1` runs more seeds, and an argument chooses rows by part of their name.

mod clean;
mod cute;
mod data;
mod faults;
mod probes;
mod probes_sm90;
mod wgmma;

use graft_kernels::emu::{Build, Program, Toolchain};
use graft_tools::codegen::workspace_root;
use graft_tools::parallel::in_parallel;
use std::process::ExitCode;
use std::time::Instant;

/// What a row does; any error is its failure.
type Check = Box<dyn Fn(&Program) -> Result<(), String> + Send + Sync>;

/// One row: a name and what it does with a compiled program.
struct Row {
    name: String,
    source: &'static str,
    build: Build,
    check: Check,
}

impl Row {
    fn new(
        name: impl Into<String>,
        source: &'static str,
        build: Build,
        check: impl Fn(&Program) -> Result<(), String> + Send + Sync + 'static,
    ) -> Row {
        Row { name: name.into(), source, build, check: Box::new(check) }
    }
}

fn main() -> ExitCode {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let soak = std::env::var_os("EMU_SOAK").is_some_and(|v| v != "0");
    let mut rows = Vec::new();
    rows.extend(probes::rows());
    rows.extend(probes_sm90::rows());
    rows.extend(wgmma::rows());
    rows.extend(cute::rows());
    rows.extend(faults::rows());
    rows.extend(clean::rows(soak));
    rows.retain(|r| format!("{} {}", r.name, r.build).contains(&filter));
    let root = workspace_root();
    match Toolchain::find(&root, &root.join("target/emu")) {
        Ok(toolchain) => run(&toolchain, &rows),
        Err(why) => {
            for row in &rows {
                println!("{:<44} {:<6} SKIP {why}", row.name, row.build);
            }
            println!("emulator: 0 ok, 0 failed, {} skipped", rows.len());
            let required = std::env::var_os("REQUIRE_EMU").is_some_and(|v| v != "0");
            if required { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
    }
}

/// Runs the rows on every processor; they are printed in their order.
fn run(toolchain: &Toolchain, rows: &[Row]) -> ExitCode {
    let start = Instant::now();
    let mut sources: Vec<(&str, Build)> = rows.iter().map(|r| (r.source, r.build)).collect();
    sources.sort_by_key(|(source, build)| (build.name(), *source));
    sources.dedup();
    let builds: Vec<Build> = Build::ALL.into_iter().filter(|b| sources.iter().any(|(_, of)| of == b)).collect();
    if let Some(e) = in_parallel(&builds, |b| toolchain.prepare(*b)).into_iter().find_map(Result::err) {
        println!("emulator: FAIL the runtime does not compile: {e}");
        return ExitCode::FAILURE;
    }
    let compiled = in_parallel(&sources, |(source, build)| toolchain.compile(&[source.to_string()], None, *build));
    println!("emulator: {} programs ready after {:.1} s", sources.len(), start.elapsed().as_secs_f64());
    let results = in_parallel(rows, |row| {
        let at = sources.iter().position(|s| *s == (row.source, row.build));
        match at.map(|i| &compiled[i]) {
            Some(Ok(program)) => {
                let start = Instant::now();
                ((row.check)(program), start.elapsed())
            }
            Some(Err(e)) => (Err(format!("does not compile: {e}")), Default::default()),
            None => (Err("was not compiled".to_string()), Default::default()),
        }
    });
    let mut failed = 0;
    for (row, (result, time)) in rows.iter().zip(&results) {
        match result {
            Ok(()) => println!("{:<44} {:<6} ok {:>6.2} s", row.name, row.build, time.as_secs_f64()),
            Err(e) => {
                failed += 1;
                println!("{:<44} {:<6} FAIL {e}", row.name, row.build);
            }
        }
    }
    println!(
        "emulator: {} ok, {failed} failed, 0 skipped, {:.1} s",
        rows.len() - failed,
        start.elapsed().as_secs_f64()
    );
    if failed == 0 && !rows.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
