//! The CUDA backend on a machine without a GPU: the real loading of libraries, module cache, launches, graphs and
//! errors, over a fake driver and a fake run-time compiler that stand on the emulator.
//!
//! It proves sequences of calls and what is done about refusals. It says nothing of the hardware, nor of the real
//! driver beyond what is documented of it. Every row runs in processes of its own, which the loader gives the fakes.
//! `REQUIRE_EMU=1` makes a skipped row fail; an argument chooses rows by part of their name.

mod child;
mod fakes;
mod graphs;
mod kernels;
mod lab;
mod machines;
mod memory;
mod model;

use lab::Lab;
use std::process::ExitCode;
use std::time::Instant;

/// A name, and what a row does.
type Row = (&'static str, fn(&Lab) -> Result<(), String>);

fn main() -> ExitCode {
    if let Ok(part) = std::env::var(lab::CHILD) {
        return child::run(&part);
    }
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let rows: Vec<Row> = [memory::ROWS, kernels::ROWS, graphs::ROWS, machines::ROWS, model::ROWS]
        .concat()
        .into_iter()
        .filter(|(name, _)| name.contains(&filter))
        .collect();
    let fakes = match fakes::build() {
        Ok(fakes) => fakes,
        Err(Ok(why)) => {
            rows.iter().for_each(|(name, _)| println!("{name:<44} SKIP {why}"));
            println!("driver: 0 ok, 0 failed, {} skipped", rows.len());
            let required = std::env::var_os("REQUIRE_EMU").is_some_and(|v| v != "0");
            return if required { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
        Err(Err(said)) => {
            println!("driver: FAIL the fake libraries do not compile:\n{said}");
            return ExitCode::FAILURE;
        }
    };
    let (mut good, mut skipped, mut failed) = (0, 0, 0);
    for (name, row) in rows {
        let start = Instant::now();
        let result = Lab::new(&fakes, name).and_then(|lab| row(&lab));
        let time = start.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                good += 1;
                println!("{name:<44} ok {time:>6.2} s");
            }
            Err(why) => match why.strip_prefix("SKIP ") {
                Some(why) => {
                    skipped += 1;
                    println!("{name:<44} SKIP {why}");
                }
                None => {
                    failed += 1;
                    println!("{name:<44} FAIL {why}");
                }
            },
        }
    }
    println!("driver: {good} ok, {failed} failed, {skipped} skipped");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
