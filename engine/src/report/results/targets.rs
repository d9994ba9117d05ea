//! What the project wants to reach, beside what was measured; "not measured" where no row answers.

use super::rows::{Row, digits, newest, table};
use crate::error::{Error, Result};
use crate::io::files;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The list, below the root.
pub const FILE: &str = "benches/targets.toml";

/// What can be read off a row.
const MEASURES: [&str; 11] = [
    "ms",
    "seconds",
    PEERS_SPEED,
    "TFLOP/s",
    "images/s",
    "of the copy rate",
    "of the product rate",
    "times the speed with no graft",
    "of the disk's rate",
    "seconds of the stage",
    "GB at the peak of the stage",
];
/// Read off pairs; everything else is off rows of ours.
const PEERS_SPEED: &str = "times the peer's speed";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    #[serde(default)]
    target: Vec<Target>,
}

/// One thing to reach.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    group: String,
    /// What is to be reached.
    pub name: String,
    /// Part of the device's name: `H200`. Empty: any processor, and no GPU.
    pub device: String,
    /// Subjects as `gated_conv/pixart_2k`, or of models and pictures.
    #[serde(default)]
    cases: Vec<String>,
    /// Operators of which every case counts; `*` is all.
    #[serde(default)]
    ops: Vec<String>,
    work: Option<String>,
    element: Option<String>,
    /// Part of the peer's name.
    peer: Option<String>,
    #[serde(default)]
    axes: BTreeMap<String, f64>,
    stage: Option<String>,
    /// What is read off a row.
    pub measure: String,
    /// Calls of the case that the target's work takes.
    calls: Option<f64>,
    at_most: Option<f64>,
    at_least: Option<f64>,
    gate: Option<f64>,
}

/// What rows say of a target.
pub struct Answer<'r> {
    /// The target.
    pub target: &'r Target,
    /// Name of the device; part of it where nothing was measured.
    pub device: &'r str,
    /// The cases that count with their values, the worst first; none where no row answers.
    pub cases: Vec<(f64, &'r Row)>,
}

/// Every target of a list.
///
/// # Errors
/// A file that cannot be read; a target that lacks a field, or has an unknown one.
pub fn read(path: &Path) -> Result<Vec<Target>> {
    parse(&files::read_text(path)?).map_err(|e| e.context(path.display()))
}

