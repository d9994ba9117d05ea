//! Loading an encoder, as a whole or block by block as it runs.

use super::{BIASES, Block, T5, T5Config, block_prefix};
use crate::autograd::ParamStore;
use crate::error::{Error, Result};
use crate::io::json;
use crate::models::fill::{Fill, Place, fill};
use crate::models::open::{Opened, Renamed, open};
use crate::models::source::Source;
use crate::nn::{Builder, Scheme};
use crate::tensor::Device;
use serde_json::Value;
use std::path::Path;

/// Where the blocks of an encoder are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residence {
    /// In memory.
    Memory,
    /// On disk: a block is read when it is needed and forgotten after.
    Stream,
}

/// What other programs put before every name.
const PREFIXES: [&str; 3] = ["text_encoders.t5xxl.transformer.", "text_encoder.", "model."];
/// What the first block calls the table of embeddings in some files.
const ALIAS: &str = "encoder.embed_tokens.weight";

/// Loads an encoder from a folder (safetensors or `.bin`, whole or in shards) or a file; `bf16` rounds the weights of
/// products as they are read, but for the last of every MLP.
///
/// # Errors
/// One line that names the file, the tensor, what it is and what it must be.
pub fn load(path: &Path, device: &Device, bf16: bool, residence: Residence) -> Result<T5> {
    let (config, source) = examine(path)?;
    let mut model = T5::build(config, device, (&Device::dry(), 0, Scheme::Unset), residence == Residence::Memory)?;
    let blocks = |name: &str| residence == Residence::Stream && is_in_block(name);
    fill_from(&mut model.params, source.as_ref(), device, bf16, &blocks)?;
    if residence == Residence::Stream {
        model.stream = Some(Stream { source, bf16 });
    }
    Ok(model)
}

fn examine(path: &Path) -> Result<(T5Config, Box<dyn Source>)> {
    let Opened { source, config, .. } = open(path)?;
    let source = Renamed::without(source, &PREFIXES);
    let has_shared = source.names().contains("shared.weight");
    let source = Renamed::under(source, |name| match name {
        ALIAS => (!has_shared).then(|| "shared.weight".to_string()),
        // A whole T5 has a decoder, which nobody reads.
        _ => (name == "shared.weight" || name.starts_with("encoder.")).then(|| name.to_string()),
    });
    let config = sizes(source.as_ref(), config.as_ref().map(|(path, value)| (path.as_path(), value)))?;
    Ok((config, source))
}

/// Bytes that [`load`] and the largest block of a run will hold, without reading a weight.
///
/// # Errors
/// As [`load`].
pub fn plan_memory(path: &Path, bf16: bool, residence: Residence) -> Result<usize> {
    memory_of(&examine(path)?.0, bf16, residence)
}

/// As [`plan_memory`], of an encoder of given sizes.
///
/// # Errors
/// Sizes that cannot be.
pub fn memory_of(config: &T5Config, bf16: bool, residence: Residence) -> Result<usize> {
    let whole = T5::build(config.clone(), &Device::dry(), (&Device::dry(), 0, Scheme::Unset), true)?;
    let held =
        |name: &str, len: usize| len * if bf16 && !is_exact(name) && !name.ends_with("norm.weight") { 2 } else { 4 };
    let sizes = whole.params.iter().map(|(_, p)| (&p.name, held(&p.name, p.value.len())));
    let (mut beside, mut blocks) = (0, 0);
    for (name, bytes) in sizes {
        *(if is_in_block(name) { &mut blocks } else { &mut beside }) += bytes;
    }
    Ok(beside + if residence == Residence::Memory { blocks } else { blocks / config.depth.max(1) })
}

/// Tables that are looked up, and the matrix whose results are large: never rounded.
fn is_exact(name: &str) -> bool {
    name == "shared.weight" || name == BIASES || name.ends_with(".wo.weight")
}

/// Whether a tensor belongs to a block; the biases stand beside them.
fn is_in_block(name: &str) -> bool {
    name.starts_with("encoder.block.") && name != BIASES
}

