//! Documents that must keep up with the code.

use super::{Finding, Tree};
use toml::{Table, Value};

/// Files that every operator has.
const OP_FILES: [&str; 4] = ["op.toml", "mod.rs", "cpu.rs", "README.md"];

/// Folders of `kernels-cu` that are no operators.
const NO_OPERATORS: [&str; 5] = ["common", "emu", "probes", "examples", "benches"];

/// Lines that the one-page overview may have.
const PAGE: usize = 120;

/// Every operator's directory is complete.
pub(super) fn operator_directories(tree: &Tree) -> Vec<Finding> {
    let folders = tree.children("kernels-cu").into_iter().filter_map(|name| name.strip_suffix('/').map(str::to_string));
    let operators = folders.filter(|name| !NO_OPERATORS.contains(&name.as_str()));
    operators
        .flat_map(|name| OP_FILES.map(|file| format!("kernels-cu/{name}/{file}")))
        .filter(|path| !tree.has(path))
        .map(|path| Finding::new(&path, 0, "missing: an operator is op.toml, mod.rs, cpu.rs and README.md"))
        .collect()
}

/// The changelog has a place for what comes, and its newest version is that of the workspace.
pub(super) fn changelog(tree: &Tree) -> Vec<Finding> {
    const FILE: &str = "CHANGELOG.md";
    let Some(text) = tree.text(FILE) else { return vec![Finding::new(FILE, 0, "missing")] };
    let mut headings =
        text.lines().filter_map(|line| line.strip_prefix("## [")).filter_map(|rest| rest.split(']').next());
    let mut findings = Vec::new();
    if headings.next() != Some("Unreleased") {
        findings.push(Finding::new(FILE, 0, "the first section must be `## [Unreleased]`"));
    }
    let manifest = tree.text("Cargo.toml").and_then(|t| t.parse::<Table>().ok());
    let version =
        manifest.as_ref().and_then(|m| m.get("workspace")?.get("package")?.get("version")).and_then(Value::as_str);
    if headings.next() != version {
        findings.push(Finding::new(
            FILE,
            0,
            format!("the newest version must be {}, as in Cargo.toml", version.unwrap_or("stated")),
        ));
    }
    findings
}

/// The overview fits a page and names every directory of the top level and every room of the engine.
pub(super) fn architecture(tree: &Tree) -> Vec<Finding> {
    const FILE: &str = "ARCHITECTURE.md";
    let Some(text) = tree.text(FILE) else { return vec![Finding::new(FILE, 0, "missing")] };
    let mut findings = Vec::new();
    let lines = text.lines().count();
    if lines > PAGE {
        findings.push(Finding::new(FILE, 0, format!("{lines} lines; one page is {PAGE}")));
    }
    for folder in ["", "engine/src"] {
        let names = tree.children(folder);
        let rooms = names.iter().filter(|n| {
            n.ends_with('/') || folder == "engine/src" && n.as_str() != "main.rs" && n.as_str() != "lib.rs"
        });
        for room in rooms {
            let name = room.trim_end_matches(['/']).trim_end_matches(".rs");
            if !text.contains(&format!("`{name}`")) && !text.contains(&format!("`{name}/`")) {
                findings.push(Finding::new(
                    FILE,
                    0,
                    format!("does not name `{name}/` of {}", if folder.is_empty() { "the top level" } else { folder }),
                ));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_incomplete_operator_is_found() {
        let complete = OP_FILES.map(|file| (format!("kernels-cu/gemm/{file}"), ""));
        let mut files: Vec<(&str, &str)> = complete.iter().map(|(path, text)| (path.as_str(), *text)).collect();
        files.push(("kernels-cu/lib.rs", ""));
        assert!(operator_directories(&Tree::of(&files)).is_empty());
        files.push(("kernels-cu/common/ptx.cuh", ""));
        files.push(("kernels-cu/embed/mod.rs", ""));
        let missing = operator_directories(&Tree::of(&files));
        assert_eq!(missing.len(), 3);
        assert!(missing.iter().any(|f| f.path == "kernels-cu/embed/README.md"));
    }

    #[test]
    fn a_changelog_that_lags_is_found() {
        let manifest = ("Cargo.toml", "[workspace.package]\nversion = \"0.2.0\"\n");
        let of = |text| changelog(&Tree::of(&[("CHANGELOG.md", text), manifest])).len();
        assert_eq!(of("## [Unreleased]\n## [0.2.0] - 2026-01-01\n"), 0);
        assert_eq!(of("## [Unreleased]\n## [0.1.0] - 2026-01-01\n"), 1);
        assert_eq!(of("## [0.2.0] - 2026-01-01\n"), 2);
        assert_eq!(changelog(&Tree::of(&[manifest])).len(), 1);
    }

    #[test]
    fn an_overview_that_is_too_long_or_silent_is_found() {
        let rooms = [
            ("engine/src/tensor/mod.rs", ""),
            ("engine/src/error.rs", ""),
            ("engine/src/lib.rs", ""),
            ("docs/a.md", ""),
        ];
        let of = |text: &str| {
            let mut files = rooms.to_vec();
            files.push(("ARCHITECTURE.md", text));
            architecture(&Tree::of(&files)).len()
        };
        assert_eq!(of("`engine/` `docs/` `tensor` `error`"), 0);
        assert_eq!(of("`engine/` `tensor`"), 2);
        assert_eq!(of(&format!("`engine/` `docs/` `tensor` `error`{}", "\n".repeat(121))), 1);
    }
}
