//! Loading: finds out layout and sizes, checks every tensor, then fills a model. Nothing is half-loaded.

use super::infer::{self, Assumed};
use super::names::{Layout, POSITIONS, diffusers_copies, diffusers_parts};
use super::{Dit, DitConfig};
use crate::autograd::ParamId;
use crate::error::{Error, Result};
use crate::io::{json, weights};
use crate::models::fill::round;
use crate::models::folder::{self, OPERATORS_KEY};
use crate::models::open::{is_pickle, only_pickle, open_pickle};
use crate::models::source::{Source, read_weight};
use crate::tensor::Device;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Metadata key under which a folder carries the pairs of blocks that run in parallel; absent where none do.
pub(super) const PAIRS_KEY: &str = "graft.pairs";

/// Loads a DiT from a diffusers folder, a folder with an original `.pt`, or a `.pt` or safetensors file.
///
/// # Errors
/// One line that names the file, the tensor, what it is and what it must be.
pub fn load(path: &Path, device: &Device) -> Result<Dit> {
    open(path)?.load(device)
}

/// Sizes and operators of a model folder or file, without its weights.
///
/// # Errors
/// As [`load`].
pub fn describe(path: &Path) -> Result<DitConfig> {
    Ok(open(path)?.config)
}

/// Options of operators that a checkpoint leaves open, so that the published values are taken. Folders that this
/// program wrote leave nothing open.
///
/// # Errors
/// As [`load`].
pub fn assumptions(path: &Path) -> Result<Vec<Assumed>> {
    Ok(open(path)?.assumed)
}

/// The files that hold the weights of a model folder or file, in order.
///
/// # Errors
/// When there are none, or they cannot be opened.
pub fn weight_files(path: &Path) -> Result<Vec<PathBuf>> {
    if is_pickle(path) {
        return Ok(vec![path.to_path_buf()]);
    }
    if path.is_dir()
        && let Some(found) = only_pickle(path)?
    {
        return Ok(vec![found]);
    }
    Ok(weights::open_weights(path)?.shards().iter().map(|shard| PathBuf::from(shard.place())).collect())
}

/// A checkpoint whose sizes and operators are known.
pub(super) struct Opened {
    pub config: DitConfig,
    pub assumed: Vec<Assumed>,
    pub metadata: BTreeMap<String, String>,
    pub source: Box<dyn Source>,
}

impl Opened {
    /// Makes the model and fills it.
    pub fn load(self, device: &Device) -> Result<Dit> {
        let mut model = Dit::unset(self.config, device)?;
        fill(&mut model, self.source.as_ref())?;
        Ok(model)
    }
}

pub(super) fn open(path: &Path) -> Result<Opened> {
    if !path.exists() {
        return Err(Error::failure(path.display().to_string(), "no such file or folder")
            .must("a model folder or checkpoint")
            .fix("check --model"));
    }
    if path.is_dir()
        && let Some(found) = only_pickle(path)?
    {
        return open(&found);
    }
    if is_pickle(path) {
        let source = open_pickle(path)?;
        let beside = path.parent().map(|p| p.join("config.json")).filter(|p| p.is_file());
        let config = match beside {
            Some(file) => configure(&json::read(&file)?, &file, &BTreeMap::new())?,
            None => infer::sizes(source.as_ref())?,
        };
        return finish(config, BTreeMap::new(), source);
    }
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
    let config_path = folder.join("config.json");
    let config_json = json::read(&config_path)?;
    let opened = weights::open_weights(path)?;
    let config = configure(&config_json, &config_path, opened.metadata())?;
    finish(config, opened.metadata().clone(), Box::new(opened))
}

/// Where nothing states the operators, they are told by the tensors of the original layout.
fn finish(mut config: DitConfig, metadata: BTreeMap<String, String>, source: Box<dyn Source>) -> Result<Opened> {
    let assumed = match metadata.contains_key(OPERATORS_KEY) {
        true => Vec::new(),
        false => infer::operators(&mut config, source.as_ref())?,
    };
    Ok(Opened { config, assumed, metadata, source })
}

/// Reads a configuration in diffusers' or the original's vocabulary.
fn configure(config: &Value, path: &Path, metadata: &BTreeMap<String, String>) -> Result<DitConfig> {
    let place = path.display().to_string();
    let class = config.get("_class_name").and_then(Value::as_str);
    let reader = Reader { place: &place, config };
    let mut found = match class {
        Some("DiTTransformer2DModel") => reader.diffusers()?,
        None => reader.original()?,
        Some("Transformer2DModel") if config.get("norm_type").and_then(Value::as_str) == Some("ada_norm_zero") => {
            reader.diffusers()?
        }
        Some(other) => {
            return Err(Error::failure(place, "unsupported model class")
                .is(other)
                .must("DiTTransformer2DModel")
                .fix("give the folder of the transformer itself"));
        }
    };
    folder::stated_operators(&place, metadata, &mut found.blocks)?;
    if let Some(text) = metadata.get(PAIRS_KEY) {
        found.pairs = serde_json::from_str(text).map_err(|e| {
            Error::failure(&place, format!("metadata {PAIRS_KEY} cannot be read: {e}"))
                .must("the text that this program wrote")
        })?;
    }
    found.check().map_err(|e| e.context(&place))?;
    Ok(found)
}

struct Reader<'a> {
    place: &'a str,
    config: &'a Value,
}

