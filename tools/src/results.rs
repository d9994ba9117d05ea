//! `cargo xtask results`: the README's table of measurements, made from the committed rows.

use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

const BEGIN: &str = "<!-- generated: results -->";
const END: &str = "<!-- end -->";

/// The README with its table brought up to date, as (path, text), where that changes it.
///
/// # Errors
/// A row that cannot be read, or a README without the marks.
pub fn stale(root: &Path) -> Result<Option<(PathBuf, String)>, String> {
    let path = root.join("README.md");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let fresh = insert(&text, &table(&rows(root)?)?)?;
    Ok((fresh != text).then_some((path, fresh)))
}

/// Every committed row of the paired model runs, in the order of the files.
fn rows(root: &Path) -> Result<Vec<Value>, String> {
    let folder = root.join("benches/results");
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut files: Vec<PathBuf> =
        entries.filter_map(Result::ok).map(|e| e.path().join("models.jsonl")).filter(|p| p.is_file()).collect();
    files.sort();
    let mut rows = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).map_err(|e| format!("{}: {e}", file.display()))?;
        for (i, line) in text.lines().enumerate() {
            rows.push(serde_json::from_str(line).map_err(|e| format!("{}:{}: {e}", file.display(), i + 1))?);
        }
    }
    Ok(rows)
}

/// The newest row of each processor, case and dtype as a line of the table.
fn table(rows: &[Value]) -> Result<String, String> {
    if rows.is_empty() {
        return Ok("No row is committed yet.\n".to_string());
    }
    let text = |row: &Value, key: &str| row[key].as_str().map(str::to_string).ok_or(format!("a row has no {key}"));
    let number = |row: &Value, key: &str| row[key].as_f64().ok_or(format!("a row has no {key}"));
    // Later rows replace earlier ones: files are appended to.
    let mut newest = BTreeMap::new();
    for row in rows {
        newest.insert([text(row, "processor")?, text(row, "case")?, text(row, "dtype")?], row);
    }
    let mut out = String::from(
        "| processor | model and work | batch | dtype | threads | ours, ms | PyTorch, ms | ratio | commit |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    for ([processor, _, dtype], row) in newest {
        let _ = writeln!(
            out,
            "| {processor} | {} {} | {} | {dtype} | {} | {:.1} | {:.1} | {:.2} | {} |",
            text(row, "model")?,
            text(row, "work")?,
            number(&row["shape"], "batch")?,
            number(row, "threads")?,
            number(row, "ours_ms")?,
            number(row, "peer_ms")?,
            number(row, "ratio")?,
            text(row, "commit")?
        );
    }
    Ok(out)
}

fn insert(text: &str, table: &str) -> Result<String, String> {
    let marked = text.split_once(BEGIN).and_then(|(head, rest)| Some((head, rest.split_once(END)?.1)));
    let (head, tail) = marked.ok_or_else(|| format!("README.md must hold the lines {BEGIN} and {END}"))?;
    Ok(format!("{head}{BEGIN}\n{table}{END}{tail}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(ms: f64) -> Value {
        json!({ "processor": "X", "case": "c", "dtype": "f32", "model": "DiT-S/2", "work": "forward", "shape": { "batch": 8 },
            "threads": 2, "ours_ms": ms, "peer_ms": 30.0, "ratio": 30.0 / ms, "commit": "abc" })
    }

    #[test]
    fn the_newest_row_of_a_case_counts() {
        let text = table(&[row(20.0), row(25.0)]).unwrap();
        assert_eq!(text.lines().count(), 3);
        assert!(text.ends_with("| X | DiT-S/2 forward | 8 | f32 | 2 | 25.0 | 30.0 | 1.20 | abc |\n"), "{text}");
        assert!(table(&[json!({})]).is_err());
    }

    #[test]
    fn the_table_replaces_the_old_one() {
        let text = insert(&format!("a\n{BEGIN}\nold\n{END}\nb"), "new\n").unwrap();
        assert_eq!(text, format!("a\n{BEGIN}\nnew\n{END}\nb"));
        assert!(insert("no marks", "").is_err());
    }
}
