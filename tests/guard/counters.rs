//! What the emulator counts of the smallest case of every way to run the operators that matter most, both passes; where an
//! operator has no ways, of every set of kernels that it launches.

use super::Outcome;
use super::table::Measured;
use graft_engine::backend::emu::{self, Recorder};
use graft_engine::error::Result;
use graft_engine::ops::check::time_cases;
use graft_engine::ops::contracts;
use graft_engine::tensor::DType;
use graft_kernels::{OpInfo, Tier, ways};
use std::collections::BTreeMap;

/// The counters, by the words of the emulator: grid blocks, 32-byte sectors of global memory, extra cycles of shared
/// memory, rows of bulk copies, multiply-adds of the tensor cores.
const COUNTED: [(&str, &str); 5] = [
    ("blocks", "blocks="),
    ("sectors", "sectors="),
    ("conflicts", "conflicts="),
    ("rows", "rows="),
    ("multiply-adds", "multiply_adds="),
];

/// The operators that are counted: those whose time is most of a model's. Others may be added; each costs a compilation
/// for the emulator, which conformance shares.
const OPERATORS: [&str; 8] = [
    "attention",
    "cross_attention",
    "gated_conv",
    "gemm",
    "linear_attention",
    "ln_modulate",
    "rms_norm",
    "window_attention",
];

/// A pass with the way in which it runs, or where there is no choice the kernels that it launches.
type Run = (&'static str, Option<&'static str>, Vec<&'static str>);

/// The kernels that a pass of a case launches in a way, in the order of their names; none where it does not take the way.
fn kernels(
    row: (&'static str, &'static str),
    pass: &str,
    way: Option<&'static str>,
    element: DType,
) -> Result<Option<Vec<&'static str>>> {
    let (recorder, device) = Recorder::open(element, false);
    let mut takes = false;
    time_cases(&device, Tier::Tiny, &|r| (r.info.name, r.name) == row, &mut |_, of, call| {
        if of == pass {
            let (planned, met) = match way {
                Some(way) => ways::force(way, &mut *call),
                None => (call(), true),
            };
            takes = met;
            planned?;
        }
        Ok(())
    })?;
    let Some(recording) = recorder.finish().filter(|_| takes) else { return Ok(None) };
    let mut kernels = recording.kernels;
    kernels.sort_unstable();
    kernels.dedup();
    Ok(Some(kernels))
}

/// The smallest tiny case of each run.
fn smallest(info: &'static OpInfo, element: DType) -> Result<BTreeMap<Run, &'static str>> {
    let (_, device) = Recorder::open(element, false);
    let arch = device.properties().map_or(0, |p| p.arch);
    let mut calls: Vec<(usize, &'static str, &'static str)> = Vec::new();
    time_cases(&device, Tier::Tiny, &|row| row.info.name == info.name, &mut |row, pass, _| {
        calls.push((row.flops.max(row.bytes), row.name, pass));
        Ok(())
    })?;
    calls.sort_by_key(|(cost, ..)| *cost);
    let mut found: BTreeMap<Run, &'static str> = BTreeMap::new();
    for (_, case, pass) in calls {
        let of_pass = info.ways.iter().filter(|w| w.pass == pass && w.arch <= arch);
        let computes = of_pass.filter(|w| w.elements.iter().any(|e| DType::from(*e) == element));
        let mut taken = false;
        for way in computes.map(|way| Some(way.name)) {
            if kernels((info.name, case), pass, way, element)?.is_some() {
                found.entry((pass, way, Vec::new())).or_insert(case);
                taken = true;
            }
        }
        if !taken && let Some(kernels) = kernels((info.name, case), pass, None, element)? {
            found.entry((pass, None, kernels)).or_insert(case);
        }
    }
    Ok(found)
}

/// Counts them.
pub fn measure() -> Outcome {
    let mut values = Vec::new();
    for element in [DType::BF16, DType::F32] {
        let (counting, device) = emu::open_counting(element).map_err(|e| e.to_string())?;
        let own = |info: &&OpInfo| {
            let has = |element: DType| info.elements.iter().any(|e| DType::from(*e) == element);
            OPERATORS.contains(&info.name) && has(element) && (element == DType::BF16 || !has(DType::BF16))
        };
        for info in contracts::OPS.iter().filter(own) {
            let runs = smallest(info, element).map_err(|e| e.to_string())?;
            let choose = |row: &graft_engine::ops::check::CaseRow| {
                row.info.name == info.name && runs.values().any(|case| *case == row.name)
            };
            let mut count = |row: &graft_engine::ops::check::CaseRow,
                             pass: &'static str,
                             call: &mut dyn FnMut() -> graft_engine::error::Result<()>| {
                for ((_, way, _), _) in runs.iter().filter(|((p, ..), case)| *p == pass && **case == row.name) {
                    counting.counters()?;
                    match way {
                        Some(way) => ways::force(way, &mut *call).0?,
                        None => call()?,
                    }
                    let lines = counting.counters()?;
                    let way = way.map_or(String::new(), |way| format!(" {way}"));
                    let case = format!("{}/{} {pass}{way}", info.name, row.name);
                    for (what, word) in COUNTED {
                        let fields = lines.split_whitespace().filter_map(|w| w.strip_prefix(word)?.parse::<u64>().ok());
                        let value = fields.sum();
                        values.push(Measured { on: element.to_string(), case: case.clone(), what: what.into(), value });
                    }
                }
                Ok(())
            };
            time_cases(&device, Tier::Tiny, &choose, &mut count).map_err(|e| e.to_string())?;
        }
    }
    Ok(values)
}
