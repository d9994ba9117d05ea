//! Rows of measurements as the tables read them: of operators and models, ours alone or beside a peer's. Ours alone are
//! those of [`crate::report::bench`].

use crate::error::{Error, Result};
use crate::io::{files, jsonl};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Folder of the committed rows, below the root.
const FOLDER: &str = "benches/results";

/// A line of a file of rows.
#[derive(Clone, Debug)]
pub struct Row {
    /// File and line, for messages.
    place: String,
    /// Folder of the file, which tells machines apart.
    machine: String,
    /// What it holds.
    pub value: Value,
}

/// Every committed row of the repository at `root`, in the order of folders, files and lines.
///
/// # Errors
/// A file that cannot be read, or a line that is no JSON.
pub fn read(root: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for folder in entries(&root.join(FOLDER))? {
        rows.extend(of_machine(&folder)?);
    }
    Ok(rows)
}

/// The rows of a machine: those of every file right in its folder.
///
/// # Errors
/// As [`read`].
pub fn of_machine(folder: &Path) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for file in entries(folder)?.into_iter().filter(|p| p.extension().is_some_and(|e| e == "jsonl")) {
        rows.extend(of_file(&file)?);
    }
    Ok(rows)
}

/// The rows of a file in the folder of a machine. Those of a way that was asked for (`graft bench op --way`) are left
/// out: they say what was tried, and answer for nothing.
///
/// # Errors
/// As [`read`].
pub fn of_file(file: &Path) -> Result<Vec<Row>> {
    let machine = file.parent().map(files::file_name).unwrap_or_default();
    let row = |(i, value)| Row { place: format!("{} line {}", file.display(), i + 1), machine: machine.clone(), value };
    Ok(jsonl::read(file)?.into_iter().enumerate().map(row).filter(|row| !row.is_forced()).collect())
}

/// What a folder holds, sorted; nothing of what is no folder.
pub(super) fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    if folder.is_dir() { files::list(folder) } else { Ok(Vec::new()) }
}

impl Row {
    /// Folder of the row's machine.
    pub fn machine(&self) -> &str {
        &self.machine
    }

    /// A field of text, if the row has it.
    pub fn maybe(&self, key: &str) -> Option<&str> {
        self.value[key].as_str()
    }

    /// A number, if the row has it.
    pub fn maybe_number(&self, key: &str) -> Option<f64> {
        self.value[key].as_f64()
    }

    /// A field of text.
    ///
    /// # Errors
    /// Names the row and the field.
    pub fn text(&self, key: &str) -> Result<&str> {
        self.maybe(key).ok_or_else(|| self.lacks("text", key))
    }

    /// A number.
    ///
    /// # Errors
    /// Names the row and the field.
    pub fn number(&self, key: &str) -> Result<f64> {
        self.maybe_number(key).ok_or_else(|| self.lacks("number", key))
    }

    fn lacks(&self, kind: &str, key: &str) -> Error {
        Error::failure(&self.place, format!("a row that has no {kind} {key:?}"))
    }

    /// Name of the processor or GPU.
    pub fn device(&self) -> &str {
        self.maybe("processor").or_else(|| self.maybe("device")).unwrap_or_else(|| self.machine())
    }

    /// Ours against a peer's, measured in turns, or why the peer could not run.
    pub fn is_paired(&self) -> bool {
        self.value["peer"].is_object() || self.value["peer"].is_string()
    }

    /// Ours in a way that was asked for. In a pair the way is the peer's.
    fn is_forced(&self) -> bool {
        self.maybe("way").is_some() && !self.is_paired()
    }

    /// Name of the peer, with its version where the row has one.
    pub fn peer(&self) -> String {
        let peer = &self.value["peer"];
        let name = peer["name"].as_str().or(peer.as_str()).unwrap_or("?");
        peer["version"].as_str().map_or(name.to_string(), |v| format!("{name} {v}"))
    }

    /// Name of the peer alone.
    pub fn peer_name(&self) -> &str {
        self.value["peer"]["name"].as_str().or(self.value["peer"].as_str()).unwrap_or("?")
    }

    /// Why the peer could not run, if it could not.
    pub fn could_not_run(&self) -> Option<String> {
        match &self.value["could_not_run"] {
            Value::Null | Value::Bool(false) => None,
            Value::String(why) => Some(why.clone()),
            other => Some(other.to_string()),
        }
    }

    /// Operator and case, `attention/dit_xl_256`; the case alone of other rows.
    pub fn subject(&self) -> String {
        let case = self.maybe("case").unwrap_or_default();
        match self.maybe("op") {
            Some(op) if !case.starts_with(&format!("{op}/")) => format!("{op}/{case}"),
            _ => case.to_string(),
        }
    }

