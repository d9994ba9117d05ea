//! The files of the repository, read once.

use super::source::Source;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// One file: its size, and its text where it is UTF-8 and small enough to be source.
struct Entry {
    bytes: u64,
    text: Option<String>,
}

/// Files by path relative to the root, without what `.gitignore` names.
#[derive(Default)]
pub struct Tree {
    entries: BTreeMap<String, Entry>,
    sources: BTreeMap<String, Source>,
    test_only: BTreeSet<String>,
}

/// Larger files are data, whatever they contain.
const LARGEST_TEXT: u64 = 1 << 20;

impl Tree {
    /// Reads the repository at `root`.
    ///
    /// # Errors
    /// When a folder or file cannot be read.
    pub fn read(root: &Path) -> Result<Tree, String> {
        let ignore = std::fs::read_to_string(root.join(".gitignore")).map_err(|e| format!(".gitignore: {e}"))?;
        let mut patterns: Vec<&str> =
            ignore.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')).collect();
        // A worktree has a `.git` file, a clone a `.git` folder.
        patterns.push("/.git");
        let mut tree = Tree::default();
        let mut folders = vec![String::new()];
        while let Some(folder) = folders.pop() {
            let entries = std::fs::read_dir(root.join(&folder)).map_err(|e| format!("{folder}: {e}"))?;
            for entry in entries {
                let entry = entry.map_err(|e| format!("{folder}: {e}"))?;
                let name = entry.file_name().to_string_lossy().into_owned();
                let path = if folder.is_empty() { name } else { format!("{folder}/{name}") };
                if patterns.iter().any(|pattern| ignored(pattern, &path)) {
                    continue;
                }
                // Of the link itself: what lies behind one is not part of the repository.
                let metadata = entry.metadata().map_err(|e| format!("{path}: {e}"))?;
                if metadata.is_dir() {
                    folders.push(path);
                } else if metadata.is_file() {
                    let small = metadata.len() <= LARGEST_TEXT;
                    let bytes = if small {
                        std::fs::read(entry.path()).map_err(|e| format!("{path}: {e}"))?
                    } else {
                        Vec::new()
                    };
                    tree.add(&path, metadata.len(), if small { String::from_utf8(bytes).ok() } else { None });
                }
            }
        }
        tree.find_test_only();
        Ok(tree)
    }

    fn add(&mut self, path: &str, bytes: u64, text: Option<String>) {
        if let (true, Some(text)) = (path.ends_with(".rs"), &text) {
            self.sources.insert(path.to_string(), Source::new(text));
        }
        self.entries.insert(path.to_string(), Entry { bytes, text });
    }

    fn find_test_only(&mut self) {
        let mut found = BTreeSet::new();
        for (path, source) in &self.sources {
            let (folder, file) = path.rsplit_once('/').unwrap_or(("", path));
            let folder = match file {
                "mod.rs" | "lib.rs" | "main.rs" => folder.to_string(),
                _ => path.trim_end_matches(".rs").to_string(),
            };
            found.extend(source.test_modules().iter().map(|name| format!("{folder}/{name}")));
        }
        self.test_only = found;
    }

    /// A tree of literal files, for the tests of the rules.
    #[cfg(test)]
    pub(super) fn of(files: &[(&str, &str)]) -> Tree {
        let mut tree = Tree::default();
        for (path, text) in files {
            tree.add(path, text.len() as u64, Some((*text).to_string()));
        }
        tree.find_test_only();
        tree
    }

    /// Paths and sizes of all files.
    pub fn sizes(&self) -> impl Iterator<Item = (&str, u64)> {
        self.entries.iter().map(|(path, entry)| (path.as_str(), entry.bytes))
    }

    /// Paths and texts of the files that are text.
    pub fn texts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.entries.iter().filter_map(|(path, entry)| Some((path.as_str(), entry.text.as_deref()?)))
    }

    /// Text of one file.
    pub fn text(&self, path: &str) -> Option<&str> {
        self.entries.get(path)?.text.as_deref()
    }

    /// Whether there is such a file.
    pub fn has(&self, path: &str) -> bool {
        self.entries.contains_key(path)
    }

    /// Rust files whose path begins with `prefix`, without files that only exist in tests.
    pub(super) fn rust(&self, prefix: &str) -> impl Iterator<Item = (&str, &Source)> {
        let chosen = move |path: &str| path.starts_with(prefix) && !self.is_test_only(path);
        self.sources.iter().filter(move |(path, _)| chosen(path)).map(|(path, source)| (path.as_str(), source))
    }

    /// All Rust files.
    pub(super) fn all_rust(&self) -> impl Iterator<Item = (&str, &Source)> {
        self.sources.iter().map(|(path, source)| (path.as_str(), source))
    }

    fn is_test_only(&self, path: &str) -> bool {
        let module = path.trim_end_matches(".rs");
        self.test_only
            .iter()
            .any(|t| module == t || module.strip_prefix(t.as_str()).is_some_and(|rest| rest.starts_with('/')))
    }

    /// Names of the entries directly below a folder; folders end in `/`.
    pub fn children(&self, folder: &str) -> BTreeSet<String> {
        let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        let rests = self.entries.keys().filter_map(|path| path.strip_prefix(&prefix));
        rests.map(|rest| rest.split_once('/').map_or(rest.to_string(), |(name, _)| format!("{name}/"))).collect()
    }
}

/// The part of gitignore's language that this repository uses: `/name`, `name/`, one `*` at either end.
fn ignored(pattern: &str, path: &str) -> bool {
    let (anchored, pattern) = pattern.strip_prefix('/').map_or((false, pattern), |rest| (true, rest));
    let pattern = pattern.trim_end_matches('/');
    let name = if anchored { path } else { path.rsplit_once('/').map_or(path, |(_, name)| name) };
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(end), _) => name.ends_with(end),
        (_, Some(start)) => name.starts_with(start),
        _ => name == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignore_patterns() {
        assert!(ignored("/target", "target") && !ignored("/target", "tools/target"));
        assert!(
            ignored("/.venv*", ".venv-cpu") && ignored("*.tmp", "a/b.tmp") && ignored("__pycache__/", "a/__pycache__")
        );
        assert!(!ignored("*.tmp", "a/b.rs"));
    }

    #[test]
    fn files_of_test_modules_are_test_only() {
        let tree =
            Tree::of(&[("a/mod.rs", "#[cfg(test)]\nmod golden;\nmod real;"), ("a/golden.rs", ""), ("a/real.rs", "")]);
        let paths: Vec<&str> = tree.rust("a/").map(|(path, _)| path).collect();
        assert_eq!(paths, ["a/mod.rs", "a/real.rs"]);
    }

    #[test]
    fn children_name_files_and_folders() {
        let tree = Tree::of(&[("a/b/c.rs", ""), ("a/d.rs", ""), ("e", "")]);
        assert_eq!(tree.children("a").into_iter().collect::<Vec<_>>(), ["b/", "d.rs"]);
        assert_eq!(tree.children("").into_iter().collect::<Vec<_>>(), ["a/", "e"]);
    }
}
