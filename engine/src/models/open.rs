//! Opening the weights of a model: a folder or a file, safetensors or `torch.save`, whole or in shards, with the
//! configuration beside them.

use super::source::{Source, StoredTensor, TorchWeights};
use crate::error::{Error, Result};
use crate::io::{files, json, weights};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

/// Ending of the file that lists the shards of a `torch.save` checkpoint.
const INDEX: &str = ".bin.index.json";

/// Weights and what was found beside them.
pub struct Opened {
    /// The tensors.
    pub source: Box<dyn Source>,
    /// Metadata of the weights; empty for `torch.save` files.
    pub metadata: BTreeMap<String, String>,
    /// `config.json` and its path, where there is one.
    pub config: Option<(PathBuf, Value)>,
}

/// Opens the weights at `path`: a folder (safetensors are preferred) or a file.
///
/// # Errors
/// When nothing is there, several checkpoints are, or one is damaged.
pub fn open(path: &Path) -> Result<Opened> {
    if !path.exists() {
        return Err(Error::failure(path.display().to_string(), "no such file or folder")
            .must("a model folder or checkpoint")
            .fix("check the path"));
    }
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
    let beside = folder.join("config.json");
    let config = match beside.is_file() {
        true => Some((beside.clone(), json::read(&beside)?)),
        false => None,
    };
    let pickle = match path.is_dir() {
        true => only_pickle(path)?,
        false => is_pickle(path).then(|| path.to_path_buf()),
    };
    if let Some(found) = pickle {
        return Ok(Opened { source: open_pickle(&found)?, metadata: BTreeMap::new(), config });
    }
    let opened = weights::open_weights(path)?;
    Ok(Opened { metadata: opened.metadata().clone(), source: Box::new(opened), config })
}

/// Folders of a grafting run that hold its models, the last stage first.
pub const STAGES: [&str; 2] = ["stage2", "stage1"];
/// The file by which the folder of a grafting run is known.
pub const PLAN: &str = "plan.toml";

/// The model of the last stage where `path` is the folder of a grafting run, else `path` itself.
pub fn last_stage(path: &Path) -> PathBuf {
    let stages = STAGES.iter().map(|stage| path.join(stage));
    let found = stages.filter(|_| path.join(PLAN).is_file()).find(|stage| stage.join("config.json").is_file());
    found.unwrap_or_else(|| path.to_path_buf())
}

/// The folder of a component where `path` is that of a whole pipeline, else `path` itself; of a grafting run the model of
/// its last stage.
pub fn component(path: &Path, name: &str) -> PathBuf {
    let path = &last_stage(path);
    let below = path.join(name);
    let pipeline = path.join("model_index.json").is_file() || (below.is_dir() && !path.join("config.json").is_file());
    if pipeline && below.is_dir() { below } else { path.to_path_buf() }
}

/// Whether a path names a `torch.save` file or the index of its shards.
pub(super) fn is_pickle(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "pt" || e == "pth" || e == "bin") || files::file_name(path).ends_with(INDEX)
}

/// The `torch.save` file, or the index of its shards, of a folder that has no safetensors.
pub(super) fn only_pickle(folder: &Path) -> Result<Option<PathBuf>> {
    let entries = files::list(folder)?;
    if entries.iter().any(|p| p.to_string_lossy().contains(".safetensors")) {
        return Ok(None);
    }
    let mut pickles: Vec<PathBuf> = entries.into_iter().filter(|p| is_pickle(p)).collect();
    // An index speaks for its shards.
    if let Some(index) = pickles.iter().position(|p| files::file_name(p).ends_with(INDEX)) {
        return Ok(Some(pickles.swap_remove(index)));
    }
    match pickles.as_slice() {
        [first, second, ..] => Err(Error::failure(folder.display().to_string(), "ambiguous weights")
            .is(format!("{} and {}", first.display(), second.display()))
            .must("one checkpoint")
            .fix("name the file itself instead of the folder")),
        _ => Ok(pickles.pop()),
    }
}

