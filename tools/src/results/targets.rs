//! What the project wants to reach, beside what was measured; "not measured" where no row answers.

use super::rows::{Row, digits, newest, table};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use toml::{Table, Value};

/// The list.
const FILE: &str = "benches/targets.toml";

/// Everything that a target may say.
const KEYS: [&str; 15] = [
    "group", "name", "device", "cases", "ops", "work", "element", "peer", "axes", "stage", "measure", "calls",
    "at_most", "at_least", "gate",
];

/// One thing to reach.
#[derive(Clone, Debug)]
pub struct Target {
    group: String,
    name: String,
    /// Part of the device's name: `H200`. Empty: any processor, and no GPU.
    device: String,
    /// Subjects as `gated_conv/pixart_2k`, or of models and pictures.
    cases: Vec<String>,
    /// Operators of which every case counts; `*` is all.
    ops: Vec<String>,
    work: Option<String>,
    element: Option<String>,
    /// Part of the peer's name.
    peer: Option<String>,
    axes: BTreeMap<String, f64>,
    stage: Option<String>,
    measure: String,
    /// Calls of the case that the target's work takes.
    calls: f64,
    /// The bound, and whether less is better.
    bound: f64,
    less: bool,
    gate: Option<f64>,
}

/// Every target.
///
/// # Errors
/// A target that lacks a field or has an unknown one.
pub fn read(root: &Path) -> Result<Vec<Target>, String> {
    let path = root.join(FILE);
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    parse(&text)
}

fn parse(text: &str) -> Result<Vec<Target>, String> {
    let file: Table = text.parse().map_err(|e| format!("{FILE}: {e}"))?;
    let Some(list) = file.get("target") else { return Ok(Vec::new()) };
    let list = list.as_array().ok_or_else(|| format!("{FILE}: target must be [[target]]"))?;
    list.iter().map(|t| target(t.as_table().ok_or_else(|| format!("{FILE}: target must be [[target]]"))?)).collect()
}

fn target(t: &Table) -> Result<Target, String> {
    let maybe = |key: &str| t.get(key).and_then(Value::as_str).map(str::to_string);
    let name = maybe("name").ok_or_else(|| format!("{FILE}: a target without a name"))?;
    let text = |key: &str| maybe(key).ok_or_else(|| format!("{FILE}: {name}: no {key}"));
    if let Some(key) = t.keys().find(|k| !KEYS.contains(&k.as_str())) {
        return Err(format!("{FILE}: {name}: unknown field {key}"));
    }
    let number = |value: &Value| value.as_float().or(value.as_integer().map(|n| n as f64));
    let maybe_number = |key: &str| t.get(key).and_then(number);
    let list = |key: &str| -> Vec<String> {
        let values = t.get(key).and_then(Value::as_array).into_iter().flatten();
        values.filter_map(Value::as_str).map(str::to_string).collect()
    };
    let (bound, less) = match (maybe_number("at_most"), maybe_number("at_least")) {
        (Some(most), None) => (most, true),
        (None, Some(least)) => (least, false),
        _ => return Err(format!("{FILE}: {name}: one of at_most and at_least")),
    };
    let axes = t.get("axes").and_then(Value::as_table).into_iter().flatten();
    let axes = axes.filter_map(|(k, v)| Some((k.clone(), number(v)?))).collect();
    let (cases, ops) = (list("cases"), list("ops"));
    if cases.is_empty() && ops.is_empty() {
        return Err(format!("{FILE}: {name}: cases or ops"));
    }
    let (group, device, measure) = (text("group")?, text("device")?, text("measure")?);
    Ok(Target {
        group,
        device,
        cases,
        ops,
        work: maybe("work"),
        element: maybe("element"),
        peer: maybe("peer"),
        axes,
        stage: maybe("stage"),
        measure,
        calls: maybe_number("calls").unwrap_or(1.0),
        bound,
        less,
        gate: maybe_number("gate"),
        name,
    })
}

