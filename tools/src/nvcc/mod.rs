//! The compile gate: every kernel through the real compiler, and what it made of them.
//!
//! A kernel fails on a spill, a stack frame, a performance message of the assembler (`C75xx`), a warning, tensor-core
//! instructions that are meant and missing, or resources that differ from `kernels-cu/resources.csv`.

mod compile;
mod resources;
mod sass;
mod score;

pub use compile::{Compiled, Nvcc};
pub use resources::{Resources, TABLE, read_table, render_table};
pub use sass::{Function, functions};
pub use score::MainLoop;

use crate::parallel::in_parallel;

use graft_codegen::contract::Contract;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Architectures of a source: `<op>_sm90.cu` is for Hopper alone.
pub fn architectures(source: &str) -> &'static [&'static str] {
    if source.ends_with("_sm90.cu") { &["90a"] } else { &["80", "90a"] }
}

/// Every `.cu` below `kernels-cu`, relative to `root`, in order.
///
/// # Errors
/// When a folder cannot be read.
pub fn sources(root: &Path) -> Result<Vec<String>, String> {
    let mut found = Vec::new();
    let mut folders = vec![root.join("kernels-cu")];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        for path in entries.filter_map(Result::ok).map(|e| e.path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "cu") {
                let relative: PathBuf = path.strip_prefix(root).unwrap_or(&path).to_path_buf();
                found.push(relative.display().to_string());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Working types that the contract beside `source` names; one empty name for a source that is of no operator.
fn elements(source: &Path) -> Result<Vec<String>, String> {
    let contract = source.with_file_name("op.toml");
    let Ok(text) = std::fs::read_to_string(&contract) else { return Ok(vec![String::new()]) };
    let contract = Contract::parse(&contract.display().to_string(), &text)?;
    Ok(contract.cuda.map_or(vec![String::new()], |cuda| cuda.elements))
}

/// Compiles every source for every working type and architecture: the resources, and what is wrong with them.
///
/// # Errors
/// When the compiler cannot be run.
pub fn gate(nvcc: &Nvcc, root: &Path) -> Result<(Vec<Resources>, Vec<String>), String> {
    let mut jobs = Vec::new();
    for source in sources(root)? {
        let path = root.join(&source);
        let text = Arc::new(std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?);
        for element in elements(&path)? {
            let of_element = architectures(&source).iter();
            jobs.extend(of_element.map(|arch| (source.clone(), Arc::clone(&text), element.clone(), *arch)));
        }
    }
    let (mut rows, mut findings) = (Vec::new(), Vec::new());
    let compiled = in_parallel(&jobs, |(source, _, element, arch)| {
        let define = (!element.is_empty()).then(|| format!("-DELEMENT_{}", element.to_uppercase()));
        nvcc.compile(source, arch, define.as_slice())
    });
    for ((source, text, element, arch), compiled) in jobs.iter().zip(compiled) {
        match compiled {
            Ok(compiled) => {
                let of_source = resources::collect(source, element, arch, &compiled);
                findings.extend(resources::complaints(source, arch, text, &compiled, &of_source));
                rows.extend(of_source);
            }
            Err(e) => findings.push(format!("{source} {element} for sm_{arch}: {e}")),
        }
    }
    Ok((rows, findings))
}
