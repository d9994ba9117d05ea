//! The rules of the house hold for this repository.

use graft_engine::report::results;
use graft_tools::{codegen, tidy};

#[test]
fn every_rule_holds() {
    let findings = tidy::check(&codegen::workspace_root()).unwrap();
    for finding in &findings {
        println!("{finding}");
    }
    let broken = findings.iter().filter(|f| !f.warning).count();
    assert_eq!(broken, 0, "the findings are printed above; `cargo xtask tidy` shows them too");
}

#[test]
fn every_table_of_results_follows_from_its_rows() {
    let stale: Vec<_> = results::stale(&codegen::workspace_root()).unwrap().into_iter().map(|(path, _)| path).collect();
    assert!(stale.is_empty(), "{stale:?}: run `graft bench results` and commit it");
}

#[path = "../mutants/mutant.rs"]
#[allow(dead_code)]
mod mutant;

/// A mutant whose text is gone from its source would plant nothing.
#[test]
fn every_mutant_fits_its_source() {
    let mutants = mutant::all(&codegen::workspace_root()).unwrap();
    assert!(mutants.len() >= 40, "{} mutants", mutants.len());
}
