//! `cargo xtask tidy`: the rules of the house that the compiler cannot check.
//!
//! A rule is a function from the files of the repository to findings, and has a test with a planted violation. The
//! same check runs as a test, so a broken rule breaks `cargo test`. To allow an exception, add it to the rule's list
//! with its reason; to change a rule, change it here and in `ARCHITECTURE.md`.

mod code;
mod docs;
mod manifests;
mod rooms;
mod source;
mod text;
mod tree;

use std::fmt;
use std::path::Path;

pub use tree::Tree;

/// One broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// File, relative to the root, with `/` separators.
    pub path: String,
    /// Line, from 1; 0 where the finding is about the whole file.
    pub line: usize,
    /// What is wrong and how to put it right.
    pub message: String,
    /// A warning is shown but does not fail the check.
    pub warning: bool,
}

impl Finding {
    fn new(path: &str, line: usize, message: impl Into<String>) -> Finding {
        Finding { path: path.to_string(), line, message: message.into(), warning: false }
    }

    fn warning(path: &str, message: impl Into<String>) -> Finding {
        Finding { warning: true, ..Finding::new(path, 0, message) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = if self.warning { "warning: " } else { "" };
        match self.line {
            0 => write!(f, "{}: {word}{}", self.path, self.message),
            line => write!(f, "{}:{line}: {word}{}", self.path, self.message),
        }
    }
}

type Rule = fn(&Tree) -> Vec<Finding>;

/// Every rule that needs nothing but the files.
const RULES: &[Rule] = &[
    manifests::crate_arrows,
    manifests::approved_dependencies,
    rooms::room_arrows,
    rooms::rooms_of_the_kernels,
    code::files_only_in_io,
    code::output_only_in_cli,
    code::unsafe_only_where_listed,
    code::no_panics,
    text::module_documentation,
    text::file_length,
    text::leftovers,
    text::machine_paths,
    text::large_files,
    docs::operator_directories,
    docs::changelog,
    docs::architecture,
];

/// Runs every rule on the repository at `root`; findings in order of path.
///
/// # Errors
/// When a file cannot be read.
pub fn check(root: &Path) -> Result<Vec<Finding>, String> {
    let tree = Tree::read(root)?;
    let mut findings: Vec<Finding> = RULES.iter().flat_map(|rule| rule(&tree)).collect();
    findings.extend(stale_files(root)?);
    findings.sort_by(|a, b| (&a.path, a.line, &a.message).cmp(&(&b.path, b.line, &b.message)));
    Ok(findings)
}

/// Generated files that do not follow from the contracts any more.
fn stale_files(root: &Path) -> Result<Vec<Finding>, String> {
    let stale = crate::codegen::stale(root)?;
    Ok(stale
        .iter()
        .map(|(path, _)| {
            let path = path.strip_prefix(root).unwrap_or(path).display().to_string();
            Finding::new(&path, 0, "generated file is stale; run `cargo xtask codegen` and commit the result")
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_read_like_compiler_messages() {
        assert_eq!(Finding::new("a.rs", 3, "bad").to_string(), "a.rs:3: bad");
        assert_eq!(Finding::warning("a.rs", "long").to_string(), "a.rs: warning: long");
    }

    #[test]
    fn a_changed_generated_file_is_stale() {
        let root = std::env::temp_dir().join(format!("graft-tidy-{}", std::process::id()));
        std::fs::create_dir_all(root.join("kernels-cu")).unwrap();
        // No contract at all: every generated file is missing, hence stale.
        let findings = stale_files(&root).unwrap();
        std::fs::remove_dir_all(&root).unwrap();
        assert!(findings.iter().any(|f| f.path == "docs/ops.md" && f.message.contains("cargo xtask codegen")));
    }
}