fn parse(text: &str) -> Result<Vec<Target>> {
    let list: List = toml::from_str(text).map_err(|e| Error::failure("targets", e.message()))?;
    for t in &list.target {
        let wrong = |problem: &str| Error::failure(&t.name, problem);
        if t.at_most.is_some() == t.at_least.is_some() {
            return Err(wrong("needs one bound").must("one of at_most and at_least"));
        }
        if t.cases.is_empty() && t.ops.is_empty() {
            return Err(wrong("no row can answer it").must("cases or ops"));
        }
        if !MEASURES.contains(&t.measure.as_str()) {
            return Err(wrong("unknown measure").is(&t.measure).must(MEASURES.join(", ")));
        }
    }
    Ok(list.target)
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
        device
            && case
            && axes
            && row.is_paired() == (self.measure == PEERS_SPEED)
            && self.takes(row)
            && row.could_not_run().is_none()
            && self.work.as_ref().is_none_or(|w| row.work() == w)
            && self.element.as_ref().is_none_or(|e| row.element() == e)
    }

    /// Whether the peer of a row is one of the target's. What does less than the work is no peer of it, unless a target
    /// asks for it by name.
    fn takes(&self, row: &Row) -> bool {
        match &self.peer {
            Some(part) => row.peer_name().contains(part.as_str()),
            None => row.maybe("less").is_none(),
        }
    }

    /// What a row says of this target, if it says anything.
    fn value(&self, row: &Row, rows: &[Row]) -> Option<f64> {
        let stage = || row.value["stages"].as_array()?.iter().find(|s| s["stage"].as_str() == self.stage.as_deref());
        let calls = self.calls.unwrap_or(1.0);
        match self.measure.as_str() {
            "ms" => Some(row.ms()? * calls),
            "seconds" => Some(row.ms()? * calls / 1e3),
            PEERS_SPEED => row.maybe_number("ratio"),
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

    fn bound(&self) -> Option<f64> {
        self.at_most.or(self.at_least)
    }

    /// What must hold first and what is aimed at, in words.
    pub fn bounds(&self) -> [String; 2] {
        let sign = if self.at_most.is_some() { "≤" } else { "≥" };
        [self.gate, self.bound()].map(|bound| bound.map_or("-".to_string(), |value| format!("{sign} {value}")))
    }

    fn reached(&self, value: f64, bound: Option<f64>) -> bool {
        bound.is_some_and(|bound| if self.at_most.is_some() { value <= bound } else { value >= bound })
    }

    /// What `rows` say, an answer for each device; one that has no case where none answers.
    pub fn answers<'r>(&'r self, rows: &'r [Row]) -> Vec<Answer<'r>> {
        let fitting = newest(rows.iter().filter(|r| self.fits(r) && self.value(r, rows).is_some()), |r| {
            let threads = r.value["threads"].to_string();
            (r.measured(), r.peer_name().to_string(), threads)
        });
        let devices: BTreeSet<&str> = fitting.iter().map(|r| r.device()).collect();
        if devices.is_empty() {
            let device = if self.device.is_empty() { "any processor" } else { &self.device };
            return vec![Answer { target: self, device, cases: Vec::new() }];
        }
        let of_device = |device| {
            let of = fitting.iter().filter(|r| r.device() == device);
            let mut cases: Vec<(f64, &Row)> = of.filter_map(|r| Some((self.value(r, rows)?, *r))).collect();
            let less = self.at_most.is_some();
            cases.sort_by(|a, b| if less { b.0.total_cmp(&a.0) } else { a.0.total_cmp(&b.0) });
            Answer { target: self, device, cases }
        };
        devices.into_iter().map(of_device).collect()
    }

    /// The fastest peer at the work of a row with its milliseconds, of those that count for this target.
    pub fn best_peer<'r>(&self, row: &Row, rows: &'r [Row]) -> Option<(&'r str, f64)> {
        let peers = rows.iter().filter(|r| r.is_paired() && self.takes(r) && r.measured() == row.measured());
        let times = peers.filter_map(|r| Some((r.peer_name(), r.maybe_number("peer_ms")?)));
        times.min_by(|a, b| a.1.total_cmp(&b.1))
    }
}