impl Target {
    fn fits(&self, row: &Row) -> bool {
        let gpu = row.maybe("backend") == Some("cuda") || row.machine().contains("nvidia");
        let device = if self.device.is_empty() { !gpu } else { gpu && row.device().contains(&self.device) };
        let subject = row.subject();
        let op = subject.split('/').next().unwrap_or_default();
        let operators = row.maybe("op").is_some() || row.maybe("bench") == Some("op");
        let case = self.cases.contains(&subject) || operators && self.ops.iter().any(|o| o == "*" || o == op);
        let axis = |name: &String| row.value["axes"][name].as_f64().or(row.maybe_number(name));
        let axes = self.axes.iter().all(|(name, value)| axis(name) == Some(*value));
        let peer = self.peer.as_ref().is_none_or(|p| row.peer_name().contains(p.as_str()));
        device
            && case
            && axes
            && peer
            && row.could_not_run().is_none()
            && self.work.as_ref().is_none_or(|w| row.work() == w)
            && self.element.as_ref().is_none_or(|e| row.element() == e)
    }

    /// What a row says of this target, if it says anything.
    fn value(&self, row: &Row, rows: &[Row]) -> Option<f64> {
        let stage = || row.value["stages"].as_array()?.iter().find(|s| s["stage"].as_str() == self.stage.as_deref());
        match self.measure.as_str() {
            "ms" => Some(row.ms()? * self.calls),
            "seconds" => Some(row.ms()? * self.calls / 1e3),
            "times the peer's speed" => row.maybe_number("ratio"),
            "TFLOP/s" => Some(row.maybe_number("flops")? / row.ms()? / 1e9),
            "images/s" => Some(1e3 * row.value["axes"]["batch"].as_f64()? / row.ms()?),
            "of the copy rate" => Some(row.maybe_number("bytes")? / row.ms()? / rate(row, rows, "copy", "bytes")?),
            "of the product rate" => {
                Some(row.maybe_number("flops")? / row.ms()? / rate(row, rows, "product", "flops")?)
            }
            "times the speed with no graft" => Some(ungrafted(row, rows)? / row.ms()?),
            "of the disk's rate" => row.maybe_number("share"),
            "seconds of the stage" => stage()?["seconds"].as_f64(),
            "GB at the peak of the stage" => Some(stage()?["bytes_peak"].as_f64()? / 1e9),
            _ => None,
        }
    }

    fn reached(&self, value: f64, bound: f64) -> bool {
        if self.less { value <= bound } else { value >= bound }
    }

    fn lines(&self, rows: &[Row]) -> Vec<Vec<String>> {
        let fitting = newest(rows.iter().filter(|r| self.fits(r) && self.value(r, rows).is_some()), |r| {
            let threads = r.value["threads"].to_string();
            let keys = [r.device(), r.work(), r.element(), r.peer_name()].map(str::to_string);
            (keys, r.subject(), threads, r.value["axes"].to_string())
        });
        let sign = if self.less { "≤" } else { "≥" };
        let bound = |value: f64| format!("{sign} {value}");
        let head = |device: &str| {
            let gate = self.gate.map_or("-".to_string(), bound);
            vec![
                self.group.clone(),
                self.name.clone(),
                device.to_string(),
                gate,
                bound(self.bound),
                self.measure.clone(),
            ]
        };
        let devices: BTreeSet<&str> = fitting.iter().map(|r| r.device()).collect();
        if devices.is_empty() {
            let device = if self.device.is_empty() { "any processor" } else { &self.device };
            return vec![[head(device), vec!["not measured".to_string(), String::new()]].concat()];
        }
        let of_device = |device: &str| {
            let of = fitting.iter().filter(|r| r.device() == device);
            let mut values: Vec<(f64, String)> = of
                .filter_map(|r| Some((self.value(r, rows)?, format!("{} {} {}", r.subject(), r.work(), r.element()))))
                .collect();
            values.sort_by(|a, b| if self.less { b.0.total_cmp(&a.0) } else { a.0.total_cmp(&b.0) });
            let reached = values.iter().filter(|(v, _)| self.reached(*v, self.bound)).count();
            let (worst, what) = values.first().cloned().unwrap_or_default();
            let measured = match values.len() {
                1 => digits(worst),
                n => format!("{reached} of {n}; worst {} ({what})", digits(worst)),
            };
            let verdict = match self.gate {
                _ if self.reached(worst, self.bound) => "reached",
                Some(gate) if self.reached(worst, gate) => "gate reached, target missed",
                _ => "missed",
            };
            [head(device), vec![measured, verdict.to_string()]].concat()
        };
        devices.into_iter().map(of_device).collect()
    }
}

