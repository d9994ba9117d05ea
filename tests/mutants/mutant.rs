//! Mutants as they are listed, and how one is planted.

use std::fmt;
use std::path::{Path, PathBuf};

/// A wrong version of a source.
pub struct Mutant {
    pub op: String,
    /// The bug in words.
    pub what: String,
    /// Why it cannot be caught without a GPU, where that is so.
    pub survives: Option<String>,
    file: String,
    find: String,
    replace: String,
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.op, self.what)
    }
}

/// The mutants of every operator, in order.
///
/// # Errors
/// A list that cannot be read, or an entry whose text is not exactly once in its source.
pub fn all(root: &Path) -> Result<Vec<Mutant>, String> {
    let kernels = root.join("kernels-cu");
    let entries = std::fs::read_dir(&kernels).map_err(|e| format!("{}: {e}", kernels.display()))?;
    let mut folders: Vec<_> = entries.filter_map(Result::ok).map(|e| e.path()).collect();
    folders.sort();
    let mut found = Vec::new();
    for folder in folders {
        let list = folder.join("mutants.toml");
        let Ok(text) = std::fs::read_to_string(&list) else { continue };
        let place = |e: String| format!("{}: {e}", list.display());
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| place(e.to_string()))?;
        let op = folder.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        for entry in table.get("mutant").and_then(|m| m.as_array()).into_iter().flatten() {
            found.push(read(op, entry).and_then(|m| m.check(root).map(|()| m)).map_err(place)?);
        }
    }
    Ok(found)
}

fn read(op: &str, entry: &toml::Value) -> Result<Mutant, String> {
    let word = |name: &str| entry.get(name).and_then(|v| v.as_str()).map(str::to_string);
    let needed = |name: &str| word(name).ok_or(format!("an entry has no {name}: {entry}"));
    Ok(Mutant {
        op: op.to_string(),
        what: needed("what")?,
        survives: word("survives"),
        file: word("file").unwrap_or(format!("{op}/{op}.cu")),
        find: needed("find")?,
        replace: needed("replace")?,
    })
}

impl Mutant {
    fn source(&self, root: &Path) -> Result<String, String> {
        let path = root.join("kernels-cu").join(&self.file);
        std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
    }

    fn check(&self, root: &Path) -> Result<(), String> {
        match self.source(root)?.matches(&self.find).count() {
            1 => Ok(()),
            n => Err(format!("{}: `find` is {n} times in {}, must be once", self.what, self.file)),
        }
    }

    /// Copies the sources into `folder`, with the bug.
    ///
    /// # Errors
    /// A file that cannot be read or written.
    pub fn plant(&self, root: &Path, folder: &Path) -> Result<(), String> {
        copy(root, folder)?;
        let mutated = self.source(root)?.replace(&self.find, &self.replace);
        let target = folder.join("kernels-cu").join(&self.file);
        std::fs::write(&target, mutated).map_err(|e| format!("{}: {e}", target.display()))
    }
}

/// Copies all sources into `folder`, whose old content goes: an operator may launch kernels of another.
///
/// # Errors
/// A file that cannot be read or written.
pub fn copy(root: &Path, folder: &Path) -> Result<(), String> {
    let _ = std::fs::remove_dir_all(folder);
    let list = |path: &Path| -> Result<Vec<PathBuf>, String> {
        let entries = std::fs::read_dir(path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(entries.filter_map(Result::ok).map(|e| e.path()).collect())
    };
    let source = |path: &PathBuf| {
        path.extension().and_then(|e| e.to_str()).is_some_and(|e| ["cu", "cuh", "cpp", "h"].contains(&e))
    };
    for from in list(&root.join("kernels-cu"))?.iter().filter(|p| p.is_dir()) {
        let to = folder.join("kernels-cu").join(from.file_name().unwrap_or_default());
        std::fs::create_dir_all(&to).map_err(|e| format!("{}: {e}", to.display()))?;
        for file in list(from)?.iter().filter(|p| source(p)) {
            let target = to.join(file.file_name().unwrap_or_default());
            std::fs::copy(file, &target).map_err(|e| format!("{}: {e}", target.display()))?;
        }
    }
    Ok(())
}