impl Answer<'_> {
    /// The worst value, and how many of several reach the target.
    pub fn measured(&self) -> String {
        let Some((worst, row)) = self.cases.first() else { return "not measured".into() };
        let bound = self.target.bound();
        let reached = self.cases.iter().filter(|(value, _)| self.target.reached(*value, bound)).count();
        match self.cases.len() {
            1 => digits(*worst),
            n => {
                let what = format!("{} {} {}", row.subject(), row.work(), row.element());
                format!("{reached} of {n}; worst {} ({what})", digits(*worst))
            }
        }
    }

    /// Whether the worst value reaches the target; nothing where none was measured.
    pub fn verdict(&self) -> &'static str {
        let target = self.target;
        match self.cases.first() {
            None => "",
            Some((worst, _)) if target.reached(*worst, target.bound()) => "reached",
            Some((worst, _)) if target.reached(*worst, target.gate) => "gate reached, target missed",
            Some(_) => "missed",
        }
    }

    fn line(&self) -> Vec<String> {
        let Target { group, name, measure, .. } = self.target;
        let [gate, bound] = self.target.bounds();
        let words = [group.clone(), name.clone(), self.device.to_string(), gate, bound, measure.clone()];
        [&words[..], &[self.measured(), self.verdict().to_string()]].concat()
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
pub(super) fn table_of(rows: &[Row], targets: &[Target]) -> String {
    let answers: Vec<Answer<'_>> = targets.iter().flat_map(|t| t.answers(rows)).collect();
    let missing = answers.iter().filter(|a| a.cases.is_empty()).count();
    let heads = ["of", "what", "device", "gate", "target", "unit", "measured", ""];
    let lines: Vec<Vec<String>> = answers.iter().map(Answer::line).collect();
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
        let of = |ms: f64| targets[0].answers(&[gpu(9.0), gpu(ms)])[0].line()[6..].to_vec();
        assert_eq!(of(0.08), ["0.0800", "reached"]);
        assert_eq!(of(0.09), ["0.0900", "gate reached, target missed"]);
        assert_eq!(of(0.2), ["0.200", "missed"]);
        // A pair is no second measurement of ours, one with a cold cache is: the worst decides.
        let pair = row(json!({ "op": "gated_conv", "case": "pixart_2k", "backend": "cuda", "device": "NVIDIA H200",
            "pass": "forward", "ours_ms": 9.0, "peer_ms": 8.0, "ratio": 8.0 / 9.0, "peer": { "name": "P" } }));
        let mut cold = gpu(9.0);
        cold.value["axes"] = json!({ "cold L2": 1.0 });
        assert_eq!(targets[0].answers(&[gpu(0.08), pair.clone()])[0].measured(), "0.0800");
        let both = targets[0].answers(&[gpu(0.08), pair, cold])[0].measured();
        assert_eq!(both, "1 of 2; worst 9.00 (gated_conv/pixart_2k forward )");
        let pair = |case: &str, ratio: f64| {
            row(
                json!({ "op": "gemm", "case": case, "pass": "forward", "dtype": "f32", "processor": "X", "ratio": ratio, "peer": { "name": "P" } }),
            )
        };
        let rows = [pair("a", 1.5), pair("b", 0.8)];
        let answers = targets[1].answers(&rows);
        assert_eq!(answers[0].line()[6..], ["1 of 2; worst 0.800 (gemm/b forward f32)", "missed"]);
    }

    #[test]
    fn a_peer_that_does_less_counts_only_where_it_is_asked_for() {
        let text = TEXT.replace("device = \"\"", "device = \"H200\"");
        let every = &parse(&text).unwrap()[1];
        let pair = |peer: &str, ms: f64, less: Option<&str>| {
            row(
                json!({ "op": "gemm", "case": "a", "pass": "forward", "dtype": "bf16", "backend": "cuda", "device": "NVIDIA H200",
                "ours_ms": 1.0, "peer_ms": ms, "ratio": ms, "peer": { "name": peer }, "less": less }),
            )
        };
        let rows = [pair("eager", 1.5, None), pair("fused", 1.25, None), pair("alone", 0.5, Some("no epilogue"))];
        assert_eq!(every.answers(&rows)[0].measured(), "2 of 2; worst 1.25 (gemm/a forward bf16)");
        assert_eq!(every.best_peer(&rows[0], &rows), Some(("fused", 1.25)));
        let named = Target { peer: Some("alone".into()), ..every.clone() };
        assert_eq!(named.answers(&rows)[0].line()[6..], ["0.500", "missed"]);
        assert_eq!(named.best_peer(&rows[0], &rows), Some(("alone", 0.5)));
    }

    #[test]
    fn a_target_that_cannot_be_is_refused() {
        let refused = |from: &str, to: &str| parse(&TEXT.replace(from, to)).unwrap_err().to_string();
        assert!(refused("gate = 0.1", "speed = 1").contains("unknown field `speed`"));
        assert!(refused("at_most = 0.082", "").contains("at_most"));
        assert!(refused("measure = \"ms\"", "measure = \"hours\"").contains("is hours; must be ms, seconds"));
        assert!(refused("ops = [\"*\"]", "").contains("cases or ops"));
    }
}
