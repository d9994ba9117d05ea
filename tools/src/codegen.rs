//! Reads the contracts, renders them, and writes or verifies the generated files.

use graft_codegen::Source;
use graft_codegen::contract::Contract;
use std::path::{Path, PathBuf};

/// Root of the workspace this tool was built in.
pub fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf).unwrap_or_default()
}

/// Reads every `kernels-cu/<op>/op.toml` below `root`.
///
/// # Errors
/// A line that names the file and what is wrong with it.
pub fn contracts(root: &Path) -> Result<Vec<Contract>, String> {
    let kernels = root.join("kernels-cu");
    let entries = std::fs::read_dir(&kernels).map_err(|e| format!("{}: {e}", kernels.display()))?;
    let mut paths: Vec<PathBuf> =
        entries.filter_map(|e| e.ok()).map(|e| e.path().join("op.toml")).filter(|p| p.is_file()).collect();
    paths.sort();
    paths
        .iter()
        .map(|path| {
            let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
            let contract = Contract::parse(&path.display().to_string(), &text)?;
            let directory = path.parent().and_then(Path::file_name).and_then(|n| n.to_str()).unwrap_or_default();
            if contract.name != directory {
                return Err(format!("{}: name {} differs from its directory", path.display(), contract.name));
            }
            Ok(contract)
        })
        .collect()
}

/// The `.cu` files of the operators that say in their contract that they have kernels.
///
/// # Errors
/// A file that cannot be read, or a signature that the launchers cannot follow.
pub fn sources(root: &Path, contracts: &[Contract]) -> Result<Vec<Source>, String> {
    let mut found = Vec::new();
    for op in contracts.iter().filter(|c| c.cuda.is_some()).map(|c| &c.name) {
        let folder = root.join("kernels-cu").join(op);
        let entries = std::fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let before = found.len();
        for path in
            entries.filter_map(|e| e.ok()).map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "cu"))
        {
            let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            let file = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_string();
            let kernels = graft_codegen::cuda::kernels(&path.display().to_string(), &text)?;
            found.push(Source { op: op.clone(), file, kernels });
        }
        if found.len() == before {
            return Err(format!("{}: the contract has [cuda], the folder has no .cu", folder.display()));
        }
    }
    Ok(found)
}

/// Sources, headers and the emulator's files below `kernels-cu`, relative to it.
///
/// # Errors
/// When a folder cannot be read.
pub fn source_files(root: &Path) -> Result<Vec<String>, String> {
    let kernels = root.join("kernels-cu");
    let names = |folder: &Path| -> Result<Vec<PathBuf>, String> {
        let entries = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        Ok(entries.filter_map(Result::ok).map(|e| e.path()).collect())
    };
    let mut found = Vec::new();
    for folder in names(&kernels)?.into_iter().filter(|p| p.is_dir()) {
        let name = folder.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_string();
        let wanted: &[&str] = if name == "emu" { &["h", "cpp"] } else { &["cu", "cuh"] };
        let is_wanted = |p: &PathBuf| p.extension().and_then(|e| e.to_str()).is_some_and(|e| wanted.contains(&e));
        let files = names(&folder)?.into_iter().filter(is_wanted);
        found.extend(files.filter_map(|p| Some(format!("{name}/{}", p.file_name()?.to_str()?))));
    }
    found.sort();
    Ok(found)
}

/// File and name of every kernel in `kernels-cu/probes`, in order.
fn probes(root: &Path) -> Result<Vec<(String, String)>, String> {
    let folder = root.join("kernels-cu/probes");
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut found = Vec::new();
    for path in entries.filter_map(|e| e.ok()).map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "cu")) {
        let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let file = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        found.extend(graft_codegen::cuda::names(&text).into_iter().map(|name| (file.to_string(), name)));
    }
    found.sort();
    Ok(found)
}

/// Generated files that differ from what is on disk, as (path, text).
///
/// # Errors
/// As [`contracts`].
pub fn stale(root: &Path) -> Result<Vec<(PathBuf, String)>, String> {
    let contracts = contracts(root)?;
    let sources = sources(root, &contracts)?;
    // A README that is not there yet is a finding of tidy.
    let mut files = Vec::new();
    for contract in &contracts {
        let path = root.join("kernels-cu").join(&contract.name).join("README.md");
        if let Ok(text) = std::fs::read_to_string(&path) {
            files.push((path, graft_codegen::cost::refresh_readme(contract, &text)?));
        }
    }
    let texts = graft_codegen::emit_sources::render(&source_files(root)?);
    let rendered = graft_codegen::render(contracts, sources, &probes(root)?).into_iter().chain([texts]);
    files.extend(rendered.map(|file| (root.join(file.path), file.text)));
    Ok(files.into_iter().filter(|(path, text)| std::fs::read_to_string(path).ok().as_ref() != Some(text)).collect())
}

/// Writes every stale generated file; returns their paths.
///
/// # Errors
/// As [`contracts`], or a path that cannot be written.
pub fn write(root: &Path) -> Result<Vec<PathBuf>, String> {
    stale(root)?
        .into_iter()
        .map(|(path, text)| {
            std::fs::write(&path, text).map(|()| path.clone()).map_err(|e| format!("{}: {e}", path.display()))
        })
        .collect()
}