    /// Forward or backward, or the work of a model.
    pub fn work(&self) -> &str {
        self.maybe("pass").or_else(|| self.maybe("work")).unwrap_or_default()
    }

    /// Working type.
    pub fn element(&self) -> &str {
        self.maybe("dtype").or_else(|| self.maybe("element")).unwrap_or_default()
    }

    /// What two rows must share to be of the same work on the same device: device, work, working type, subject and what
    /// was varied.
    pub fn measured(&self) -> [String; 5] {
        let axes = self.value["axes"].as_object().filter(|axes| !axes.is_empty());
        let axes = axes.map_or(String::new(), |_| self.value["axes"].to_string());
        [self.device().into(), self.work().into(), self.element().into(), self.subject(), axes]
    }

    /// Milliseconds of ours.
    pub fn ms(&self) -> Option<f64> {
        self.maybe_number("ours_ms").or_else(|| self.maybe_number("ms"))
    }
}

/// The last row of each key, in the order of the keys.
pub fn newest<'r, K: Ord>(rows: impl Iterator<Item = &'r Row>, key: impl Fn(&Row) -> K) -> Vec<&'r Row> {
    let mut found = BTreeMap::new();
    for row in rows {
        found.insert(key(row), row);
    }
    found.into_values().collect()
}

/// A table with its heads; a sentence where there is no line.
pub fn table(heads: &[&str], lines: &[Vec<String>], none: &str) -> String {
    if lines.is_empty() {
        return format!("{none}\n");
    }
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let heads: Vec<String> = heads.iter().map(|h| (*h).to_string()).collect();
    let rule = format!("|{}\n", "---|".repeat(heads.len()));
    lines.iter().fold(line(&heads) + &rule, |text, cells| text + &line(cells))
}

/// Three digits that count.
pub fn digits(value: f64) -> String {
    match value.abs() {
        a if a >= 100.0 => format!("{value:.0}"),
        a if a >= 10.0 => format!("{value:.1}"),
        a if a >= 1.0 => format!("{value:.2}"),
        a if a >= 0.1 => format!("{value:.3}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn row(value: Value) -> Row {
        Row { place: "x/rows.jsonl line 1".into(), machine: "x".into(), value }
    }

    #[test]
    fn what_a_row_says_of_itself() {
        let row = row(
            serde_json::json!({ "op": "gemm", "case": "fc1", "pass": "forward", "peer": { "name": "P", "version": "2" }, "could_not_run": "no wheel" }),
        );
        assert_eq!((row.subject().as_str(), row.work(), row.peer().as_str()), ("gemm/fc1", "forward", "P 2"));
        assert_eq!((row.could_not_run().as_deref(), row.machine()), (Some("no wheel"), "x"));
        assert!(row.number("ours_ms").unwrap_err().to_string().contains("x/rows.jsonl line 1"));
    }

    #[test]
    fn a_way_that_was_asked_for_answers_for_nothing() {
        let file = files::test_dir("rows-of-ways").join("rows.jsonl");
        let mut log = jsonl::JsonLog::create(&file).unwrap();
        let rows = [
            serde_json::json!({ "case": "gemm/a", "ms": 2.0 }),
            serde_json::json!({ "case": "gemm/a", "ms": 1.0, "way": "wgmma_128x256" }),
            serde_json::json!({ "case": "gemm/a", "ours_ms": 3.0, "way": "eager", "peer": { "name": "PyTorch" } }),
        ];
        rows.iter().for_each(|row| log.append(row).unwrap());
        let kept: Vec<_> = of_file(&file).unwrap().iter().map(|row| row.ms().unwrap()).collect();
        assert_eq!(kept, [2.0, 3.0]);
    }

    #[test]
    fn the_last_row_of_a_key_counts() {
        let rows = [1, 2].map(|n| row(serde_json::json!({ "case": "c", "n": n })));
        let found = newest(rows.iter(), |r| r.subject());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].number("n").unwrap(), 2.0);
    }

    #[test]
    fn tables_and_numbers() {
        assert_eq!(table(&["a", "b"], &[vec!["1".into(), "2".into()]], "none"), "| a | b |\n|---|---|\n| 1 | 2 |\n");
        assert_eq!(table(&["a"], &[], "none"), "none\n");
        assert_eq!([1234.5, 12.34, 1.234, 0.1234, 0.01234].map(digits), ["1234", "12.3", "1.23", "0.123", "0.0123"]);
    }
}
