//! `graft op bench`: the passes of an operator at the shapes of real models, by the device's own clock.

use crate::backend::{Device, DeviceKind};
use crate::cli::{out, table::Table};
use crate::error::{Error, Result};
use crate::ops::check::{CaseRow, time_cases};
use crate::tensor::DType;
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

/// Time after which a case on the host takes no further sample.
const PATIENCE: Duration = Duration::from_secs(3);

/// Measures on `device`; a line of JSON a row, or a table.
pub fn run(device: &Device, choice: &Choice<'_>, json: bool) -> Result<()> {
    if device.kind() == DeviceKind::Emu {
        return Err(Error::usage("op bench", "the emulator has no speed")
            .is("--backend emu")
            .must("cpu or cuda")
            .fix("EMU_COUNT=1 in the emulator's tests counts sectors and bank conflicts"));
    }
    let mut rows = Vec::new();
    let chosen = |row: &CaseRow| {
        let known = device.is_host() || row.info.elements.iter().any(|e| DType::from(*e) == device.element());
        known
            && row.info.name.contains(choice.filter)
            && row.name.contains(choice.case)
            && row.flops as f64 <= choice.gflop * 1e9
    };
    time_cases(device, &chosen, &mut |row, pass, call| {
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
        return Err(Error::usage("op bench", "no case fits")
            .is(format!("operator {:?}, case {:?}, at most {} GFLOP", choice.filter, choice.case, choice.gflop))
            .fix("graft op list names the operators; --gflop sets the largest case"));
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