fn fill_from(
    params: &mut ParamStore,
    source: &dyn Source,
    device: &Device,
    bf16: bool,
    ignored: &dyn Fn(&str) -> bool,
) -> Result<()> {
    let place = |name: &str| match name.split_once(".qkv.") {
        None => Place::of(name),
        Some((layer, rest)) => {
            let parts = ["q", "k", "v"].iter().map(|part| format!("{layer}.{part}.{rest}")).collect();
            Place { parts, filters: false }
        }
    };
    fill(params, source, device, &Fill { place: &place, ignored, bf16, exact: &is_exact })
}

/// The blocks of an encoder on disk.
pub(super) struct Stream {
    source: Box<dyn Source>,
    bf16: bool,
}

impl Stream {
    /// Reads a block.
    pub fn block(&self, index: usize, config: &T5Config, device: &Device) -> Result<(Block, ParamStore)> {
        let mut params = ParamStore::default();
        let block = Block::build(index, config, &mut Builder::new(&mut params, &Device::dry(), 0, Scheme::Unset))?;
        let prefix = format!("{}.", block_prefix(index));
        // What is not of this block has been or will be checked in its turn.
        let others = |name: &str| !name.starts_with(&prefix) || name == BIASES;
        fill_from(&mut params, self.source.as_ref(), device, self.bf16, &others)?;
        Ok((block, params))
    }
}

/// Sizes read off the tensors; the configuration gives what they do not tell.
fn sizes(source: &dyn Source, config: Option<(&Path, &Value)>) -> Result<T5Config> {
    let names = source.names();
    let shape = |name: &str| -> Result<[usize; 2]> {
        let found = source.tensor(name).map(|t| t.shape().to_vec()).ok_or_else(|| {
            Error::failure(format!("{}: {name}", source.place()), "missing tensor")
                .must("present in a T5 v1.1 encoder")
                .fix("give the folder text_encoder of the model")
        })?;
        found.as_slice().try_into().map_err(|_| {
            Error::failure(format!("{}: {name}", source.place()), "wrong rank")
                .is(format!("{found:?}"))
                .must("a matrix")
        })
    };
    if names.contains("encoder.block.0.layer.1.DenseReluDense.wi.weight") {
        return Err(Error::failure(source.place(), "an encoder without gates")
            .is("T5 v1.0")
            .must("T5 v1.1 (feed_forward_proj gated-gelu)"));
    }
    let [vocabulary, width] = shape("shared.weight")?;
    let [inner, _] = shape("encoder.block.0.layer.0.SelfAttention.q.weight")?;
    let [buckets, heads] = shape(BIASES)?;
    let [hidden, _] = shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")?;
    let depth = (0..1000).take_while(|i| names.contains(&format!("{}.layer.0.layer_norm.weight", block_prefix(*i))));
    let depth = depth.count();
    if heads == 0 || !inner.is_multiple_of(heads) {
        return Err(Error::failure(source.place(), "heads do not divide the projections")
            .is(format!("{heads} heads, {inner} rows"))
            .must("a divisor"));
    }
    let found =
        T5Config { width, heads, head_width: inner / heads, hidden, depth, vocabulary, buckets, ..T5Config::xxl() };
    let Some((path, value)) = config else { return Ok(found) };
    let field = |key: &str| value.get(key).filter(|v| !v.is_null());
    let text = |key: &str| field(key).and_then(Value::as_str);
    if text("feed_forward_proj").is_some_and(|kind| kind != "gated-gelu") {
        return Err(Error::failure(format!("{}: feed_forward_proj", path.display()), "unsupported activation")
            .is(text("feed_forward_proj").unwrap_or_default())
            .must("gated-gelu"));
    }
    for (key, have) in [("d_model", width), ("num_heads", heads), ("d_ff", hidden), ("num_layers", depth)] {
        if let Some(stated) = field(key).filter(|v| v.as_u64() != Some(have as u64)) {
            return Err(Error::failure(format!("{}: {key}", path.display()), "differs from the tensors")
                .is(stated)
                .must(have)
                .fix("use the config.json that belongs to the weights"));
        }
    }
    let whole = |key: &str, default: usize| field(key).and_then(Value::as_u64).map_or(default, |v| v as usize);
    let max_distance = whole("relative_attention_max_distance", found.max_distance);
    let eps = field("layer_norm_epsilon").and_then(json::number).unwrap_or(1e-6) as f32;
    Ok(T5Config { max_distance, eps, ..found })
}
