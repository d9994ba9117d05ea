//! The files of rows: one JSON object a line, the newest of each measurement.

use crate::machine::{commit, processor};
use graft_engine::backend::cpu;
use graft_engine::error::{Error, Result};
use graft_engine::io::{atomic, files::slug, jsonl};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The folder of committed rows of this machine.
pub fn folder(root: &Path) -> PathBuf {
    root.join("benches/results").join(slug(&processor()))
}

/// One object of two; where both have a field, the second's.
pub fn merged(mut first: Value, second: Value) -> Value {
    if let (Some(into), Value::Object(from)) = (first.as_object_mut(), second) {
        into.extend(from);
    }
    first
}

/// What every row states about machine and source.
pub fn origin(root: &Path, threads: usize) -> Value {
    json!({
        "commit": commit(root), "version": env!("CARGO_PKG_VERSION"), "processor": processor(), "threads": threads,
        "instructions": cpu::instruction_sets(),
        "unix_time": SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
    })
}

/// What tells a measurement from others.
fn key(row: &Value) -> [String; 5] {
    let peer = &row["peer"]["name"];
    [&row["case"], &row["pass"], &row["dtype"], &row["threads"], peer].map(Value::to_string)
}

/// Adds a row to a file, in the place of older ones of the same measurement.
///
/// # Errors
/// When the file cannot be read or written.
pub fn put(path: &Path, row: &Value) -> Result<()> {
    let measured = row["could_not_run"].is_null();
    // A peer that runs now is no longer one that could not.
    let outdated =
        |old: &Value| measured && !old["could_not_run"].is_null() && old["peer"]["name"] == row["peer"]["name"];
    let mut rows = read(path)?;
    rows.retain(|old| key(old) != key(row) && !outdated(old));
    let mut text: String = rows.iter().map(|old| format!("{old}\n")).collect();
    text += &format!("{row}\n");
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, "make the folder", &e))?;
    }
    atomic::write_bytes(path, text.as_bytes())
}

/// The rows of a file; none where there is no file.
///
/// # Errors
/// A file that cannot be read, or a line that is no JSON.
pub fn read(path: &Path) -> Result<Vec<Value>> {
    if path.is_file() { jsonl::read(path) } else { Ok(Vec::new()) }
}

/// A line that a person reads while it runs.
pub fn line(row: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_string();
    if let Some(why) = row["could_not_run"].as_str() {
        return format!("{:<44} could not run: {why}", text(&row["peer"]["name"]));
    }
    let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
    let verdict = match row["target"].as_f64() {
        Some(target) if number("ratio") >= target => format!("holds {target}"),
        Some(target) => format!("BELOW {target}"),
        None => String::new(),
    };
    let pass = row["pass"].as_str().unwrap_or(row["work"].as_str().unwrap_or("-"));
    format!(
        "{:<40} {pass:<9} {:<5} {:>10.3} ms {:<13} {:>10.3} ms  {:>5.2}x  {verdict:<10} {}",
        text(&row["case"]),
        text(&row["dtype"]),
        number("ours_ms"),
        text(&row["peer"]["name"]),
        number("peer_ms"),
        number("ratio"),
        row["way"].as_str().unwrap_or("")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_row_takes_the_place_of_the_older() {
        let path = std::env::temp_dir().join(format!("graft-rows-{}/rows.jsonl", std::process::id()));
        let row = |case: &str, ms: f64| json!({ "case": case, "pass": "forward", "ours_ms": ms });
        for (case, ms) in [("a", 1.0), ("b", 2.0), ("a", 3.0)] {
            put(&path, &row(case, ms)).unwrap();
        }
        assert_eq!(read(&path).unwrap(), [row("b", 2.0), row("a", 3.0)]);
        let absent = json!({ "peer": { "name": "p" }, "could_not_run": "no compiler" });
        put(&path, &absent).unwrap();
        assert_eq!(read(&path).unwrap().last(), Some(&absent));
        let runs = json!({ "case": "c", "peer": { "name": "p" } });
        put(&path, &runs).unwrap();
        assert_eq!(read(&path).unwrap(), [row("b", 2.0), row("a", 3.0), runs]);
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
        assert!(read(&path).unwrap().is_empty());
    }

    #[test]
    fn a_line_says_whether_the_target_holds() {
        let row = json!({ "case": "gemm/x", "pass": "forward", "ratio": 1.0, "target": 0.9 });
        assert!(line(&row).contains("holds 0.9"));
        assert!(line(&merged(row, json!({ "ratio": 0.5 }))).contains("BELOW 0.9"));
        assert!(line(&json!({ "peer": { "name": "p" }, "could_not_run": "no compiler" })).contains("no compiler"));
    }
}
