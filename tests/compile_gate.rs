//! The compile gate: every kernel through the pinned compiler, and the wrappers' machine code beside CUTLASS's.
//!
//! `SKIP` where the compiler cannot be had; `REQUIRE_NVCC=1` makes that a failure. `cargo xtask kernels` writes the
//! table of resources after a change that is meant.

use graft_tools::codegen::workspace_root;
use graft_tools::nvcc::{Function, MainLoop, Nvcc, TABLE, functions, gate, read_table, render_table};
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
    findings.extend(scores(nvcc)?);
    match &nvcc.cutlass {
        Some(headers) => findings.extend(pairs(nvcc, headers)?),
        None => println!("compile gate: SKIP pairs with CUTLASS, whose headers are not installed"),
    }
    Ok(findings)
}

/// A kernel whose main loop has a score: its source and name, scores of a thread in a turn of the loop, and how many of
/// their exponentials must stand before the last wait for products, so that they run beside these.
const SCORES: [(&str, &str, usize, usize); 5] = [
    ("kernels-cu/attention/attention_sm90.cu", "attention_forward_72_128x192", 96, 96),
    ("kernels-cu/attention/attention_sm90.cu", "attention_forward_72_192x112", 56, 56),
    ("kernels-cu/attention/attention_sm90.cu", "attention_forward_72_192x112_exact", 56, 56),
    ("kernels-cu/attention/attention_sm90.cu", "attention_forward_72_192x128", 64, 64),
    ("kernels-cu/attention/attention_sm90.cu", "attention_forward_72_128x128", 64, 64),
];

/// Most operations of a kind per score: one exponential, one maximum, one sum, one scaled difference, half a conversion
/// of two, and a few for each row.
const MOST: [(&str, f64); 8] = [
    ("MUFU.EX2", 1.05),
    ("FMNMX", 1.1),
    ("FFMA", 1.1),
    ("FADD", 1.02),
    ("F2FP", 0.5),
    ("R2UR", 0.0),
    ("LDL", 0.0),
    ("STL", 0.0),
];

/// Attention's main loops execute what they must and no more.
fn scores(nvcc: &Nvcc) -> Result<Vec<String>, String> {
    let mut findings = Vec::new();
    let mut compiled: BTreeMap<&str, String> = BTreeMap::new();
    for (source, kernel, scores, before) in SCORES {
        if !compiled.contains_key(source) {
            compiled.insert(source, nvcc.compile(source, "90a", &["-DELEMENT_BF16".to_string()])?.sass);
        }
        let Some(main) = MainLoop::find(&compiled[source], kernel) else {
            findings.push(format!("{kernel}: no loop with wgmma"));
            continue;
        };
        let counts = main.per_score(scores);
        println!("compile gate: {kernel}: {} operations a turn, per score {counts:.3?}", main.operations.len());
        for (operation, most) in MOST {
            let is = counts[operation];
            if is > most {
                findings.push(format!("{kernel}: {is:.3} {operation} a score; at most {most}"));
            }
        }
        let is = main.before_last_wait("MUFU.EX2");
        if is < before {
            findings.push(format!("{kernel}: {is} exponentials before the last wait; {before} must be"));
        }
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
