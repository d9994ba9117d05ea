//! `graft op tune`: every way of running an operator at the shapes of real models; the fastest of each is a row of the
//! table that running reads (`kernels-cu/tuned.csv`).

use crate::backend::Device;
use crate::cli::{bench::op::named, out, table::Table};
use crate::error::{Error, Result};
use crate::io::jsonl::JsonLog;
use crate::io::{atomic, files};
use crate::ops::check::{CaseRow, time_cases};
use crate::tensor::DType;
use graft_kernels::Tier;
use graft_kernels::ways::{self, COLUMNS, Tuned};
use serde_json::json;
use std::path::Path;
use std::time::Duration;

/// What to measure.
pub struct Choice<'a> {
    /// Part of the operator's name.
    pub filter: &'a str,
    /// Part of the case's name.
    pub case: &'a str,
    /// Measurements of each.
    pub samples: usize,
}

/// The times of the ways of one call.
struct Found {
    op: &'static str,
    pass: &'static str,
    shape: &'static str,
    /// Way and median milliseconds, the fastest first.
    times: Vec<(&'static str, f64)>,
}

/// Measures on `device`, prints every time and adds it to `log`, and writes the fastest into `write`: when a call is
/// measured, so that a run that is ended before its time loses none.
pub fn run(device: &Device, choice: &Choice<'_>, [write, log]: [Option<&Path>; 2], json: bool) -> Result<()> {
    let Some(gpu) = device.properties().map(|p| p.name.clone()) else {
        return Err(Error::usage("op tune", "the device has no ways to choose from").is(device.kind()).must("a GPU"));
    };
    // The table that is to be written must be one before an hour is spent on it.
    let text = write.filter(|path| path.is_file()).map(files::read_text).transpose()?;
    let mut rows = match (&text, write) {
        (Some(text), Some(path)) => ways::parse(text)
            .map_err(|why| Error::failure(path.display().to_string(), why).fix("name a table of graft op tune"))?,
        _ => Vec::new(),
    };
    let mut log = log.map(|path| JsonLog::resume(path, u64::MAX)).transpose()?;
    let element = device.element().to_string();
    let found = measure(device, choice, &mut |call| {
        let (way, ms) = call.times[0];
        let row = Tuned { gpu: &gpu, op: call.op, pass: call.pass, element: &element, shape: call.shape, way, ms };
        let same = |r: &Tuned<'_>| {
            (r.gpu, r.op, r.pass, r.element, r.shape) == (row.gpu, row.op, row.pass, row.element, row.shape)
        };
        rows.retain(|r| !same(r));
        rows.push(row);
        if let Some(path) = write {
            atomic::write_bytes(path, render(&mut rows).as_bytes())?;
        }
        let times: Vec<_> = call.times.iter().map(|(way, ms)| json!({ "way": way, "ms": ms })).collect();
        let Found { op, pass, shape, .. } = call;
        let record = json!({ "gpu": gpu, "op": op, "pass": pass, "element": element, "shape": shape, "times": times });
        if let Some(log) = &mut log {
            log.append(&record)?;
        }
        if json { out::line(record) } else { Ok(()) }
    })?;
    if found.is_empty() {
        return Err(Error::usage("op tune", "no case fits")
            .is(format!("operator {:?}, case {:?}", choice.filter, choice.case))
            .fix("docs/ops.md lists the operators that have several ways"));
    }
    if json {
        return Ok(());
    }
    let mut table = Table::new(&["operator", "pass", "shape", "way", "median ms", "of the fastest"]);
    for call in &found {
        for (way, ms) in &call.times {
            let ratio = format!("{:.2}", ms / call.times[0].1);
            let words = [call.op, call.pass, call.shape, way].map(String::from);
            let [op, pass, shape, way] = words;
            table.row([op, pass, shape, way, format!("{ms:.4}"), ratio]);
        }
    }
    out::line(table.to_string().trim_end())
}

fn measure(device: &Device, choice: &Choice<'_>, hear: &mut dyn FnMut(&Found) -> Result<()>) -> Result<Vec<Found>> {
    let element = device.element();
    let mut found = Vec::new();
    let chosen = |row: &CaseRow| {
        row.info.ways.len() > 1 && named(row.info.name, choice.filter) && row.name.contains(choice.case)
    };
    time_cases(device, Tier::Real, &chosen, &mut |row, pass, call| {
        let mut times = Vec::new();
        for info in
            row.info.ways.iter().filter(|w| w.pass == pass && w.elements.iter().any(|e| DType::from(*e) == element))
        {
            let (measured, met) = ways::force(info.name, || device.time(choice.samples, Duration::ZERO, &mut *call));
            let mut measured = measured?;
            if met {
                measured.sort_by(f64::total_cmp);
                times.push((info.name, measured[measured.len() / 2]));
            }
        }
        times.sort_by(|a, b| a.1.total_cmp(&b.1));
        if !times.is_empty() {
            let call = Found { op: row.info.name, pass, shape: row.shape, times };
            hear(&call)?;
            found.push(call);
        }
        Ok(())
    })?;
    Ok(found)
}

/// The table as text, its rows in one order whatever the order of measuring.
fn render(rows: &mut [Tuned<'_>]) -> String {
    rows.sort_by(|a, b| (a.gpu, a.op, a.pass, a.element, a.shape).cmp(&(b.gpu, b.op, b.pass, b.element, b.shape)));
    let lines =
        rows.iter().map(|r| format!("{},{},{},{},{},{},{:.5}\n", r.gpu, r.op, r.pass, r.element, r.shape, r.way, r.ms));
    format!("{COLUMNS}\n{}", lines.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again_in_one_order() {
        let row = |op| Tuned { gpu: "G", op, pass: "forward", element: "bf16", shape: "B=1", way: "cores", ms: 0.25 };
        let text = render(&mut [row("gemm"), row("attention")]);
        assert_eq!(ways::parse(&text).unwrap(), [row("attention"), row("gemm")]);
    }

    #[test]
    fn a_host_device_has_nothing_to_tune() {
        let choice = Choice { filter: "", case: "", samples: 1 };
        let error = run(&Device::cpu(), &choice, [None, None], false).unwrap_err().to_string();
        assert!(error.contains("must be a GPU"), "{error}");
    }
}
