//! Saving a transformer as a diffusers folder; the operators of its blocks go to the metadata.

use super::names::diffusers_parts;
use super::{PixArt, PixArtConfig};
use crate::error::Result;
pub use crate::models::dit::SaveAs;
use crate::models::folder;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Writes `config.json` and `diffusion_pytorch_model.safetensors` to `folder` in diffusers' names; diffusers loads a
/// plain model from it. Operators and `extra` go to the metadata.
///
/// # Errors
/// When the folder cannot be written; an older file is never left half-overwritten.
pub fn save(model: &PixArt, folder: &Path, dtype: SaveAs, extra: &BTreeMap<String, String>) -> Result<()> {
    let mut records = Vec::new();
    for (_, param) in model.params.iter() {
        records.extend(dtype.split(diffusers_parts(&param.name), &param.value)?);
    }
    let mut metadata = extra.clone();
    metadata.insert("format".into(), "pt".into());
    metadata.insert(folder::OPERATORS_KEY.into(), folder::operators(model));
    folder::write(folder, "diffusion_pytorch_model.safetensors", records, &metadata, &config(&model.config))
}

/// The fields of a configuration of diffusers, and the number of tokens, which its pipelines state in code.
pub(super) fn config(c: &PixArtConfig) -> Value {
    json!({
        "_class_name": "PixArtTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": true,
        "attention_head_dim": c.width / c.heads,
        "caption_channels": c.caption_channels,
        "cross_attention_dim": c.width,
        "dropout": 0.0,
        "in_channels": c.in_channels,
        "interpolation_scale": c.interpolation,
        "max_tokens": c.max_tokens,
        "norm_elementwise_affine": false,
        "norm_eps": c.norm_eps,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_single",
        "num_attention_heads": c.heads,
        "num_embeds_ada_norm": 1000,
        "num_layers": c.depth(),
        "out_channels": c.out_channels,
        "patch_size": c.patch,
        "sample_size": c.sample_size,
        "upcast_attention": false,
        "use_additional_conditions": c.micro_conditions,
    })
}
