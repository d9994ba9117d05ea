//! Saving: the diffusers folder, or the names of the original in a folder of the same kind.

use super::load::PAIRS_KEY;
use super::names::{Layout, POSITIONS, diffusers_copies, diffusers_parts};
use super::{Dit, DitConfig, position_table};
use crate::error::Result;
use crate::io::safetensors::TensorRecord;
use crate::models::folder::{self, values};
use crate::tensor::Tensor;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Element type of saved weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveAs {
    /// 32-bit floats, exact.
    F32,
    /// bfloat16, half the size.
    Bf16,
}

/// Writes `config.json` and `diffusion_pytorch_model.safetensors` to `folder`, in diffusers' names (its copies of the
/// embedders included, so that it can load a plain model). Operators and `extra` go to the metadata.
///
/// # Errors
/// When the folder cannot be written; an older file is never left half-overwritten.
pub fn save(model: &Dit, folder: &Path, dtype: SaveAs, extra: &BTreeMap<String, String>) -> Result<()> {
    save_in(model, folder, Layout::Diffusers, dtype, extra)
}

/// As [`save`], in either layout. The original's names go to `model.safetensors`, the position table among them.
pub(super) fn save_in(
    model: &Dit,
    folder: &Path,
    layout: Layout,
    dtype: SaveAs,
    extra: &BTreeMap<String, String>,
) -> Result<()> {
    let c = &model.config;
    let records = match layout {
        Layout::Original => original(model, dtype)?,
        Layout::Diffusers => diffusers(model, dtype)?,
    };
    let mut metadata = extra.clone();
    metadata.insert("format".into(), "pt".into());
    metadata.insert(folder::OPERATORS_KEY.into(), folder::operators(model));
    metadata.remove(PAIRS_KEY);
    if !c.pairs.is_empty() {
        metadata.insert(PAIRS_KEY.into(), json!(c.pairs).to_string());
    }
    let (file, config) = match layout {
        Layout::Original => ("model.safetensors", original_config(c)),
        Layout::Diffusers => ("diffusion_pytorch_model.safetensors", diffusers_config(c)),
    };
    folder::write(folder, file, records, &metadata, &config)
}

/// Whether a tensor is the fixed position table, which is never rounded.
pub(super) fn is_positions(name: &str) -> bool {
    name == "pos_embed" || name == POSITIONS
}

/// Parts of a parameter as they are written.
fn split(names: Vec<String>, value: &Tensor, dtype: SaveAs) -> Result<Vec<TensorRecord<'_>>> {
    let dtype = if names.iter().any(|name| is_positions(name)) { SaveAs::F32 } else { dtype };
    dtype.split(names, value)
}

fn original(model: &Dit, dtype: SaveAs) -> Result<Vec<TensorRecord<'_>>> {
    let mut records = Vec::new();
    for (_, param) in model.params.iter() {
        records.extend(split(vec![param.name.clone()], &param.value, dtype)?);
    }
    Ok(records)
}

fn diffusers(model: &Dit, dtype: SaveAs) -> Result<Vec<TensorRecord<'_>>> {
    let c = &model.config;
    let mut records: Vec<TensorRecord<'_>> = Vec::new();
    for (_, param) in model.params.iter() {
        let mut parts = diffusers_parts(&param.name);
        if parts.is_empty() {
            if *values(&param.value)? == position_table(c.grid(), c.width) {
                continue;
            }
            parts.push(POSITIONS.to_string());
        }
        records.extend(split(parts, &param.value, dtype)?);
    }
    for (copy, original) in diffusers_copies(c) {
        let found = records.iter().find(|record| record.name == original).cloned();
        records.extend(found.map(|record| TensorRecord { name: copy, ..record }));
    }
    Ok(records)
}

fn original_config(c: &DitConfig) -> Value {
    json!({
        "depth": c.depth(),
        "hidden_size": c.width,
        "in_channels": c.in_channels,
        "input_size": c.input_size,
        "learn_sigma": c.learn_sigma,
        "norm_eps": c.norm_eps,
        "num_classes": c.classes,
        "num_heads": c.heads,
        "patch_size": c.patch,
    })
}

fn diffusers_config(c: &DitConfig) -> Value {
    json!({
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": true,
        "attention_head_dim": c.width / c.heads,
        "dropout": 0.0,
        "in_channels": c.in_channels,
        "norm_elementwise_affine": false,
        "norm_eps": c.norm_eps,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": c.heads,
        "num_embeds_ada_norm": c.classes,
        "num_layers": c.depth(),
        "out_channels": c.out_channels(),
        "patch_size": c.patch,
        "sample_size": c.input_size,
        "upcast_attention": false,
    })
}
