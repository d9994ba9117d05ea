//! `graft doctor`: what this machine offers, and what is missing.

use super::{out, table::Table};
use crate::backend::{cpu, cuda};
use crate::error::Result;
use crate::io::{atomic, files};
use serde_json::{Value, json};
use std::path::Path;

/// One finding.
struct Finding {
    what: &'static str,
    /// `ok`, `note` (works without it) or `problem`.
    state: &'static str,
    text: String,
}

/// Runs the command; findings are the result, so it succeeds whatever they are.
pub fn run(json: bool) -> Result<()> {
    let mut findings = vec![version(), processor(), threads(), memory(), disk()];
    findings.extend(driver());
    findings.push(data());
    if json {
        let list: Vec<Value> =
            findings.iter().map(|f| json!({ "what": f.what, "state": f.state, "finding": f.text })).collect();
        return out::line(format!("{:#}", json!({ "findings": list })));
    }
    let mut table = Table::new(&["what", "state", "finding"]);
    for f in &findings {
        table.row([f.what.to_string(), f.state.to_string(), f.text.clone()]);
    }
    out::bytes(table.to_string().as_bytes())
}

fn version() -> Finding {
    let text = format!("graft {} for {} {}", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH);
    Finding { what: "version", state: "ok", text }
}

fn processor() -> Finding {
    let found = cpu::instruction_sets();
    if found.is_empty() {
        let text = "no vector instructions beyond the baseline: everything works, slowly".to_string();
        return Finding { what: "processor", state: "note", text };
    }
    Finding { what: "processor", state: "ok", text: found.join(", ") }
}

fn threads() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Finding { what: "threads", state: "ok", text: format!("{} used of {cores} available", cpu::threads()) }
}

fn memory() -> Finding {
    let text = files::read_text(Path::new("/proc/meminfo")).unwrap_or_default();
    let field = |name: &str| -> Option<f64> {
        let line = text.lines().find(|l| l.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    match (field("MemTotal:"), field("MemAvailable:")) {
        (Some(total), Some(free)) => {
            let (total, free) = (total / 1_048_576.0, free / 1_048_576.0);
            // DiT-XL/2 in f32 with its activations.
            let state = if free < 4.0 { "note" } else { "ok" };
            Finding {
                what: "memory",
                state,
                text: format!("{free:.1} GiB free of {total:.1}; DiT-XL/2 in f32 takes 3.5"),
            }
        }
        _ => Finding { what: "memory", state: "note", text: "the system does not say".to_string() },
    }
}

fn disk() -> Finding {
    match atomic::ensure_writable_dir(Path::new(".")) {
        Ok(()) => Finding { what: "this folder", state: "ok", text: "writable".to_string() },
        Err(e) => Finding { what: "this folder", state: "problem", text: e.to_string() },
    }
}

/// The driver, its devices, and where kernels would come from.
fn driver() -> Vec<Finding> {
    let finding = |what, good, text| Finding { what, state: if good { "ok" } else { "note" }, text };
    let survey = match cuda::survey() {
        Ok(survey) => survey,
        Err(e) => return vec![finding("cuda", false, e.to_string())],
    };
    let version = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
    let text = format!(
        "{} devices, the driver supports CUDA {}; {} ({}) or newer is needed",
        survey.probe.devices,
        version(survey.probe.driver_version),
        version(cuda::OLDEST_DRIVER),
        cuda::OLDEST_PACKAGE
    );
    let mut findings = vec![finding("cuda", true, text)];
    findings.extend(survey.devices.into_iter().map(|d| finding("device", d.good, d.text)));
    let sources = [survey.archive, survey.compiler, survey.cache];
    findings.extend(
        ["kernels", "compiler", "kernel cache"].into_iter().zip(sources).map(|(what, f)| finding(what, f.good, f.text)),
    );
    findings
}

fn data() -> Finding {
    let root = Path::new("data-cache");
    let found = if root.is_dir() { files::list(root).unwrap_or_default() } else { Vec::new() };
    let names: Vec<String> = found.iter().filter(|p| p.is_dir()).map(|p| files::file_name(p)).collect();
    if names.is_empty() {
        let text = "no data-cache folder here: training and evaluation need one; fix: run tools/setup/fetch_data.py"
            .to_string();
        return Finding { what: "data", state: "note", text };
    }
    Finding { what: "data", state: "ok", text: names.join(", ") }
}
