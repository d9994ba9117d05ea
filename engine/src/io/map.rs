//! Read-only memory maps: large weight files are paged in by the operating system instead of being copied.
//!
//! The one module of this room with `unsafe`: mapping a file is unsafe because another process may change the
//! file underneath. Everything else in the room sees a plain byte slice.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// The bytes of a file, mapped read-only. Empty files are fine.
///
/// Other programs must not shorten the file while it is mapped; this program's own writers never do, they replace
/// files by renaming ([`crate::io::atomic`]), which leaves an existing map intact.
///
/// The file stays open beside its map, for readers that want many bytes at a known place: a positioned read into memory
/// of their own costs less than a page fault for each page.
#[derive(Debug)]
pub struct Mapped {
    map: Mmap,
    file: File,
}

impl Mapped {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// When the path is missing, unreadable, a folder, or cannot be mapped.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, "open", &e))?;
        let meta = file.metadata().map_err(|e| Error::io(path, "read the size of", &e))?;
        if !meta.is_file() {
            return Err(Error::failure(path.display().to_string(), "not a regular file").fix("name the file itself"));
        }
        // SAFETY: the map is private and read-only, and is exposed only as `&[u8]` borrowed from `self`, which owns
        // it. The remaining duty, that nobody shortens or rewrites the file in place meanwhile, cannot be enforced
        // on other programs and is documented on the type; every user of these bytes validates what it reads and
        // keeps no derived invariant whose violation would be undefined behaviour.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, "map", &e))?;
        Ok(Mapped { map, file })
    }

    /// The open file; its position means nothing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives the pages that were read so far back to the system; they are read again when they are used again.
    /// Keeps the memory of a program that copies a large file bounded by the copy.
    pub fn release(&self) {
        // SAFETY: the map is backed by a file and never written to, so a dropped page holds nothing that the file
        // does not; a later read brings the same bytes, under the duty stated in `open`.
        #[cfg(unix)]
        let advised = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        // Only advice: when the system refuses, the pages merely stay.
        #[cfg(unix)]
        let _ = advised;
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;

    #[test]
    fn maps_content_and_empty_files() {
        let dir = test_dir("map");
        std::fs::write(dir.join("a"), b"abc").unwrap();
        std::fs::write(dir.join("b"), b"").unwrap();
        assert_eq!(Mapped::open(&dir.join("a")).unwrap().as_ref(), b"abc");
        assert_eq!(Mapped::open(&dir.join("b")).unwrap().as_ref(), b"");
        let (a, b) = (Mapped::open(&dir.join("a")).unwrap(), Mapped::open(&dir.join("b")).unwrap());
        a.release();
        b.release();
        assert_eq!((a.as_ref(), b.as_ref()), (&b"abc"[..], &b""[..]));
    }

    #[test]
    fn missing_file_and_folder_are_errors() {
        let dir = test_dir("map_errors");
        let missing = Mapped::open(&dir.join("nowhere")).unwrap_err();
        assert!(missing.to_string().contains("nowhere") && missing.problem().starts_with("cannot open"), "{missing}");
        assert_eq!(Mapped::open(&dir).unwrap_err().problem(), "not a regular file");
    }
}
