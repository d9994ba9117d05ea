//! Saving: a transformer as a diffusers folder.

use super::PixArt;
use super::names::diffusers_parts;
use crate::error::Result;
use crate::io::{atomic, json, safetensors};
use crate::models::dit::SaveAs;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

/// Writes `config.json` and `diffusion_pytorch_model.safetensors` to `folder`, in diffusers' names. What sits at the
/// sites is told by the shapes when the model is loaded.
///
/// # Errors
/// When the folder cannot be written; an older file is never left half-overwritten.
pub fn save(model: &PixArt, folder: &Path, dtype: SaveAs, extra: &BTreeMap<String, String>) -> Result<()> {
    atomic::ensure_writable_dir(folder)?;
    let mut records = Vec::new();
    for (_, param) in model.params.iter() {
        records.extend(dtype.split(diffusers_parts(&param.name), &param.value)?);
    }
    let mut metadata = extra.clone();
    metadata.insert("format".into(), "pt".into());
    safetensors::write(&folder.join("diffusion_pytorch_model.safetensors"), records, &metadata)?;
    let c = &model.config;
    let config = json!({
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
    });
    // Last, so that a folder with a configuration is a complete one.
    json::write(&folder.join("config.json"), &config)
}
