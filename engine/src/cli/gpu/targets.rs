//! What the project wants to reach on a GPU (`benches/targets.toml`), beside what a run measured.

use super::pairs::Rows;
use crate::cli::table::Table;
use crate::error::{Error, Result};
use crate::io::files;
use crate::report::format::significant;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// The measure that a warm cache would falsify.
const COPY_RATE: &str = "of the copy rate";

#[derive(Deserialize)]
struct File {
    target: Vec<Target>,
}

/// One thing to reach; the file says what each field is.
#[derive(Clone, Debug, Deserialize)]
pub struct Target {
    name: String,
    device: String,
    #[serde(default)]
    cases: Vec<String>,
    #[serde(default)]
    ops: Vec<String>,
    work: Option<String>,
    element: Option<String>,
    peer: Option<String>,
    #[serde(default)]
    axes: BTreeMap<String, f64>,
    measure: String,
    calls: Option<f64>,
    at_most: Option<f64>,
    at_least: Option<f64>,
    gate: Option<f64>,
}

/// A measured case of a target.
struct Found {
    subject: String,
    value: f64,
    ms: f64,
    /// The fastest peer: name and milliseconds.
    best: Option<(String, f64)>,
}

/// The targets of GPUs.
///
/// # Errors
/// A file that cannot be read or is not such a list.
pub fn read(path: &Path) -> Result<Vec<Target>> {
    let failed = |why: String| Error::failure(path.display().to_string(), why);
    let file: File = toml::from_str(&files::read_text(path)?).map_err(|e| failed(e.message().to_string()))?;
    let bound = |t: &&Target| t.at_most.is_some() == t.at_least.is_some();
    match file.target.iter().find(bound) {
        Some(bad) => Err(failed(format!("{}: one of at_most and at_least", bad.name))),
        None => Ok(file.target.into_iter().filter(|t| !t.device.is_empty()).collect()),
    }
}

impl Target {
    /// The row that is measured with nothing varied but what the target names.
    fn fits(&self, row: &Value) -> bool {
        let case = row["case"].as_str().unwrap_or_default();
        let op = case.split('/').next().unwrap_or_default();
        let of = |key: &str, want: &Option<String>| want.as_ref().is_none_or(|w| row[key] == w.as_str());
        let is_op = row["bench"] == "op" && self.ops.iter().any(|o| o == op || o == "*");
        (is_op || self.cases.iter().any(|c| c == case))
            && of("work", &self.work)
            && of("element", &self.element)
            && self.axes.iter().all(|(name, value)| row["axes"][name].as_f64() == Some(*value))
            // From a cache a share of memory's rate says nothing; elsewhere a cold call is another measurement.
            && (row["axes"]["cold L2"].is_null() || self.measure == COPY_RATE)
    }

    fn value(&self, ours: &Value, best: Option<f64>, rows: &Rows) -> Option<f64> {
        let ms = ours["ms"].as_f64()? * self.calls.unwrap_or(1.0);
        match self.measure.as_str() {
            "ms" => Some(ms),
            "seconds" => Some(ms / 1e3),
            "times the peer's speed" => Some(best? / ours["ms"].as_f64()?),
            "TFLOP/s" => Some(ours["flops"].as_f64()? / ours["ms"].as_f64()? / 1e9),
            "images/s" => Some(1e3 * ours["axes"]["batch"].as_f64()? / ms),
            COPY_RATE => Some(ours["bytes"].as_f64()? / ours["ms"].as_f64()? / rate(rows, "copy", "bytes")?),
            "of the product rate" => {
                Some(ours["flops"].as_f64()? / ours["ms"].as_f64()? / rate(rows, "product", "flops")?)
            }
            "times the speed with no graft" => Some(ungrafted(ours, rows)? / ours["ms"].as_f64()?),
            _ => None,
        }
    }

    fn found(&self, rows: &Rows) -> Vec<Found> {
        let one = |ours: &Value| {
            let pairs = Rows { ours: vec![ours.clone()], peers: rows.peers.clone() }.pairs();
            let named = |p: &&Value| match &self.peer {
                Some(part) => p["peer"]["name"].as_str().is_some_and(|name| name.contains(part.as_str())),
                // What does less than the work is no peer of it, unless a target asks for it by name.
                None => p["less"].is_null(),
            };
            let best = pairs
                .iter()
                .filter(named)
                .filter_map(|p| Some((p["peer"]["name"].as_str()?.to_string(), p["peer_ms"].as_f64()?)));
            let best = best.min_by(|a, b| a.1.total_cmp(&b.1));
            let value = self.value(ours, best.as_ref().map(|b| b.1), rows)?;
            let subject = ours["case"].as_str().unwrap_or_default().to_string();
            Some(Found { subject, value, ms: ours["ms"].as_f64()?, best })
        };
        rows.ours.iter().filter(|row| self.fits(row)).filter_map(one).collect()
    }

    fn reached(&self, value: f64, bound: f64) -> bool {
        if self.at_most.is_some() { value <= bound } else { value >= bound }
    }

