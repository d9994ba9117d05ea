//! All-or-nothing writing: a reader sees the old file or the complete new one, whatever happens in between.
//!
//! New content goes to a temporary file in the same folder (renaming across file systems is not atomic), is flushed
//! to the disk, and takes the target's name in one step; then the folder's entry is flushed too.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::io::files;

/// Makes temporary names of one process differ from each other.
static COUNTER: AtomicU64 = AtomicU64::new(0);

/// Writes a file through `fill`, all or nothing.
///
/// On any error, a full disk included, the old file is untouched and nothing temporary is left behind.
///
/// # Errors
/// When the folder is missing or not writable, the disk is full, or `fill` fails.
pub fn write_atomic(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    // A pipe or a device cannot be replaced by renaming: what is written there has no old content to keep.
    if std::fs::metadata(path).is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        let direct = || -> io::Result<()> {
            let mut buffered = BufWriter::new(OpenOptions::new().write(true).open(path)?);
            fill(&mut buffered)?;
            buffered.flush()
        };
        return direct().map_err(|e| Error::io(path, "write", &e));
    }
    let folder = folder_of(path);
    let temporary = temporary_name(path, &folder);
    let result = fill_and_rename(path, &folder, &temporary, fill);
    if result.is_err() {
        // Best effort: the write error is the one worth reporting.
        let _ = std::fs::remove_file(&temporary);
    }
    result.map_err(|e| Error::io(path, "write", &e))
}

/// [`write_atomic`] of bytes that are already complete.
///
/// # Errors
/// As [`write_atomic`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic(path, |w| w.write_all(bytes))
}

fn fill_and_rename(
    path: &Path,
    folder: &Path,
    temporary: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).open(temporary)?;
    let mut buffered = BufWriter::with_capacity(1 << 18, file);
    fill(&mut buffered)?;
    let file = buffered.into_inner().map_err(|e| e.into_error())?;
    file.sync_all()?;
    drop(file);
    std::fs::rename(temporary, path)?;
    sync_folder(folder)
}

/// Makes a rename durable. Only Unix lets a folder be opened and flushed.
fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

fn temporary_name(path: &Path, folder: &Path) -> PathBuf {
    let serial = COUNTER.fetch_add(1, Ordering::Relaxed);
    folder.join(format!(".{}.{}-{serial}.tmp", files::file_name(path), std::process::id()))
}

/// Removes a file that is there.
///
/// # Errors
/// When it cannot be removed.
pub fn remove(path: &Path) -> Result<()> {
    std::fs::remove_file(path).map_err(|e| Error::io(path, "remove", &e))
}

/// Removes what a killed process has left half-written in a folder. Only the holder of its [`RunLock`] may call it:
/// nobody else then writes there.
///
/// # Errors
/// When the folder cannot be listed, or a leftover cannot be removed.
pub fn remove_leftovers(dir: &Path) -> Result<()> {
    for path in files::list(dir)? {
        let name = files::file_name(&path);
        if name.starts_with('.') && name.ends_with(".tmp") && path.is_file() {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Checks that a new folder may take this name: nothing is there, or an empty folder.
///
/// # Errors
/// "the folder is not empty", or a file of that name.
pub fn vacant(path: &Path) -> Result<()> {
    if !path.exists() || path.is_dir() && files::list(path)?.is_empty() {
        return Ok(());
    }
    let problem = if path.is_dir() { "the folder is not empty" } else { "there is a file of this name" };
    Err(Error::usage(path.display().to_string(), problem)
        .must("a new or empty folder")
        .fix("nothing was overwritten; choose another name"))
}

/// Fills a new folder through `fill`, all or nothing: it takes its name once it is complete.
///
/// # Errors
/// Those of [`vacant`] and `fill`, or when the folder cannot be created; nothing temporary is left behind then.
pub fn write_folder(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    vacant(path)?;
    let parent = folder_of(path);
    std::fs::create_dir_all(&parent).map_err(|e| Error::io(&parent, "create the folder", &e))?;
    let temporary = temporary_name(path, &parent);
    std::fs::create_dir(&temporary).map_err(|e| Error::io(&temporary, "create the folder", &e))?;
    let place = || -> io::Result<()> {
        if path.exists() {
            // Only an empty folder can be removed like this.
            std::fs::remove_dir(path)?;
        }
        std::fs::rename(&temporary, path)?;
        sync_folder(&parent)
    };
    let result = fill(&temporary).and_then(|()| place().map_err(|e| Error::io(path, "write", &e)));
    if result.is_err() {
        // Best effort: the error above is the one worth reporting.
        let _ = std::fs::remove_dir_all(&temporary);
    }
    result
}

/// Creates a folder (and its parents) if need be and proves that files can be written in it, so that a long run
/// fails before it starts rather than at its first checkpoint.
///
/// # Errors
/// When the folder cannot be created or written to.
pub fn ensure_writable_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, "create the folder", &e))?;
    let probe = temporary_name(Path::new("probe"), dir);
    let written = File::create_new(&probe).and_then(|mut file| file.write_all(b"probe"));
    let removed = std::fs::remove_file(&probe);
    written.and(removed).map_err(|e| Error::io(dir, "write into the folder", &e))
}

