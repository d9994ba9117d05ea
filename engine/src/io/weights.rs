//! The weights of a model folder: one safetensors file, or the shards that an index file lists.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};
use crate::io::files::{file_name, list, printable};
use crate::io::safetensors::{TensorFile, TensorView};
use crate::io::{files, json};

/// File stems in the order of preference: diffusers components, then transformers components.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];
const EXTENSION: &str = ".safetensors";
const INDEX: &str = ".safetensors.index.json";

/// All tensors of a model, spread over one or more files.
#[derive(Debug)]
pub struct ShardedFile {
    place: String,
    shards: Vec<TensorFile>,
    /// Tensor name to the position of its shard.
    index: BTreeMap<String, usize>,
}

/// Opens the weights at `path`: a model folder, or one safetensors file.
///
/// In a folder, `diffusion_pytorch_model` comes before `model`, and a single file before its sharded form. A folder
/// with neither but exactly one safetensors file (or index) is accepted as well.
///
/// # Errors
/// "weights missing", "ambiguous weights", "shard file missing", "shard path leaves the folder", a shard that
/// disagrees with the index, or anything that [`TensorFile::open`] refuses.
pub fn open_weights(path: &Path) -> Result<ShardedFile> {
    let found = if path.is_dir() { find(path)? } else { path.to_path_buf() };
    if file_name(&found).ends_with(INDEX) {
        return open_index(&found);
    }
    if !found.exists() {
        return Err(missing(path));
    }
    ShardedFile::assemble(found.display().to_string(), vec![TensorFile::open(&found)?])
}

fn missing(path: &Path) -> Error {
    Error::failure(path.display().to_string(), "weights missing")
        .is("no safetensors file")
        .must(format!("a folder with {0}{EXTENSION} or {0}{INDEX}", STEMS[0]))
        .fix("download the weights, or name the component's own folder")
}

/// The one weight file or index that speaks for a folder.
fn find(dir: &Path) -> Result<PathBuf> {
    for stem in STEMS {
        for ending in [EXTENSION, INDEX] {
            let path = dir.join(format!("{stem}{ending}"));
            if path.exists() {
                return Ok(path);
            }
        }
    }
    let entries = list(dir)?;
    // An index speaks for its shards, so look for indices first.
    for ending in [INDEX, EXTENSION] {
        let matches: Vec<_> = entries.iter().filter(|path| file_name(path).ends_with(ending)).collect();
        match matches[..] {
            [] => {}
            [only] => return Ok(only.clone()),
            [first, second, ..] => {
                return Err(Error::failure(dir.display().to_string(), "ambiguous weights")
                    .is(format!("{} and {}", file_name(first), file_name(second)))
                    .must("one weight file or index")
                    .fix("name the file itself instead of the folder"));
            }
        }
    }
    Err(missing(dir))
}

/// Opens every shard of an index file.
fn open_index(path: &Path) -> Result<ShardedFile> {
    let place = path.display().to_string();
    let value = json::read(path)?;
    let malformed = || {
        Error::failure(&place, "invalid weight index")
            .must("an object \"weight_map\" from tensor names to shard file names")
            .fix("download the index again")
    };
    let map = value.get("weight_map").and_then(|m| m.as_object()).ok_or_else(malformed)?;
    let mut listed: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (tensor, shard) in map {
        listed.entry(shard.as_str().ok_or_else(malformed)?).or_default().insert(tensor);
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut shards = Vec::with_capacity(listed.len());
    for (name, tensors) in listed {
        let shard = open_shard(folder, &place, name)?;
        check_against_index(&shard, &tensors, path)?;
        shards.push(shard);
    }
    ShardedFile::assemble(place, shards)
}

fn open_shard(folder: &Path, index: &str, name: &str) -> Result<TensorFile> {
    let relative = Path::new(name);
    if name.is_empty() || !relative.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(Error::failure(index, "shard path leaves the folder")
            .is(printable(name))
            .must("a path below the index file's folder")
            .fix("do not trust this model; download it from its publisher"));
    }
    let path = folder.join(relative);
    if !path.is_file() {
        return Err(Error::failure(path.display().to_string(), "shard file missing")
            .is("not there")
            .must(format!("there, since {index} lists it"))
            .fix("download the missing shard"));
    }
    TensorFile::open(&path)
}

