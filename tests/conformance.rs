//! Conformance: operator × case × backend, every output against the oracle.

use graft_engine::backend::Device;
use graft_engine::cli::op::{Summary, report};
use graft_engine::ops::check::conformance;
use std::process::ExitCode;

fn main() -> ExitCode {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let rows = match conformance(&Device::cpu(), &filter) {
        Ok(rows) => rows,
        Err(e) => {
            eprintln!("conformance: {e}");
            return ExitCode::FAILURE;
        }
    };
    print!("{}", report(&rows));
    if Summary::of(&rows).good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