/// Use of a run folder, by one process alone or by several that keep to their own parts, for as long as the value
/// lives.
///
/// The lock belongs to the open file, so the system releases it even when the process is killed. The lock file
/// itself stays: deleting it would let two processes lock two different files of the same name.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// File inside the run folder that carries the lock and the owner's process id.
    pub const FILE: &str = ".lock";

    /// The problem of the error that says that another process has the folder.
    pub const IN_USE: &str = "run folder is in use";

    /// Locks the existing folder `dir` for this process alone.
    ///
    /// # Errors
    /// "run folder is in use" naming the other process, or an I/O error.
    pub fn acquire(dir: &Path) -> Result<Self> {
        Self::lock(dir, File::try_lock, &std::process::id().to_string())
    }

    /// Locks the existing folder `dir` against [`RunLock::acquire`], but not against other sharers.
    ///
    /// # Errors
    /// As [`RunLock::acquire`].
    pub fn share(dir: &Path) -> Result<Self> {
        // One file cannot name all of them.
        Self::lock(dir, File::try_lock_shared, "")
    }

    fn lock(dir: &Path, how: fn(&File) -> std::result::Result<(), TryLockError>, owner: &str) -> Result<Self> {
        let path = dir.join(Self::FILE);
        let wrap = |action, e: io::Error| Error::io(&path, action, &e);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| wrap("open the lock file", e))?;
        match how(&file) {
            Ok(()) => {}
            Err(TryLockError::Error(e)) => return Err(wrap("lock", e)),
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                // Only for the message: an unreadable owner must not hide that the folder is in use.
                let _ = file.take(20).read_to_string(&mut owner);
                return Err(Error::failure(dir.display().to_string(), Self::IN_USE)
                    .is(match owner.trim() {
                        "" => "locked by a process that trains a part of it".to_string(),
                        owner => format!("locked by process {owner}"),
                    })
                    .must("used by one process at a time")
                    .fix("wait for that process, stop it, or choose another folder"));
            }
        }
        let stamp = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            write!(file, "{owner}")
        };
        stamp(&mut file).map_err(|e| wrap("write the lock file", e))?;
        Ok(RunLock { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;

    #[test]
    fn replaces_content_and_leaves_nothing_else() {
        let dir = test_dir("atomic");
        let path = dir.join("a.bin");
        write_bytes(&path, b"one").unwrap();
        write_bytes(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(files::list(&dir).unwrap(), [path]);
    }

    #[test]
    fn full_disk_keeps_the_old_file() {
        let dir = test_dir("atomic_full");
        let path = dir.join("a.bin");
        write_bytes(&path, b"old").unwrap();
        let error = write_atomic(&path, |w| {
            w.write_all(&[0; 100_000])?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        })
        .unwrap_err()
        .to_string();
        assert!(error.contains("free disk space") && error.contains("a.bin"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(files::list(&dir).unwrap(), [path]);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn devices_are_written_to_and_stay() {
        let full = Path::new("/dev/full");
        let error = write_bytes(full, b"x").unwrap_err().to_string();
        assert!(error.contains("/dev/full: cannot write") && error.contains("free disk space"), "{error}");
        assert!(!std::fs::metadata(full).unwrap().is_file());
        write_bytes(Path::new("/dev/null"), b"x").unwrap();
    }

    #[test]
    fn missing_folder_is_named() {
        let path = test_dir("atomic_missing").join("no/such/a.bin");
        let error = write_bytes(&path, b"x").unwrap_err().to_string();
        assert!(error.contains("no/such/a.bin: cannot write"), "{error}");
    }

    #[test]
    fn writable_dir_is_created_and_left_empty() {
        let dir = test_dir("atomic_probe").join("a/b");
        ensure_writable_dir(&dir).unwrap();
        assert!(files::list(&dir).unwrap().is_empty());
        write_bytes(&dir.join("file"), b"").unwrap();
        assert!(ensure_writable_dir(&dir.join("file")).is_err());
    }

    #[test]
    fn second_lock_names_the_owner_and_release_frees() {
        let dir = test_dir("atomic_lock");
        let first = RunLock::acquire(&dir).unwrap();
        let error = RunLock::acquire(&dir).unwrap_err().to_string();
        let expected = format!("run folder is in use; is locked by process {}", std::process::id());
        assert!(error.contains(&expected), "{error}");
        drop(first);
        RunLock::acquire(&dir).unwrap();
    }

    #[test]
    fn sharers_keep_out_who_wants_it_alone() {
        let dir = test_dir("atomic_share");
        let (one, two) = (RunLock::share(&dir).unwrap(), RunLock::share(&dir).unwrap());
        drop(one);
        let error = RunLock::acquire(&dir).unwrap_err().to_string();
        assert!(error.contains("run folder is in use; is locked by a process that trains a part of it"), "{error}");
        drop(two);
        let alone = RunLock::acquire(&dir).unwrap();
        assert!(RunLock::share(&dir).is_err());
        drop(alone);
    }

    #[test]
    fn leftovers_go_and_nothing_else() {
        let dir = test_dir("atomic_leftovers");
        let kept = [".lock", "a.tmp", "b.bin"].map(|name| dir.join(name));
        kept.iter().for_each(|path| std::fs::write(path, b"x").unwrap());
        std::fs::write(temporary_name(&dir.join("c.bin"), &dir), b"half").unwrap();
        std::fs::create_dir(dir.join(".d.tmp")).unwrap();
        remove_leftovers(&dir).unwrap();
        assert_eq!(files::list(&dir).unwrap(), [vec![dir.join(".d.tmp")], kept.to_vec()].concat());
    }
}