/// The index and the shard must list the same tensors, else some would silently be lost or added.
fn check_against_index(shard: &TensorFile, listed: &BTreeSet<&str>, index: &Path) -> Result<()> {
    let index = files::file_name(index);
    if let Some(name) = listed.iter().find(|name| shard.get(name).is_none()) {
        return Err(Error::failure(format!("{}: {}", shard.place(), printable(name)), "missing tensor")
            .is("not in the shard")
            .must(format!("there, since {index} lists it"))
            .fix("download index and shards from the same revision"));
    }
    if let Some(name) = shard.names().find(|name| !listed.contains(name)) {
        return Err(Error::failure(format!("{}: {}", shard.place(), printable(name)), "unexpected tensor")
            .is(format!("not listed for this shard in {index}"))
            .must("listed")
            .fix("download index and shards from the same revision"));
    }
    Ok(())
}

impl ShardedFile {
    fn assemble(place: String, shards: Vec<TensorFile>) -> Result<Self> {
        let mut index = BTreeMap::new();
        for (position, shard) in shards.iter().enumerate() {
            for name in shard.names() {
                if index.insert(name.to_owned(), position).is_some() {
                    return Err(Error::failure(format!("{place}: {}", printable(name)), "duplicate tensor name")
                        .is("in two shards")
                        .must("in one"));
                }
            }
        }
        Ok(ShardedFile { place, shards, index })
    }

    /// The weight file or index file, for messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.shards.get(*self.index.get(name)?)?.get(name)
    }

    /// As [`crate::io::map::Mapped::release`], for every file.
    pub fn release(&self) {
        self.shards.iter().for_each(TensorFile::release);
    }

    /// The files that hold the tensors.
    pub fn shards(&self) -> &[TensorFile] {
        &self.shards
    }

    /// Metadata of the first shard, which is where writers put it; empty when there is none.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        static EMPTY: BTreeMap<String, String> = BTreeMap::new();
        self.shards.first().map_or(&EMPTY, TensorFile::metadata)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::{golden, test_dir};
    use crate::io::safetensors::{TensorRecord, write};

    fn refusal(case: &str) -> String {
        open_weights(&golden(&format!("safetensors_bad/{case}/model"))).unwrap_err().to_string()
    }

    #[test]
    fn golden_refusals() {
        assert!(refusal("model_weights_file_missing").contains("weights missing"));
        let shard = refusal("model_shard_missing");
        assert!(shard.contains("diffusion_pytorch_model-00002-of-00002.safetensors: shard file missing"), "{shard}");
        let escape = refusal("model_shard_path_escapes");
        assert!(escape.contains("shard path leaves the folder; is ../../outside.safetensors"), "{escape}");
    }

    #[test]
    fn single_file_is_found_in_a_folder_and_by_name() {
        let folder = golden("safetensors_bad/model_valid/model");
        let by_folder = open_weights(&folder).unwrap();
        let by_name = open_weights(&folder.join("diffusion_pytorch_model.safetensors")).unwrap();
        assert!(by_folder.names().len() > 10 && by_folder.names().eq(by_name.names()));
        assert!(open_weights(&folder.join("none.safetensors")).unwrap_err().problem() == "weights missing");
    }

    #[test]
    fn shards_join_and_must_agree_with_the_index() {
        let dir = test_dir("weights");
        let none = BTreeMap::new();
        write(&dir.join("m-1.safetensors"), [TensorRecord::f32("a", &[1], &[1.0])], &none).unwrap();
        write(&dir.join("m-2.safetensors"), [TensorRecord::f32("b", &[1], &[2.0])], &none).unwrap();
        assert_eq!(open_weights(&dir).unwrap_err().problem(), "ambiguous weights");
        let index = |text: &str| std::fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
        index(r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}"#);
        let weights = open_weights(&dir).unwrap();
        assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(weights.get("b").unwrap().to_f32().unwrap(), [2.0]);
        assert!(weights.get("c").is_none());
        index(r#"{"weight_map": {"a": "m-1.safetensors", "c": "m-1.safetensors"}}"#);
        assert_eq!(open_weights(&dir).unwrap_err().problem(), "missing tensor");
        index(r#"{"weight_map": {"a": 1}}"#);
        assert_eq!(open_weights(&dir).unwrap_err().problem(), "invalid weight index");
    }
}
