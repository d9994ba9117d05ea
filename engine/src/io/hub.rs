//! Models by their hub id, from the local cache alone: no network is touched.

use crate::error::{Error, Result};
use crate::io::files;
use std::path::{Path, PathBuf};

/// The folder of a model: `path` itself where it exists, else the cached snapshot of the hub id that it spells.
///
/// # Errors
/// A hub id that is not in the cache, with the folder that was looked in.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    resolve_in(path, cache().as_deref())
}

/// The hub's cache folder, as its own programs find it.
fn cache() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("HF_HUB_CACHE")
        .or_else(|| var("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| var("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .or_else(|| var("HOME").map(|home| home.join(".cache/huggingface/hub")))
}

fn resolve_in(path: &Path, cache: Option<&Path>) -> Result<PathBuf> {
    let text = path.to_string_lossy();
    let id = text.split_once('/').filter(|(owner, name)| is_word(owner) && is_word(name));
    let (Some((owner, name)), false) = (id, path.exists()) else { return Ok(path.to_path_buf()) };
    let Some(cache) = cache else { return Ok(path.to_path_buf()) };
    let folder = cache.join(format!("models--{owner}--{name}"));
    let missing = || {
        Error::failure(text.as_ref(), "no such file or folder, and no such model in the cache")
            .is(format!("not below {}", cache.display()))
            .must("a model folder, a file, or the id of a model that was downloaded")
            .fix("download it first; nothing is fetched from a network")
    };
    let main = folder.join("refs/main");
    if main.is_file() {
        let revision = files::read_text(&main)?;
        let snapshot = folder.join("snapshots").join(revision.trim());
        if is_word(revision.trim()) && snapshot.is_dir() {
            return Ok(snapshot);
        }
    }
    let snapshots = folder.join("snapshots");
    if !snapshots.is_dir() {
        return Err(missing());
    }
    files::list(&snapshots)?.into_iter().rfind(|p| p.is_dir()).ok_or_else(missing)
}

/// Whether a part of an id can be a folder's name and leads nowhere else.
fn is_word(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !text.is_empty() && text.chars().all(plain) && !text.starts_with('.')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;

    #[test]
    fn ids_lead_to_the_main_snapshot() {
        let cache = test_dir("hub");
        let model = cache.join("models--PixArt-alpha--Sigma");
        for revision in ["aaa", "bbb"] {
            std::fs::create_dir_all(model.join("snapshots").join(revision)).unwrap();
        }
        let resolve = |id: &str| resolve_in(Path::new(id), Some(&cache));
        assert_eq!(resolve("PixArt-alpha/Sigma").unwrap(), model.join("snapshots/bbb"));
        std::fs::create_dir_all(model.join("refs")).unwrap();
        std::fs::write(model.join("refs/main"), "aaa\n").unwrap();
        assert_eq!(resolve("PixArt-alpha/Sigma").unwrap(), model.join("snapshots/aaa"));
        // What is there is taken as it is, and what cannot be an id is left to whoever opens it.
        assert_eq!(resolve_in(&cache, None).unwrap(), cache);
        for other in ["../etc", "a/b/c", "word"] {
            assert_eq!(resolve(other).unwrap(), Path::new(other));
        }
        let error = resolve("PixArt-alpha/Other").unwrap_err().to_string();
        assert!(error.contains("no such model in the cache") && error.contains("nothing is fetched"), "{error}");
    }
}
