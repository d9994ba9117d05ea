//! The tables of measurements in README.md and docs/results.md, made from the committed rows (`graft bench results`).
//!
//! A row is a line of JSON in `benches/results/<processor or GPU>/*.jsonl`; what it holds decides what it is, not the
//! name of its file. Files are appended to: the last row of a subject counts. `benches/targets.toml` lists what the
//! project wants to reach, so that a page can say "not measured" where no row answers; `graft gpu` ends with the same
//! [`targets`].

pub mod ladders;
mod marks;
mod paired;
mod plain;
pub mod rows;
pub mod targets;

use crate::error::Result;
use crate::io::files;
use rows::Row;
use std::path::{Path, PathBuf};

/// The documents with marked places.
const DOCUMENTS: [&str; 2] = ["README.md", "docs/results.md"];

/// A document with its tables brought up to date.
pub type Fresh = (PathBuf, String);

/// The documents of the repository at `root` that the committed rows change, as (path, text).
///
/// # Errors
/// A row or target that cannot be read, or a document with a mark that no table has.
pub fn stale(root: &Path) -> Result<Vec<Fresh>> {
    let rows = rows::read(root)?;
    let targets = targets::read(&root.join(targets::FILE))?;
    let mut stale = Vec::new();
    for name in DOCUMENTS {
        let path = root.join(name);
        let text = files::read_text(&path)?;
        let fresh = marks::fill(&text, name, &|mark| table(root, mark, &rows, &targets))?;
        if fresh != text {
            stale.push((path, fresh));
        }
    }
    Ok(stale)
}

/// The table of a mark; none where there is no such table.
fn table(root: &Path, mark: &str, rows: &[Row], targets: &[targets::Target]) -> Option<Result<String>> {
    Some(match mark {
        "results" => paired::short(rows),
        "models" => paired::models(rows),
        "operators" => paired::operators(rows),
        "GPU" => plain::gpu(rows),
        "text to image" => plain::text_to_image(rows),
        "loading" => plain::loading(rows),
        "growth" => plain::growth(root, rows),
        "cost model" => plain::cost_model(rows),
        "ladders" => ladders::read(&root.join("kernels-cu")).map(|ladders| ladders::sections(&ladders)),
        "targets" => Ok(targets::table_of(rows, targets)),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;

    #[test]
    fn the_documents_hold_every_table() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let text = |name: &str| files::read_text(&root.join(name)).unwrap();
        assert_eq!(marks::names(&text("README.md")), ["results"]);
        let all =
            ["targets", "models", "operators", "GPU", "text to image", "loading", "cost model", "growth", "ladders"];
        assert_eq!(marks::names(&text("docs/results.md")), all);
    }

    #[test]
    fn a_changed_row_makes_the_documents_stale() {
        let root = test_dir("results");
        let folder = root.join("benches/results/some-processor");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::create_dir_all(root.join("docs")).unwrap();
        std::fs::write(root.join("benches/targets.toml"), "").unwrap();
        for name in DOCUMENTS {
            std::fs::write(root.join(name), "a\n<!-- generated: loading -->\n<!-- end -->\n").unwrap();
        }
        let row = |share: f64| {
            format!(
                "{{\"bench\":\"load\",\"processor\":\"X\",\"bytes\":1e9,\"load_ms\":1000.0,\"read_ms\":900.0,\"share\":{share}}}\n"
            )
        };
        let write = |share| std::fs::write(folder.join("load.jsonl"), row(share)).unwrap();
        write(0.9);
        for (path, text) in stale(&root).unwrap() {
            assert!(text.contains("| 90 % |"), "{text}");
            std::fs::write(path, text).unwrap();
        }
        assert!(stale(&root).unwrap().is_empty());
        write(0.5);
        assert_eq!(stale(&root).unwrap().len(), 2);
        std::fs::write(root.join("README.md"), "<!-- generated: nonsense -->\n<!-- end -->").unwrap();
        let message = stale(&root).unwrap_err().to_string();
        std::fs::remove_dir_all(&root).unwrap();
        assert!(message.contains("README.md") && message.contains("nonsense"), "{message}");
    }
}
