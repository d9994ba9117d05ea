//! Ours beside peers, in the same run.

use super::rows::{Row, digits, newest, table};
use crate::error::Result;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// Lines at either end of the short table of operators.
const ENDS: usize = 4;
const NO_ROW: &str = "No row is committed yet.";

/// Rows of whole models.
fn model_rows(rows: &[Row]) -> Vec<&Row> {
    let models = rows.iter().filter(|r| r.is_paired() && r.maybe("model").is_some());
    newest(models, |r| {
        [r.device().into(), r.subject(), r.element().into(), r.peer_name().into(), r.value["threads"].to_string()]
    })
}

/// Rows of operators.
fn operator_rows(rows: &[Row]) -> Vec<&Row> {
    // A peer that could not run at all has a row without a case, which counts until it has run.
    let of_peer = |r: &Row| (r.device().to_string(), r.peer_name().to_string());
    let ran = |row: &Row| rows.iter().any(|r| r.maybe("op").is_some() && r.is_paired() && of_peer(r) == of_peer(row));
    let at_all = |r: &Row| r.could_not_run().is_some() && r.maybe("model").is_none() && !ran(r);
    let operators = rows.iter().filter(|r| r.is_paired() && (r.maybe("op").is_some() || at_all(r)));
    newest(operators, |r| {
        let threads = r.value["threads"].to_string();
        let work = r.work().to_string();
        [r.device().into(), r.subject(), r.element().into(), threads, work, r.peer_name().into()]
    })
}

/// The table of the README: models, then the operators that are nearest to and farthest from their targets.
///
/// # Errors
/// A row that lacks a field.
pub fn short(rows: &[Row]) -> Result<String> {
    let mut out = models(rows)?;
    let operators = operator_rows(rows);
    let mut by_device: BTreeMap<&str, Vec<(&Row, f64)>> = BTreeMap::new();
    for &row in operators.iter().filter(|r| r.could_not_run().is_none()) {
        by_device.entry(row.device()).or_default().push((row, row.number("ratio")? / target(row)));
    }
    for (device, mut measured) in by_device {
        measured.sort_by(|a, b| a.1.total_cmp(&b.1));
        let reached = measured.iter().filter(|(_, share)| *share >= 1.0).count();
        let _ = writeln!(
            out,
            "\n{device}: {reached} of {} passes of operators against a peer reach their target. Farthest below and above it (all: [docs/results.md](docs/results.md)):\n",
            measured.len()
        );
        let keep = |i: usize| i < ENDS || i + ENDS >= measured.len();
        let lines: Vec<Vec<String>> = measured
            .iter()
            .enumerate()
            .filter(|(i, _)| keep(*i))
            .map(|(_, (row, _))| operator_line(row))
            .collect::<Result<_>>()?;
        out += &table(&OPERATOR_HEADS[1..], &lines.into_iter().map(|l| l[1..].to_vec()).collect::<Vec<_>>(), NO_ROW);
    }
    out += &absent(&operators);
    Ok(out)
}

/// Whole models, every peer.
///
/// # Errors
/// A row that lacks a field.
pub fn models(rows: &[Row]) -> Result<String> {
    let chosen = model_rows(rows);
    let mut lines = Vec::new();
    for row in chosen.iter().filter(|r| r.could_not_run().is_none()) {
        lines.push(vec![
            row.device().to_string(),
            format!("{}{} {}", row.text("model")?, tokens(row), row.text("work")?),
            count(&row.value["shape"]["batch"]),
            row.element().to_string(),
            count(&row.value["threads"]),
            format!("{:.1}", row.number("ours_ms")?),
            row.peer(),
            format!("{:.1}", row.number("peer_ms")?),
            format!("{:.2}", row.number("ratio")?),
            row.text("commit")?.to_string(),
        ]);
    }
    let heads =
        ["processor", "model and work", "batch", "dtype", "threads", "ours, ms", "peer", "its ms", "ratio", "commit"];
    Ok(table(&heads, &lines, NO_ROW) + &absent(&chosen))
}

const OPERATOR_HEADS: [&str; 10] =
    ["processor", "operator and case", "pass", "dtype", "threads", "ours, ms", "peer", "its ms", "ratio", "target"];

/// Operators, every peer.
///
/// # Errors
/// A row that lacks a field.
pub fn operators(rows: &[Row]) -> Result<String> {
    let chosen = operator_rows(rows);
    let measured = chosen.iter().filter(|r| r.could_not_run().is_none());
    let lines = measured.map(|r| operator_line(r)).collect::<Result<Vec<_>>>()?;
    let reached = lines.iter().filter(|l| !l[9].ends_with("missed")).count();
    let mut out = table(&OPERATOR_HEADS, &lines, NO_ROW);
    if !lines.is_empty() {
        let _ = writeln!(out, "\n{reached} of {} reach their target.", lines.len());
    }
    out += &absent(&chosen);
    Ok(out)
}

/// What a peer's time over ours must be at the least; 1 where a row sets nothing.
fn target(row: &Row) -> f64 {
    row.maybe_number("target").unwrap_or(1.0)
}

