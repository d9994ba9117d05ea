//! Results that are worth keeping between runs, by what they depend on; and files that lie beside the program.
//!
//! An entry carries the digest of its content: one that is damaged is removed and told apart from one that is missing.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::io::{atomic, files, hash};

/// Names the folder of the cache; `XDG_CACHE_HOME/graft` or `~/.cache/graft` where it is not set.
pub const VARIABLE: &str = "GRAFT_CACHE";

const MAGIC: &str = "graft-cache-1";

/// What the cache has of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Nothing.
    Missing,
    /// The content.
    Found(Vec<u8>),
    /// Something that is not what was written: where, and what is wrong. It was removed.
    Damaged(String),
}

/// A folder of entries.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The entries of one kind in `folder`, which is made when something is put in.
    pub fn at(folder: &Path, kind: &str) -> Cache {
        Cache { folder: folder.join(kind) }
    }

    /// The entries of one kind in the user's cache; none where the environment names no place.
    pub fn of_user(kind: &str) -> Option<Cache> {
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let folder = variable(VARIABLE)
            .or_else(|| variable("XDG_CACHE_HOME").map(|d| d.join("graft")))
            .or_else(|| variable("HOME").map(|d| d.join(".cache/graft")))?;
        Some(Cache::at(&folder, kind))
    }

    /// Where the entries are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        files::list(&self.folder).map_or(0, |paths| paths.len())
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The key of something that depends on these texts.
    pub fn key(parts: &[&str]) -> String {
        // Lengths keep ["ab", "c"] and ["a", "bc"] apart.
        let whole: String = parts.iter().map(|p| format!("{}:{p}", p.len())).collect();
        hash::sha256(whole.as_bytes())
    }

    /// What is kept under `key`.
    pub fn get(&self, key: &str) -> Lookup {
        let path = self.folder.join(key);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Lookup::Missing,
            Err(e) => return Lookup::Damaged(Error::io(&path, "read", &e).to_string()),
        };
        match content(&bytes) {
            Some(found) => Lookup::Found(found.to_vec()),
            None => {
                // Best effort: the entry is written anew, over this one.
                let _ = std::fs::remove_file(&path);
                Lookup::Damaged(format!("{}: is not what was written", path.display()))
            }
        }
    }

    /// Keeps `bytes` under `key`.
    ///
    /// # Errors
    /// When the folder cannot be made or written to.
    pub fn put(&self, key: &str, bytes: &[u8]) -> Result<()> {
        std::fs::create_dir_all(&self.folder).map_err(|e| Error::io(&self.folder, "create the folder", &e))?;
        atomic::write_atomic(&self.folder.join(key), |w| {
            writeln!(w, "{MAGIC} {}", hash::sha256(bytes))?;
            w.write_all(bytes)
        })
    }
}

/// A folder of the user's cache for things that are files of their own.
///
/// # Errors
/// When the environment names no place for a cache.
pub fn folder(kind: &str) -> Result<PathBuf> {
    Ok(user_cache(kind)?.folder)
}

fn user_cache(kind: &str) -> Result<Cache> {
    Cache::of_user(kind)
        .ok_or_else(|| Error::failure("cache", "no folder for it").fix(format!("set {VARIABLE} to a folder")))
}

/// Texts as files in a folder of the user's cache, for compilers that read files; `files` are paths below that folder.
/// The same texts are written once.
///
/// # Errors
/// When the environment names no place for a cache, or it cannot be written to.
pub fn tree(kind: &str, files: &[(String, &str)]) -> Result<PathBuf> {
    let cache = user_cache(kind)?;
    let parts: Vec<&str> = files.iter().flat_map(|(path, text)| [path.as_str(), *text]).collect();
    let folder = cache.folder.join(Cache::key(&parts));
    if folder.is_dir() {
        return Ok(folder);
    }
    std::fs::create_dir_all(&cache.folder).map_err(|e| Error::io(&cache.folder, "create the folder", &e))?;
    let written = atomic::write_folder(&folder, |unfinished| {
        for (path, text) in files {
            let path = unfinished.join(path);
            let parent = path.parent().unwrap_or(unfinished);
            std::fs::create_dir_all(parent).map_err(|e| Error::io(parent, "create the folder", &e))?;
            std::fs::write(&path, text).map_err(|e| Error::io(&path, "write", &e))?;
        }
        Ok(())
    });
    // Another process may have been faster with the same texts.
    if folder.is_dir() { Ok(folder) } else { written.map(|()| folder) }
}

/// The content of an entry whose digest holds.
fn content(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.iter().position(|b| *b == b'\n')?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let rest = &bytes[end + 1..];
    (head.strip_prefix(MAGIC)?.strip_prefix(' ')? == hash::sha256(rest)).then_some(rest)
}

/// A file in the folder of the running program, where there is one: its path and content.
///
/// # Errors
/// When it is there and cannot be read.
pub fn beside_program(name: &str) -> Result<Option<(PathBuf, Vec<u8>)>> {
    let Some(path) = std::env::current_exe().ok().and_then(|p| Some(p.parent()?.join(name))) else { return Ok(None) };
    if !path.is_file() {
        return Ok(None);
    }
    let bytes = files::read_bytes(&path)?;
    Ok(Some((path, bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;

    #[test]
    fn entries_come_back_and_damaged_ones_are_told_once() {
        let cache = Cache::at(&test_dir("cache"), "kernels");
        let key = Cache::key(&["a", "b"]);
        assert_eq!(cache.get(&key), Lookup::Missing);
        cache.put(&key, b"code\n\0").unwrap();
        assert_eq!((cache.get(&key), cache.len()), (Lookup::Found(b"code\n\0".to_vec()), 1));
        let path = cache.folder().join(&key);
        let whole = std::fs::read(&path).unwrap();
        for damaged in [&whole[..whole.len() - 1], b"", b"other\n", &[&whole[..], b"x"].concat()] {
            std::fs::write(&path, damaged).unwrap();
            assert!(matches!(cache.get(&key), Lookup::Damaged(text) if text.contains(&key)));
            assert_eq!(cache.get(&key), Lookup::Missing);
        }
    }

    #[test]
    fn keys_tell_parts_apart() {
        assert_ne!(Cache::key(&["ab", "c"]), Cache::key(&["a", "bc"]));
    }
}