    fn line(&self, rows: &Rows) -> [String; 8] {
        let sign = if self.at_most.is_some() { "≤" } else { "≥" };
        let bound = |value: Option<f64>| value.map_or("-".to_string(), |v| format!("{sign} {}", significant(v)));
        let target = self.at_most.or(self.at_least);
        let mut found = self.found(rows);
        found.sort_by(
            |a, b| if self.at_most.is_some() { b.value.total_cmp(&a.value) } else { a.value.total_cmp(&b.value) },
        );
        let [gate, aim] = [bound(self.gate), bound(target)];
        let Some(worst) = found.first() else {
            let none = || "-".to_string();
            return [self.name.clone(), "not measured".into(), self.measure.clone(), gate, aim, none(), none(), none()];
        };
        let verdict = match (target, self.gate) {
            (Some(aim), _) if self.reached(worst.value, aim) => "reached",
            (_, Some(gate)) if self.reached(worst.value, gate) => "gate reached",
            _ => "MISSED",
        };
        let name = if found.len() > 1 {
            format!("{} (worst of {}: {})", self.name, found.len(), worst.subject)
        } else {
            self.name.clone()
        };
        let peer = worst.best.as_ref();
        [
            name,
            significant(worst.value),
            self.measure.clone(),
            gate,
            aim,
            verdict.to_string(),
            peer.map_or("-".into(), |(name, ms)| format!("{name}, {ms:.4} ms")),
            peer.map_or("-".into(), |(_, ms)| format!("{:.2}", ms / worst.ms)),
        ]
    }
}

/// Bytes or operations per millisecond of the fastest copy or product, ours or a peer's. A product of a model that is
/// faster than the ceiling's own says more of the device.
fn rate(rows: &Rows, ceiling: &str, amount: &str) -> Option<f64> {
    let counts = |r: &&Value| match r["bench"].as_str() {
        Some("ceiling") => r["case"] == ceiling,
        _ => ceiling == "product" && r["case"].as_str().is_some_and(|case| case.starts_with("gemm/")),
    };
    let fitting = rows.ours.iter().chain(&rows.peers).filter(counts);
    fitting.filter_map(|r| Some(r[amount].as_f64()? / r["ms"].as_f64()?)).max_by(f64::total_cmp)
}

/// Milliseconds of the same work with no layer grafted.
fn ungrafted(row: &Value, rows: &Rows) -> Option<f64> {
    let mut base = row.clone();
    base["axes"]["percent grafted"] = 0.0.into();
    rows.ours.iter().find(|r| super::pairs::subject(r) == super::pairs::subject(&base))?["ms"].as_f64()
}

/// Every target of a GPU with its measurement, the best peer of the worst case and how many times its speed ours is.
pub fn table(targets: &[Target], rows: &Rows) -> Table {
    let mut table = Table::new(&["target", "ours", "unit", "gate", "aim", "", "best peer", "ratio"]);
    targets.iter().for_each(|target| table.row(target.line(rows)));
    table
}

#[cfg(test)]
mod tests {
    use super::super::pairs::tests::row;
    use super::*;

    const TEXT: &str = r#"
[[target]]
group = "g"
name = "attention"
device = "H200"
cases = ["attention/a"]
work = "forward"
calls = 2
measure = "ms"
at_most = 4.6
gate = 5.0

[[target]]
group = "g"
name = "against the library"
device = "H200"
ops = ["gemm"]
peer = "cuBLASLt"
measure = "times the peer's speed"
at_least = 0.97

[[target]]
group = "g"
name = "on a processor"
device = ""
cases = ["x"]
measure = "ms"
at_most = 1
"#;

    fn targets() -> Vec<Target> {
        let file: File = toml::from_str(TEXT).unwrap();
        file.target
    }

    #[test]
    fn what_no_row_answers_is_not_measured() {
        for target in &targets()[..2] {
            assert_eq!(target.line(&Rows::default())[1], "not measured");
        }
    }

    #[test]
    fn the_worst_case_counts_against_the_best_peer() {
        let mut plain = row("gemm/b", 0.9, Some("cuBLASLt"));
        plain["less"] = "no epilogue".into();
        let rows = Rows {
            ours: vec![row("attention/a", 2.4, None), row("gemm/b", 1.0, None), row("gemm/c", 1.0, None)],
            peers: vec![
                row("attention/a", 3.6, Some("SDPA")),
                row("attention/a", 3.0, Some("cuDNN")),
                plain,
                row("gemm/c", 2.0, Some("cuBLASLt")),
            ],
        };
        let list = targets();
        let [attention, gemm, _] = &list[..] else { panic!("three targets") };
        let line = attention.line(&rows);
        assert_eq!((line[1].as_str(), line[5].as_str()), ("4.80", "gate reached"));
        assert_eq!((line[6].as_str(), line[7].as_str()), ("cuDNN, 3.0000 ms", "1.25"));
        let line = gemm.line(&rows);
        assert_eq!((line[1].as_str(), line[5].as_str()), ("0.900", "MISSED"));
        assert!(line[0].contains("worst of 2: gemm/b"), "{}", line[0]);
        let mut whole = row("PixArt-Σ", 100.0, None);
        whole["axes"] = serde_json::json!({ "batch": 2.0, "percent grafted": 0.0 });
        let mut half = whole.clone();
        (half["ms"], half["axes"]["percent grafted"]) = (62.5.into(), 50.0.into());
        assert_eq!(ungrafted(&half, &Rows { ours: vec![whole], peers: Vec::new() }), Some(100.0));
        // A cold row is another measurement.
        let mut cold = row("attention/a", 9.0, None);
        cold["axes"] = serde_json::json!({ "cold L2": 1.0 });
        assert!(!attention.fits(&cold));
    }
}