/// Opens a `torch.save` file or the shards that an index lists.
pub(super) fn open_pickle(path: &Path) -> Result<Box<dyn Source>> {
    if !files::file_name(path).ends_with(INDEX) {
        return Ok(Box::new(TorchWeights::open(path)?));
    }
    let place = path.display().to_string();
    let value = json::read(path)?;
    let malformed = || {
        Error::failure(&place, "invalid weight index").must("an object \"weight_map\" from tensor names to file names")
    };
    let map = value.get("weight_map").and_then(Value::as_object).ok_or_else(malformed)?;
    let (mut shards, mut index): (Vec<(String, TorchWeights)>, _) = (Vec::new(), BTreeMap::new());
    for (tensor, file) in map {
        let file = file.as_str().ok_or_else(malformed)?;
        let at = match shards.iter().position(|(name, _)| name == file) {
            Some(at) => at,
            None => {
                shards.push((file.to_string(), open_shard(path, file)?));
                shards.len() - 1
            }
        };
        if shards[at].1.tensor(tensor).is_none() {
            return Err(Error::failure(
                format!("{}: {}", shards[at].1.place(), files::printable(tensor)),
                "missing tensor",
            )
            .is("not in the shard")
            .must("there, since the index lists it")
            .fix("download index and shards from the same revision"));
        }
        index.insert(tensor.clone(), at);
    }
    Ok(Box::new(TorchShards { place, shards: shards.into_iter().map(|(_, shard)| shard).collect(), index }))
}

fn open_shard(index: &Path, file: &str) -> Result<TorchWeights> {
    if file.is_empty() || !Path::new(file).components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(Error::failure(index.display().to_string(), "shard path leaves the folder")
            .is(files::printable(file))
            .must("a path below the index file's folder"));
    }
    let path = index.with_file_name(file);
    if !path.is_file() {
        return Err(Error::failure(path.display().to_string(), "shard file missing")
            .is("not there")
            .must(format!("there, since {} lists it", index.display()))
            .fix("download the missing shard"));
    }
    TorchWeights::open(&path)
}

/// `torch.save` files that make up one checkpoint.
struct TorchShards {
    place: String,
    shards: Vec<TorchWeights>,
    index: BTreeMap<String, usize>,
}

impl Source for TorchShards {
    fn place(&self) -> String {
        self.place.clone()
    }
    fn names(&self) -> BTreeSet<String> {
        self.index.keys().cloned().collect()
    }
    fn tensor(&self, name: &str) -> Option<Box<dyn StoredTensor + '_>> {
        self.shards.get(*self.index.get(name)?)?.tensor(name)
    }
    fn release(&self) {
        self.shards.iter().for_each(Source::release);
    }
}

/// A source under other names.
pub(super) struct Renamed {
    inner: Box<dyn Source>,
    /// New name to the one in the file.
    names: BTreeMap<String, String>,
}

impl Renamed {
    /// `inner` under the names that `rename` gives; those that it gives none are hidden.
    pub(super) fn under(inner: Box<dyn Source>, rename: impl Fn(&str) -> Option<String>) -> Box<dyn Source> {
        let names = inner.names().into_iter().filter_map(|name| Some((rename(&name)?, name))).collect();
        Box::new(Renamed { inner, names })
    }

    /// `inner` without the first of `prefixes` that any of its names begins with; other names stay.
    pub(super) fn without(inner: Box<dyn Source>, prefixes: &[&str]) -> Box<dyn Source> {
        let names = inner.names();
        match prefixes.iter().find(|prefix| names.iter().any(|name| name.starts_with(**prefix))) {
            None => inner,
            Some(prefix) => Renamed::under(inner, |name| Some(name.strip_prefix(prefix).unwrap_or(name).to_string())),
        }
    }
}

impl Source for Renamed {
    fn place(&self) -> String {
        self.inner.place()
    }
    fn names(&self) -> BTreeSet<String> {
        self.names.keys().cloned().collect()
    }
    fn tensor(&self, name: &str) -> Option<Box<dyn StoredTensor + '_>> {
        self.inner.tensor(self.names.get(name)?)
    }
    fn release(&self) {
        self.inner.release();
    }
}
