//! What the emulator counts of the smallest case of every way to run the operators that matter most, both passes.

use super::Outcome;
use super::table::Measured;
use graft_engine::backend::emu::{self, Recorder};
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
const OPERATORS: [&str; 6] =
    ["attention", "gated_conv", "linear_attention", "ln_modulate", "rms_norm", "window_attention"];

/// A pass with the way in which it runs, if there are several.
type Run = (&'static str, Option<&'static str>);

/// The smallest tiny case that each run takes.
fn smallest(info: &'static OpInfo, element: DType) -> Result<BTreeMap<Run, &'static str>, String> {
    let mut found: BTreeMap<Run, (usize, &'static str)> = BTreeMap::new();
    let (_, device) = Recorder::open(element, false);
    let arch = device.properties().map_or(0, |p| p.arch);
    let choose = |row: &graft_engine::ops::check::CaseRow| row.info.name == info.name;
    time_cases(&device, Tier::Tiny, &choose, &mut |row, pass, call| {
        let of_pass = info.ways.iter().filter(|w| w.pass == pass && w.arch <= arch);
        let computes = of_pass.filter(|w| w.elements.iter().any(|e| DType::from(*e) == element));
        let mut names: Vec<Option<&'static str>> = Vec::new();
        for way in computes {
            let (planned, met) = ways::force(way.name, &mut *call);
            planned?;
            if met {
                names.push(Some(way.name));
            }
        }
        if names.is_empty() {
            names.push(None);
        }
        for name in names {
            let held = found.entry((pass, name)).or_insert((usize::MAX, row.name));
            if row.flops.max(row.bytes) < held.0 {
                *held = (row.flops.max(row.bytes), row.name);
            }
        }
        Ok(())
    })
    .map_err(|e| e.to_string())?;
    Ok(found.into_iter().map(|(run, (_, case))| (run, case)).collect())
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
            let runs = smallest(info, element)?;
            let choose = |row: &graft_engine::ops::check::CaseRow| {
                row.info.name == info.name && runs.values().any(|case| *case == row.name)
            };
            let mut count = |row: &graft_engine::ops::check::CaseRow,
                             pass: &'static str,
                             call: &mut dyn FnMut() -> graft_engine::error::Result<()>| {
                for ((_, way), _) in runs.iter().filter(|((p, _), case)| *p == pass && **case == row.name) {
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
