//! What grows without anybody noticing, and needs no clock to be seen: allocations, what kernels move on the emulator,
//! instructions, the size of the program, its system calls at the start.
//!
//! `benches/guard.csv` holds what was accepted; a value that grew beyond its tolerance fails. Where growth is wanted,
//! `GRAFT_GUARD=accept cargo test --release -p graft-engine --test guard` rewrites the file, and the commit says why.
//! A kind that cannot be measured on a machine is skipped with its reason; `REQUIRE_EMU=1` makes that of the emulator a
//! failure.

#[path = "../counting.rs"]
mod counting;

mod allocations;
mod counters;
mod plots;
mod program;
mod table;

use std::path::{Path, PathBuf};
use table::{Measured, Table};

/// The accepted values.
const FILE: &str = "benches/guard.csv";
const ACCEPT: &str = "GRAFT_GUARD=accept cargo test --release -p graft-engine --test guard";

/// What a kind of measurement gives, or why it cannot be made here.
type Outcome = Result<Vec<Measured>, String>;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn nothing_grew() {
    if std::env::var_os("GRAFT_GUARD").is_some_and(|v| v == allocations::PROBE) {
        return allocations::probe();
    }
    let path = root().join(FILE);
    let accept = std::env::var_os("GRAFT_GUARD").is_some_and(|v| v == "accept");
    let mut table = Table::parse(&std::fs::read_to_string(&path).unwrap_or_default()).unwrap();
    let kinds: [(&str, fn() -> Outcome); 5] = [
        ("allocations", allocations::measure),
        ("emulator", counters::measure),
        ("instructions", program::instructions),
        ("size", program::size),
        ("start", program::start),
    ];
    let mut findings = Vec::new();
    for (kind, measure) in kinds {
        let begun = std::time::Instant::now();
        match measure() {
            Err(why) => {
                println!("{kind:<14} SKIP {why}");
                let required = std::env::var_os("REQUIRE_EMU").is_some_and(|v| v != "0");
                assert!(!(required && kind == "emulator"), "{why}");
            }
            Ok(found) => {
                println!("{kind:<14} {} values, {:.1} s", found.len(), begun.elapsed().as_secs_f64());
                assert!(!found.is_empty(), "{kind}: nothing was measured");
                match accept {
                    true => table.accept(kind, &found),
                    false => findings.extend(table.compare(kind, &found)),
                }
            }
        }
    }
    if accept {
        std::fs::write(&path, table.to_string()).unwrap();
        return;
    }
    let (failures, notes): (Vec<_>, Vec<_>) = findings.into_iter().partition(|f| f.fails);
    notes.iter().for_each(|f| println!("{}", f.text));
    let failures: Vec<String> = failures.into_iter().map(|f| f.text).collect();
    assert!(failures.is_empty(), "{}\nwhere this is wanted: {ACCEPT}", failures.join("\n"));
}
