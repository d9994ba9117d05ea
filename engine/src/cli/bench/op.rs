//! `graft bench op`, which is `graft op bench`: the passes of an operator at the shapes of real models, by the device's own clock; on the emulator
//! what they move.

use super::{Rows, Subject};
use crate::backend::{Device, emu};
use crate::cli::{out, table::Table};
use crate::error::{Error, Result};
use crate::ops::check::{CaseRow, time_cases};
use crate::ops::contracts;
use crate::report::bench::{COLD, Ceilings, Needs, Row};
use crate::tensor::DType;
use graft_kernels::{Tier, ways};
use serde_json::json;
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
    /// On a GPU once more with caches that hold nothing, where a case is small enough for it to matter.
    pub cold: bool,
    /// Only in this way, where it takes the case.
    pub way: Option<&'static str>,
}

/// Larger cases leave nothing in a cache from one call to the next: several times the L2 cache of any GPU.
const CACHED: u64 = 400 << 20;

impl Choice<'_> {
    fn takes(&self, device: &Device, row: &CaseRow) -> bool {
        let known = device.is_host() || row.info.elements.iter().any(|e| DType::from(*e) == device.element());
        known
            && named(row.info.name, self.filter)
            && row.name.contains(self.case)
            && row.flops as f64 <= self.gflop * 1e9
    }

    fn nothing_fits(&self) -> Error {
        Error::usage("op bench", "no case fits")
            .is(format!(
                "operator {:?}, case {:?}, at most {} GFLOP{}",
                self.filter,
                self.case,
                self.gflop,
                self.way.map_or(String::new(), |way| format!(", way {way:?}"))
            ))
            .fix("graft op list names the operators; --gflop sets the largest case")
    }

    /// Runs `work` in the way that was asked for; nothing where the call does not take it.
    fn in_way<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<Option<R>> {
        let Some(name) = self.way else { return work().map(Some) };
        let (result, met) = ways::force(name, work);
        result.map(|result| met.then_some(result))
    }
}

/// Whether a filter takes an operator: its whole name means it alone, and not those whose names contain it.
pub fn named(op: &str, filter: &str) -> bool {
    if contracts::OPS.iter().any(|o| o.name == filter) { op == filter } else { op.contains(filter) }
}

/// Time after which a case on the host takes no further sample.
const PATIENCE: Duration = Duration::from_secs(3);

/// Measures on `device`: a row of every pass into `rows`, which hold the ceilings of the run; that of a forward pass with
/// its prediction from them.
///
/// # Errors
/// No case that fits, and those of the device.
pub(super) fn measure(device: &Device, choice: &Choice<'_>, rows: &mut Rows) -> Result<()> {
    let before = rows.rows.len();
    let chosen = |row: &CaseRow| choice.takes(device, row);
    time_cases(device, Tier::Real, &chosen, &mut |row, pass, call| {
        // A call that does not take the way is not timed at all.
        let takes = choice.way.is_none() || choice.in_way(&mut *call)?.is_some();
        if takes
            && (choice.pass.is_empty() || choice.pass == pass)
            && let Some(times) = choice.in_way(|| device.time(choice.samples, PATIENCE, &mut *call))?
        {
            let subject = Subject { bench: "op", case: format!("{}/{}", row.info.name, row.name), work: pass.into() };
            let mut found = subject.row(device, device.element(), times);
            found.way = choice.way.map(String::from);
            if pass == "forward" {
                // The contract counts a forward call, with every tensor in f32.
                found.flops = Some(row.flops as f64);
                found.bytes = Some((row.bytes * device.element().size() / 4) as f64);
                found.exps = Some(row.exps as f64).filter(|n| *n > 0.0);
                let needs = Needs { flops: row.flops as f64, bytes: found.bytes.unwrap_or(0.0), exps: row.exps as f64 };
                found.predicted_ms = Ceilings::of(&rows.rows, &found).predict(needs);
            }
            rows.put(found.clone())?;
            if choice.cold
                && (row.bytes as u64) < CACHED
                && let Some(times) = choice.in_way(|| device.time_cold(choice.samples, &mut *call))?.flatten()
            {
                let Row { way, flops, bytes, exps, predicted_ms, .. } = found;
                let subject = Subject { bench: "op", case: found.case, work: pass.into() };
                let timed = subject.row(device, device.element(), times);
                let mut cold = Row { way, flops, bytes, exps, predicted_ms, ..timed };
                cold.axes.insert(COLD.to_string(), 1.0);
                rows.put(cold)?;
            }
        }
        Ok(())
    })?;
    if rows.rows.len() == before { Err(choice.nothing_fits()) } else { Ok(()) }
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
        if choice.in_way(&mut *call)?.is_none() {
            return Ok(());
        }
        let counted = emu.counters()?;
        let sum = |name: &str| -> u64 {
            counted.split_whitespace().filter_map(|w| w.strip_prefix(name)?.parse::<u64>().ok()).sum()
        };
        let found = json!({
            "op": row.info.name,
            "case": row.name,
            "pass": pass,
            "way": choice.way,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::emu::Recorder;

    #[test]
    fn only_what_takes_a_way_is_run_in_it() {
        let choice = |way| Choice { filter: "gemm", case: "", pass: "", gflop: 1.0, samples: 1, cold: false, way };
        let taken = |way| {
            let (choice, mut taken) = (choice(way), Vec::new());
            let (_, device) = Recorder::open(DType::BF16, false);
            time_cases(&device, Tier::Tiny, &|row| choice.takes(&device, row), &mut |row, pass, call| {
                taken.extend(choice.in_way(call)?.map(|()| (row.name, pass)));
                Ok(())
            })
            .unwrap();
            taken.len()
        };
        let (all, some) = (taken(None), taken(Some("wgmma_128x128")));
        assert!(0 < some && some < all, "{some} of {all}");
    }

    #[test]
    fn a_whole_name_is_one_operator_and_a_part_is_several() {
        assert!(named("gemm", "gemm") && !named("gemm_fp8", "gemm"));
        assert!(named("gemm_fp8", "gem") && named("attention", "") && !named("attention", "gem"));
    }
}