/// Bytes or operations per millisecond of the best copy or product of the row's device, ours or a peer's. A product of a
/// model that is faster than the ceiling's own says more of the device.
pub(super) fn rate(row: &Row, rows: &[Row], ceiling: &str, amount: &str) -> Option<f64> {
    let counts = |r: &&Row| match r.maybe("bench") {
        Some("ceiling") => r.maybe("case") == Some(ceiling),
        _ => ceiling == "product" && r.subject().starts_with("gemm/"),
    };
    let fitting = rows.iter().filter(|r| r.device() == row.device()).filter(counts);
    let fastest = |r: &Row| [r.ms(), r.maybe_number("peer_ms")].into_iter().flatten().min_by(f64::total_cmp);
    fitting.filter_map(|r| Some(r.maybe_number(amount)? / fastest(r)?)).max_by(f64::total_cmp)
}

/// Milliseconds of the same work on the same device with no layer grafted.
fn ungrafted(row: &Row, rows: &[Row]) -> Option<f64> {
    let of = |r: &Row| (r.subject(), r.work().to_string(), r.element().to_string(), r.device().to_string());
    let mut axes = row.value["axes"].clone();
    axes["percent grafted"] = 0.0.into();
    rows.iter().rfind(|r| of(r) == of(row) && r.value["axes"] == axes && !r.is_paired())?.ms()
}

/// The table of all targets.
pub fn table_of(rows: &[Row], targets: &[Target]) -> String {
    let lines: Vec<Vec<String>> = targets.iter().flat_map(|t| t.lines(rows)).collect();
    let missing = lines.iter().filter(|l| l[6] == "not measured").count();
    let heads = ["of", "what", "device", "gate", "target", "unit", "measured", ""];
    let mut text = table(&heads, &lines, "No target is listed.");
    if !lines.is_empty() {
        text += &format!("\n{missing} of {} are not measured.\n", lines.len());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::rows::tests::row;
    use super::*;
    use serde_json::json;

    const TEXT: &str = r#"
[[target]]
group = "kernels"
name = "gated conv"
device = "H200"
cases = ["gated_conv/pixart_2k"]
work = "forward"
measure = "ms"
at_most = 0.082
gate = 0.1

[[target]]
group = "kernels"
name = "every operator"
device = ""
ops = ["*"]
measure = "times the peer's speed"
at_least = 0.9
"#;

    #[test]
    fn what_no_row_answers_is_not_measured() {
        let targets = parse(TEXT).unwrap();
        let text = table_of(&[], &targets);
        assert!(text.contains("| kernels | gated conv | H200 | ≤ 0.1 | ≤ 0.082 | ms | not measured |  |"), "{text}");
        assert!(text.ends_with("2 of 2 are not measured.\n"));
        // A processor's row says nothing of a GPU.
        let cpu = row(
            json!({ "bench": "op", "backend": "cpu", "device": "H200?", "case": "gated_conv/pixart_2k", "work": "forward", "ms": 0.01 }),
        );
        assert!(table_of(&[cpu], &targets).contains("2 of 2"));
    }

    #[test]
    fn a_row_answers_its_target_and_the_worst_of_many_counts() {
        let targets = parse(TEXT).unwrap();
        let gpu = |ms: f64| {
            row(
                json!({ "bench": "op", "backend": "cuda", "device": "NVIDIA H200", "case": "gated_conv/pixart_2k", "work": "forward", "ms": ms }),
            )
        };
        let of = |ms: f64| targets[0].lines(&[gpu(9.0), gpu(ms)])[0][6..].to_vec();
        assert_eq!(of(0.08), ["0.0800", "reached"]);
        assert_eq!(of(0.09), ["0.0900", "gate reached, target missed"]);
        assert_eq!(of(0.2), ["0.200", "missed"]);
        let pair = |case: &str, ratio: f64| {
            row(
                json!({ "op": "gemm", "case": case, "pass": "forward", "dtype": "f32", "processor": "X", "ratio": ratio, "peer": { "name": "P" } }),
            )
        };
        let lines = targets[1].lines(&[pair("a", 1.5), pair("b", 0.8)]);
        assert_eq!(lines[0][6..], ["1 of 2; worst 0.800 (gemm/b forward f32)", "missed"]);
    }

    #[test]
    fn a_target_that_cannot_be_is_refused() {
        assert!(parse("[[target]]\nname = \"x\"\nspeed = 1").unwrap_err().contains("unknown field speed"));
        assert!(parse(&TEXT.replace("at_most = 0.082", "")).unwrap_err().contains("at_most"));
    }
}
