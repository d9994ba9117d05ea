//! Folders of tests, which go away with them.

use std::ops::Deref;
use std::path::{Path, PathBuf};

/// A fresh, empty folder below the system's temporary folder. It is removed with its owner, unless the test panics:
/// then what it left can be looked at.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// The folder `graft-<name>-<process>`.
    ///
    /// # Panics
    /// Where it cannot be made.
    pub fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("graft-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Scratch(path)
    }
}

impl Deref for Scratch {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl AsRef<Path> for Scratch {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}
