//! The compile gate: every kernel through the pinned compiler, and the wrappers' machine code beside CUTLASS's.
//!
//! `SKIP` where the compiler cannot be had; `REQUIRE_NVCC=1` makes that a failure. `cargo xtask kernels` writes the
//! table of resources after a change that is meant.

use graft_tools::codegen::workspace_root;
use graft_tools::nvcc::{Function, Nvcc, TABLE, functions, gate, read_table, render_table};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

const PAIRS: &str = "tests/gate/pairs_sm90.cu";

fn main() -> ExitCode {
    let root = workspace_root();
    let nvcc = match Nvcc::find(&root) {
        Ok(nvcc) => nvcc,
        Err(why) => {
            println!("compile gate: SKIP {why}");
            let required = std::env::var_os("REQUIRE_NVCC").is_some_and(|v| v != "0");
            return if required { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let findings = match check(&nvcc, &root) {
        Ok(findings) => findings,
        Err(e) => vec![e],
    };
    for finding in &findings {
        println!("compile gate: FAIL {finding}");
    }
    if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn check(nvcc: &Nvcc, root: &Path) -> Result<Vec<String>, String> {
    let (rows, mut findings) = gate(nvcc, root)?;
    println!("compile gate: {} kernels", rows.len());
    let (table, committed) = (render_table(&rows), read_table(root));
    if findings.is_empty() && table != committed {
        let old: Vec<&str> = committed.lines().collect();
        let changed: Vec<&str> = table.lines().filter(|l| !old.contains(l)).take(10).collect();
        findings.push(format!(
            "{TABLE} differs from what the compiler made; run `cargo xtask kernels` and commit it:\n{}",
            changed.join("\n")
        ));
    }
    match &nvcc.cutlass {
        Some(headers) => findings.extend(pairs(nvcc, headers)?),
        None => println!("compile gate: SKIP pairs with CUTLASS, whose headers are not installed"),
    }
    Ok(findings)
}

/// Kernels `ours_x` and `theirs_x` must have the same code.
fn pairs(nvcc: &Nvcc, cutlass: &Path) -> Result<Vec<String>, String> {
    let include = format!("-I{}", cutlass.display());
    // CUTLASS's assertions are code, too.
    let compiled = nvcc.compile(
        PAIRS,
        "90a",
        &[include, "--expt-relaxed-constexpr".to_string(), "-DNDEBUG".to_string(), "-w".to_string()],
    )?;
    let code: BTreeMap<String, Function> = functions(&compiled.sass).into_iter().map(|f| (f.name.clone(), f)).collect();
    let (mut same, mut findings) = (0, Vec::new());
    for (name, ours) in &code {
        let Some(pair) = name.strip_prefix("ours_") else { continue };
        let Some(theirs) = code.get(&format!("theirs_{pair}")) else {
            findings.push(format!("{PAIRS}: {pair} has no second source"));
            continue;
        };
        let (a, b) = (ours.normalised(), theirs.normalised());
        if a == b {
            same += 1;
        } else {
            let at = a.iter().zip(&b).position(|(x, y)| x != y).unwrap_or(a.len().min(b.len()));
            findings.push(format!("{pair}: instruction {at} is {:?}, in CUTLASS {:?}", a.get(at), b.get(at)));
        }
    }
    println!("compile gate: {same} wrappers have the code of CUTLASS's");
    if same < 20 {
        findings.push(format!("{PAIRS}: only {same} pairs are equal"));
    }
    Ok(findings)
}
