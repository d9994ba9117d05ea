//! `graft op bench`: the passes of an operator at the shapes of real models, by the device's own clock; on the emulator
//! what they move.

use crate::backend::{Device, emu};
use crate::cli::{out, table::Table};
use crate::error::{Error, Result};
use crate::ops::check::{CaseRow, time_cases};
use crate::tensor::DType;
use graft_kernels::Tier;
use serde_json::{Value, json};
use std::time::Duration;

/// What to measure.
pub struct Choice<'a> {
    /// Part of the operator's name.
    pub filter: &'a str,
    /// Part of the case's name.
    pub case: &'a str,
    /// `forward`, `backward`, or both where it is empty.
    pub pass: &'a str,
    /// Largest case, in GFLOP of a forward call.
    pub gflop: f64,
    /// Measurements of each.
    pub samples: usize,
}

impl Choice<'_> {
    fn takes(&self, device: &Device, row: &CaseRow) -> bool {
        let known = device.is_host() || row.info.elements.iter().any(|e| DType::from(*e) == device.element());
        known
            && row.info.name.contains(self.filter)
            && row.name.contains(self.case)
            && row.flops as f64 <= self.gflop * 1e9
    }

    fn nothing_fits(&self) -> Error {
        Error::usage("op bench", "no case fits")
            .is(format!("operator {:?}, case {:?}, at most {} GFLOP", self.filter, self.case, self.gflop))
            .fix("graft op list names the operators; --gflop sets the largest case")
    }
}

/// Time after which a case on the host takes no further sample.
const PATIENCE: Duration = Duration::from_secs(3);

/// Measures on `device`; a line of JSON a row, or a table.
pub fn run(device: &Device, choice: &Choice<'_>, json: bool) -> Result<()> {
    let mut rows = Vec::new();
    let chosen = |row: &CaseRow| choice.takes(device, row);
    time_cases(device, Tier::Real, &chosen, &mut |row, pass, call| {
        if choice.pass.is_empty() || choice.pass == pass {
            let times = device.time(choice.samples, PATIENCE, call)?;
            let found = record(device, row, pass, times);
            if json {
                out::line(found.to_string())?;
            }
            rows.push(found);
        }
        Ok(())
    })?;
    if rows.is_empty() {
        return Err(choice.nothing_fits());
    }
    if json { Ok(()) } else { out::line(table(&rows).to_string().trim_end()) }
}

/// One row: median, fastest, and what they mean in bytes and operations of the contract.
fn record(device: &Device, row: &CaseRow, pass: &str, mut times: Vec<f64>) -> Value {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
    let median = at(0.5);
    // The contract counts a forward call with every tensor in f32.
    let bytes = row.bytes * device.element().size() / 4;
    let forward = pass == "forward";
    json!({
        "op": row.info.name,
        "case": row.name,
        "pass": pass,
        "backend": device.kind().to_string(),
        "element": device.element().to_string(),
        "device": device.describe(),
        "ms": median,
        "ms_min": at(0.0),
        "ms_p90": at(0.9),
        "samples": times.len(),
        "gb_per_s": forward.then(|| bytes as f64 / median / 1e6),
        "tflop_per_s": forward.then(|| row.flops as f64 / median / 1e9),
    })
}

fn table(rows: &[Value]) -> Table {
    let mut table = Table::new(&["operator", "case", "pass", "median ms", "fastest", "p90", "GB/s", "TFLOP/s"]);
    let number =
        |row: &Value, key: &str, digits: usize| row[key].as_f64().map_or("-".into(), |v| format!("{v:.digits$}"));
    for row in rows {
        let word = |key: &str| row[key].as_str().unwrap_or_default().to_string();
        table.row([
            word("op"),
            word("case"),
            word("pass"),
            number(row, "ms", 4),
            number(row, "ms_min", 4),
            number(row, "ms_p90", 4),
            number(row, "gb_per_s", 1),
            number(row, "tflop_per_s", 3),
        ]);
    }
    table
}

/// What the emulator counts of the tiny cases: it has no speed, but it sees every access through the wrappers of
/// `kernels-cu/common`. Sectors are 32 bytes of global memory, conflicts are extra cycles of shared memory.
pub fn count(element: DType, choice: &Choice<'_>, json: bool) -> Result<()> {
    let (emu, device) = emu::open_counting(element)?;
    let mut rows = Vec::new();
    time_cases(&device, Tier::Tiny, &|row| choice.takes(&device, row), &mut |row, pass, call| {
        if !choice.pass.is_empty() && choice.pass != pass {
            return call();
        }
        emu.counters()?;
        call()?;
        let counted = emu.counters()?;
        let sum = |name: &str| -> u64 {
            counted.split_whitespace().filter_map(|w| w.strip_prefix(name)?.parse::<u64>().ok()).sum()
        };
        let found = json!({
            "op": row.info.name,
            "case": row.name,
            "pass": pass,
            "backend": "emu",
            "element": element.to_string(),
            "blocks": sum("blocks="),
            "sectors": sum("sectors="),
            "conflicts": sum("conflicts="),
            "tensor_core_multiply_adds": sum("multiply_adds="),
            "bytes_at_least": (pass == "forward").then_some(row.bytes * element.size() / 4),
        });
        if json {
            out::line(found.to_string())?;
        }
        rows.push(found);
        Ok(())
    })?;
    if rows.is_empty() {
        return Err(choice.nothing_fits());
    }
    if json {
        return Ok(());
    }
    let mut table = Table::new(&["operator", "case", "pass", "blocks", "KB moved", "KB at least", "conflicts"]);
    for row in &rows {
        let word = |key: &str| row[key].as_str().unwrap_or_default().to_string();
        let number = |key: &str| row[key].as_u64().unwrap_or_default();
        let least = row["bytes_at_least"].as_u64().map_or("-".into(), |b| format!("{:.1}", b as f64 / 1e3));
        let moved = format!("{:.1}", number("sectors") as f64 * 32.0 / 1e3);
        let (blocks, conflicts) = (number("blocks").to_string(), number("conflicts").to_string());
        table.row([word("op"), word("case"), word("pass"), blocks, moved, least, conflicts]);
    }
    out::line(table.to_string().trim_end())
}