impl Reader<'_> {
    fn whole(&self, key: &str) -> Result<Option<usize>> {
        match self.config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_u64().and_then(|v| usize::try_from(v).ok()).map(Some).ok_or_else(|| {
                Error::failure(format!("{}: {key}", self.place), "not a whole number")
                    .is(value)
                    .must("a non-negative integer")
            }),
        }
    }

    fn needed(&self, key: &str) -> Result<usize> {
        self.whole(key)?
            .ok_or_else(|| Error::failure(format!("{}: {key}", self.place), "missing field").must("a whole number"))
    }

    fn number(&self, key: &str, default: f64) -> f64 {
        self.config.get(key).and_then(json::number).unwrap_or(default)
    }

    fn diffusers(&self) -> Result<DitConfig> {
        let heads = self.needed("num_attention_heads")?;
        let width = heads.saturating_mul(self.needed("attention_head_dim")?);
        let depth = self.depth("num_layers")?;
        let in_channels = self.needed("in_channels")?;
        let out_channels = self.whole("out_channels")?.unwrap_or(in_channels);
        Ok(DitConfig {
            patch: self.needed("patch_size")?,
            input_size: self.needed("sample_size")?,
            in_channels,
            learn_sigma: self.learn_sigma(in_channels, out_channels)?,
            classes: self.whole("num_embeds_ada_norm")?.unwrap_or(1000),
            norm_eps: self.number("norm_eps", 1e-5) as f32,
            ..DitConfig::plain(depth, width, heads)
        })
    }

    fn original(&self) -> Result<DitConfig> {
        let heads = self.needed("num_heads")?;
        let (depth, width) = (self.depth("depth")?, self.needed("hidden_size")?);
        let learn_sigma = self.config.get("learn_sigma").and_then(Value::as_bool).unwrap_or(true);
        let block = DitConfig::plain_block(heads, self.number("mlp_ratio", 4.0));
        Ok(DitConfig {
            patch: self.needed("patch_size")?,
            input_size: self.needed("input_size")?,
            in_channels: self.whole("in_channels")?.unwrap_or(4),
            learn_sigma,
            classes: self.whole("num_classes")?.unwrap_or(1000),
            norm_eps: self.number("norm_eps", 1e-5) as f32,
            blocks: vec![block; depth],
            ..DitConfig::plain(depth, width, heads)
        })
    }

    // Bounded before it sizes a vector: the number comes from a file.
    fn depth(&self, key: &str) -> Result<usize> {
        let depth = self.needed(key)?;
        if depth == 0 || depth > 1000 {
            return Err(Error::failure(format!("{}: {key}", self.place), "impossible depth")
                .is(depth)
                .must("1 to 1000"));
        }
        Ok(depth)
    }

    fn learn_sigma(&self, inputs: usize, outputs: usize) -> Result<bool> {
        if outputs == inputs || outputs == inputs.saturating_mul(2) {
            return Ok(outputs != inputs);
        }
        Err(Error::failure(format!("{}: out_channels", self.place), "fits neither noise nor noise and variance")
            .is(outputs)
            .must(format!("{inputs} or {}", inputs.saturating_mul(2))))
    }
}

/// Fills every parameter, after all names were checked.
fn fill(model: &mut Dit, source: &dyn Source) -> Result<()> {
    let names = source.names();
    let layout = Layout::of(names.iter().map(String::as_str)).ok_or_else(|| {
        Error::failure(source.place(), "unknown layout")
            .is(format!("{} tensors", names.len()))
            .must("tensors named blocks.* or transformer_blocks.*")
    })?;
    let wanted: Vec<(ParamId, Vec<String>)> = model
        .params
        .iter()
        .map(|(id, p)| {
            let parts = match layout {
                Layout::Original => vec![p.name.clone()],
                // Stored only where it is not the table that follows from the sizes.
                Layout::Diffusers if p.name == "pos_embed" && names.contains(POSITIONS) => vec![POSITIONS.to_string()],
                Layout::Diffusers => diffusers_parts(&p.name),
            };
            (id, parts)
        })
        .collect();
    let copies = if layout == Layout::Diffusers { diffusers_copies(&model.config) } else { Vec::new() };
    let mut expected: BTreeSet<&str> = wanted.iter().flat_map(|(_, parts)| parts).map(String::as_str).collect();
    expected.extend(copies.iter().map(|(copy, _)| copy.as_str()));
    // A missing tensor explains more than the unexpected one that took its place.
    if let Some(missing) = wanted.iter().flat_map(|(_, parts)| parts).find(|n| !names.contains(*n)) {
        return Err(Error::failure(format!("{}: {missing}", source.place()), "missing tensor")
            .must("present in this model")
            .fix("use the complete checkpoint, with the config.json that belongs to it"));
    }
    if let Some(extra) = names.iter().find(|n| !expected.contains(n.as_str())) {
        return Err(Error::failure(format!("{}: {extra}", source.place()), "unexpected tensor")
            .must("absent in a model of these sizes and operators")
            .fix("use the config.json that belongs to the checkpoint"));
    }
    for (id, parts) in wanted {
        if parts.is_empty() {
            continue;
        }
        let shape = model.params.get(id).value.shape();
        let mut part_shape = shape.dims().to_vec();
        part_shape[0] /= parts.len();
        let device = model.params.get(id).value.device().clone();
        let mut value = device.empty(shape.dims())?;
        value.edit(|target| -> Result<()> {
            let chunk = target.len() / parts.len();
            for (name, target) in parts.iter().zip(target.chunks_mut(chunk.max(1))) {
                target.copy_from_slice(&read_weight(source, name, &part_shape)?);
            }
            Ok(())
        })??;
        model.params.set(id, value)?;
        // Else the whole file would stay in memory beside its copy.
        source.release();
    }
    model.device().trim();
    Ok(())
}

/// Stores the weights of all products in bf16, and all else, too, on a device that computes in it: for inference in half
/// the memory.
///
/// # Errors
/// When memory runs out.
pub fn to_bf16(model: &mut Dit) -> Result<()> {
    round(&mut model.params)
}
