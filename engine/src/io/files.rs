//! Reading whole small files, listing folders and naming files.

use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

use crate::error::{Error, Result};

/// Reads a whole file.
///
/// # Errors
/// When the file is missing or unreadable.
pub fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::io(path, "read", &e))
}

/// Reads `path`, or `path.gz` unpacked where that is there instead.
///
/// # Errors
/// When neither can be read.
pub fn read_packed(path: &Path) -> Result<Vec<u8>> {
    let packed = PathBuf::from(format!("{}.gz", path.display()));
    if path.is_file() || !packed.is_file() {
        return read_bytes(path);
    }
    let mut bytes = Vec::new();
    MultiGzDecoder::new(read_bytes(&packed)?.as_slice())
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(&packed, "unpack", &e))?;
    Ok(bytes)
}

/// Reads a whole UTF-8 text file.
///
/// # Errors
/// When the file is missing, unreadable or not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    String::from_utf8(read_bytes(path)?).map_err(|e| {
        Error::failure(path.display().to_string(), "not utf-8 text")
            .is(format!("an invalid byte at offset {}", e.utf8_error().valid_up_to()))
            .fix("save the file as UTF-8")
    })
}

/// Paths of the entries of a folder, sorted by name so that results do not depend on the file system.
///
/// # Errors
/// When the folder is missing or unreadable.
pub fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let wrap = |e: &std::io::Error| Error::io(dir, "list", e);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| wrap(&e))? {
        paths.push(entry.map_err(|e| wrap(&e))?.path());
    }
    paths.sort();
    Ok(paths)
}

/// A path's last component for messages.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// A name as that of a file: lower case letters and digits, words joined by single dashes, `nvidia-h200`.
pub fn slug(name: &str) -> String {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty());
    words.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-")
}

/// Shortens and escapes text that comes from an untrusted file, so that a message stays one printable line.
pub(crate) fn printable(text: &str) -> String {
    const MAX: usize = 120;
    let mut out: String = text.chars().take(MAX).flat_map(char::escape_debug).collect();
    if text.chars().nth(MAX).is_some() {
        out.push('…');
    }
    out
}

/// A fresh, empty folder for one unit test, below the system's temporary folder.
#[cfg(test)]
pub(crate) fn test_dir(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("graft-io-{}-{name}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// A path inside the golden cases.
#[cfg(test)]
pub(crate) fn golden(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(relative)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_must_be_utf8() {
        let path = test_dir("files_text").join("a.txt");
        std::fs::write(&path, b"ab\xff").unwrap();
        let error = read_text(&path).unwrap_err().to_string();
        assert!(error.contains("not utf-8 text; is an invalid byte at offset 2"), "{error}");
    }

    #[test]
    fn names_become_files() {
        assert_eq!(slug("AMD EPYC 9R14 @ 2.6GHz"), "amd-epyc-9r14-2-6ghz");
    }

    #[test]
    fn listing_is_sorted() {
        let dir = test_dir("files_list");
        for name in ["b", "a", "c"] {
            std::fs::write(dir.join(name), b"").unwrap();
        }
        assert_eq!(list(&dir).unwrap(), [dir.join("a"), dir.join("b"), dir.join("c")]);
        assert!(list(&dir.join("none")).is_err());
    }

    #[test]
    fn untrusted_text_stays_on_one_short_line() {
        assert_eq!(printable("a\nb"), "a\\nb");
        assert_eq!(printable(&"x".repeat(500)).chars().count(), 121);
    }
}
