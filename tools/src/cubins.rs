//! `graft.cubins`: every kernel compiled ahead of time, for the devices that are known.

use crate::codegen::contracts;
use crate::nvcc::{Nvcc, architectures};
use archive::Key;
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The format, from the library's own file: this crate must build when the library does not.
#[path = "../../kernels-cu/archive.rs"]
pub mod archive;

/// Where the archive goes: beside the program that `cargo build --release` makes.
pub const PLACE: &str = "target/release/graft.cubins";

/// What an archive holds; everything where nothing is said.
#[derive(Clone, Copy, Debug, Default)]
pub struct Choice<'a> {
    /// One operator.
    pub op: Option<&'a str>,
    /// One target, as `sm_90a`: such an archive goes to [`Choice::place`], not beside the program.
    pub target: Option<&'a str>,
}

impl Choice<'_> {
    /// Path of the archive below the root.
    pub fn place(&self) -> String {
        self.target.map_or(PLACE.to_string(), |t| format!("target/{t}.cubins"))
    }
}

/// One compilation.
struct Job {
    key: Key,
    text: String,
}

/// Compiles the sources of every operator for every element and target, as far as they are chosen, and writes the
/// archive. Gives its path and what is in it.
///
/// # Errors
/// When there is no compiler, a source does not compile, or the file cannot be written.
pub fn write(root: &Path, choice: Choice<'_>) -> Result<(PathBuf, String), String> {
    let nvcc = Nvcc::find(root)?;
    let mut jobs = jobs(root, choice.op)?;
    jobs.retain(|job| choice.target.is_none_or(|t| job.key.target == t));
    if jobs.is_empty() {
        return Err(format!("no such operator has CUDA sources for such a target: {choice:?}"));
    }
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((i, job)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|i| Some((i, jobs.get(i)?)))
                {
                    let code = nvcc.code(&job.key, &job.text);
                    // A poisoned lock means that another worker panicked, which ends the scope anyway.
                    done.lock().unwrap_or_else(|e| e.into_inner()).push((i, code));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(|e| e.into_inner());
    done.sort_by_key(|(i, _)| *i);
    let mut entries = Vec::new();
    for ((_, code), job) in done.into_iter().zip(jobs) {
        entries.push((job.key, archive::digest(job.text.as_bytes()), code?));
    }
    let bytes = archive::write(nvcc.toolkit()?, &entries);
    let path = root.join(choice.place());
    let unfinished = path.with_extension("tmp");
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    std::fs::create_dir_all(path.parent().unwrap_or(root)).map_err(failed)?;
    std::fs::write(&unfinished, &bytes).and_then(|()| std::fs::rename(&unfinished, &path)).map_err(failed)?;
    Ok((path.clone(), format!("{} entries, {:.1} MiB", entries.len(), bytes.len() as f64 / f64::from(1 << 20))))
}

fn jobs(root: &Path, only: Option<&str>) -> Result<Vec<Job>, String> {
    let kernels = root.join("kernels-cu");
    let read = |path: PathBuf| std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()));
    let mut jobs = Vec::new();
    for contract in contracts(root)?.into_iter().filter(|c| only.is_none_or(|o| c.name == o)) {
        let Some(cuda) = &contract.cuda else { continue };
        let folder = kernels.join(&contract.name);
        let entries = std::fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let names = entries.filter_map(Result::ok).filter_map(|e| e.file_name().into_string().ok());
        let mut sources: Vec<String> = names.filter(|n| n.ends_with(".cu")).collect();
        sources.sort();
        for source in sources {
            let header = |name: &str| {
                [folder.join(name), kernels.join("common").join(name)]
                    .into_iter()
                    .find_map(|p| std::fs::read_to_string(p).ok())
                    .map(Cow::Owned)
            };
            let text = archive::unit(&source, &read(folder.join(&source))?, &header);
            let machines = architectures(&source).iter().map(|a| format!("sm_{a}"));
            // Assembly for devices that came later; they have no Hopper instructions.
            let later = (!source.ends_with("_sm90.cu")).then(|| "compute_80".to_string());
            for target in machines.chain(later) {
                for element in &cuda.elements {
                    let (op, source, target) = (contract.name.clone(), source.clone(), target.clone());
                    jobs.push(Job { key: Key { op, source, element: element.clone(), target }, text: text.clone() });
                }
            }
        }
    }
    Ok(jobs)
}
