//! Saving in the diffusers folder layout.

use super::Dit;
use super::load::OPERATORS_KEY;
use super::names::{diffusers_copies, diffusers_parts};
use crate::error::Result;
use crate::io::dtype::FileDtype;
use crate::io::safetensors::{self, TensorRecord};
use crate::io::{atomic, json};
use crate::nn::operators::Site;
use crate::tensor::DType;
use half::bf16;
use serde_json::json;
use std::borrow::Cow;
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
    atomic::ensure_writable_dir(folder)?;
    let c = &model.config;
    // Borrowed where they are f32 already: a large model is not held twice while it is written.
    let mut tensors: Vec<(String, Vec<usize>, Cow<'_, [f32]>)> = Vec::new();
    for (_, param) in model.params.iter() {
        let parts = diffusers_parts(&param.name);
        let mut shape = param.value.shape().dims().to_vec();
        if parts.is_empty() {
            continue;
        }
        shape[0] /= parts.len();
        let chunk = (param.value.len() / parts.len()).max(1);
        let values: Vec<Cow<'_, [f32]>> = match param.value.dtype() {
            DType::F32 => param.value.f32s()?.chunks(chunk).map(Cow::Borrowed).collect(),
            _ => param.value.to_vec()?.chunks(chunk).map(|part| Cow::Owned(part.to_vec())).collect(),
        };
        tensors.extend(parts.into_iter().zip(values).map(|(name, values)| (name, shape.clone(), values)));
    }
    for (copy, original) in diffusers_copies(c) {
        let found = tensors.iter().find(|(name, ..)| *name == original).map(|(_, s, v)| (s.clone(), v.clone()));
        tensors.extend(found.map(|(shape, values)| (copy, shape, values)));
    }
    let specs: Vec<_> = (0..c.depth())
        .map(|i| {
            let spec = |site| model.operator(i, site).map(|o| o.spec());
            json!({ "attn": spec(Site::Attn), "mlp": spec(Site::Mlp) })
        })
        .collect();
    let mut metadata = extra.clone();
    metadata.insert("format".into(), "pt".into());
    metadata.insert(OPERATORS_KEY.into(), json!(specs).to_string());
    let records = tensors.iter().map(|(name, shape, values)| match dtype {
        SaveAs::F32 => TensorRecord::f32(name.clone(), shape, values),
        SaveAs::Bf16 => {
            let rounded: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
            TensorRecord {
                name: name.clone(),
                dtype: FileDtype::Bf16,
                shape: shape.clone(),
                bytes: Cow::Owned(bytemuck::cast_slice(&rounded).to_vec()),
            }
        }
    });
    safetensors::write(&folder.join("diffusion_pytorch_model.safetensors"), records, &metadata)?;
    // Last, so that a folder with a configuration is a complete one.
    json::write(
        &folder.join("config.json"),
        &json!({
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
        }),
    )
}
