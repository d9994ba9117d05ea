//! Conformance: operator × case × backend, every output against the oracle.

use graft_engine::backend::Device;
use graft_engine::ops::check::{Verdict, conformance};
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
    let (mut ok, mut failed, mut skipped) = (0, 0, 0);
    for row in &rows {
        let text = match &row.verdict {
            Verdict::Ok(c) => {
                ok += 1;
                format!("ok    worst {:.2} of its bound, rel rms {:.1e}", c.worst, c.rel_rms)
            }
            Verdict::Fail(why) => {
                failed += 1;
                format!("FAIL  {why}")
            }
            Verdict::Skip(why) => {
                skipped += 1;
                format!("SKIP  {why}")
            }
        };
        println!("{:<17} {:<22} {:<6} {text}", row.op, row.case, row.backend.to_string());
    }
    println!("{ok} passed, {failed} failed, {skipped} skipped");
    if failed == 0 && ok > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