fn operator_line(row: &Row) -> Result<Vec<String>> {
    let ratio = row.number("ratio")?;
    let verdict = match row.maybe_number("target") {
        None => "none".to_string(),
        Some(target) if ratio >= target => format!("{target}"),
        Some(target) => format!("{target}: missed"),
    };
    Ok(vec![
        row.device().to_string(),
        row.subject(),
        row.work().to_string(),
        row.element().to_string(),
        count(&row.value["threads"]),
        digits(row.number("ours_ms")?),
        row.peer(),
        digits(row.number("peer_ms")?),
        format!("{ratio:.2}"),
        verdict,
    ])
}

/// The tokens of a model that runs at several sizes.
fn tokens(row: &Row) -> String {
    row.value["shape"]["tokens"].as_f64().map_or(String::new(), |n| format!(" of {n:.0} tokens"))
}

/// A whole number, however it is written; a dash where there is none, as threads of a GPU.
fn count(value: &serde_json::Value) -> String {
    value.as_f64().map_or("-".to_string(), |n| format!("{n:.0}"))
}

/// The peers that could not run, with their reasons and how many rows each is missing from.
fn absent(rows: &[&Row]) -> String {
    let mut reasons: BTreeMap<(String, String, String), BTreeSet<String>> = BTreeMap::new();
    for row in rows {
        if let Some(why) = row.could_not_run() {
            let key = (row.device().to_string(), row.peer(), why);
            let all = row.subject().is_empty();
            let what = if all { "every row".to_string() } else { format!("{} {}", row.subject(), row.work()) };
            reasons.entry(key).or_default().insert(what);
        }
    }
    if reasons.is_empty() {
        return if rows.is_empty() { String::new() } else { "\nEvery peer that was asked could run.\n".to_string() };
    }
    let mut out = String::from("\nPeers that could not run:\n\n");
    for ((device, peer, why), cases) in reasons {
        let cases: Vec<String> = cases.into_iter().collect();
        let listed = if cases.len() <= 3 { cases.join(", ") } else { format!("{} rows", cases.len()) };
        let _ = writeln!(out, "- {device}, {peer}: {} ({listed})", why.replace('\n', " "));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::rows::tests::row;
    use super::*;
    use serde_json::json;

    fn model(ms: f64) -> Row {
        row(
            json!({ "processor": "X", "case": "c", "dtype": "f32", "model": "DiT-S/2", "work": "forward", "shape": { "batch": 8 },
            "threads": 2, "ours_ms": ms, "peer_ms": 30.0, "ratio": 30.0 / ms, "commit": "abc", "peer": { "name": "PyTorch", "version": "2" } }),
        )
    }

    fn operator(case: &str, ratio: f64) -> Row {
        row(json!({ "processor": "X", "op": "gemm", "case": case, "pass": "forward", "dtype": "f32", "threads": 2,
            "ours_ms": 1.0, "peer_ms": ratio, "ratio": ratio, "target": 0.9, "peer": { "name": "PyTorch", "version": "2" } }))
    }

    #[test]
    fn the_newest_row_of_a_case_counts() {
        let text = models(&[model(20.0), model(25.0)]).unwrap();
        let want = "| X | DiT-S/2 forward | 8 | f32 | 2 | 25.0 | PyTorch 2 | 30.0 | 1.20 | abc |\n";
        assert!(text.contains(want), "{text}");
        assert!(!text.contains("20.0"), "{text}");
        let mut broken = model(1.0);
        broken.value["ratio"] = json!(null);
        assert!(models(&[broken]).is_err());
    }

    #[test]
    fn the_short_table_has_both_ends_and_names_peers_that_could_not_run() {
        let mut rows: Vec<Row> = (0..20).map(|i| operator(&format!("case_{i:02}"), 0.5 + 0.1 * f64::from(i))).collect();
        let mut absent = operator("case_00", 1.0);
        absent.value["peer"] = json!({ "name": "Candle" });
        absent.value["could_not_run"] = json!("no such operator");
        rows.push(absent);
        let text = short(&rows).unwrap();
        assert!(text.contains("X: 16 of 20 passes"), "{text}");
        let lines: Vec<&str> = text.lines().filter(|l| l.contains("gemm/case")).collect();
        assert_eq!(lines.len(), 2 * ENDS + 1);
        assert!(lines[0].contains("case_00") && lines[0].contains("0.9: missed") && lines[7].contains("case_19"));
        assert_eq!(lines[8], "- X, Candle: no such operator (gemm/case_00 forward)");
        rows.push(row(json!({ "processor": "X", "peer": { "name": "ONNX" }, "could_not_run": "no wheel" })));
        assert!(operators(&rows).unwrap().ends_with("- X, ONNX: no wheel (every row)\n"));
        rows.last_mut().unwrap().value["peer"] = json!({ "name": "PyTorch" });
        assert!(!operators(&rows).unwrap().contains("every row"), "it has run");
        let all = operators(&rows).unwrap();
        assert!(all.contains("16 of 20 reach their target."), "{all}");
    }
}
