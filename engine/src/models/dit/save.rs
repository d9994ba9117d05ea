//! Saving: the diffusers folder, or the names of the original in a folder of the same kind.

use super::load::{OPERATORS_KEY, PAIRS_KEY};
use super::names::{Layout, POSITIONS, diffusers_copies, diffusers_parts};
use super::{Dit, DitConfig, position_table};
use crate::error::Result;
use crate::io::dtype::FileDtype;
use crate::io::safetensors::{self, TensorRecord};
use crate::io::{atomic, json};
use crate::nn::operators::Site;
use crate::tensor::{DType, Tensor};
use half::bf16;
use serde_json::{Value, json};
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

impl SaveAs {
    /// A tensor as it is written; f32 values are borrowed.
    pub(in crate::models) fn record<'v>(self, name: String, shape: &[usize], values: &'v [f32]) -> TensorRecord<'v> {
        match self {
            SaveAs::F32 => TensorRecord::f32(name, shape, values),
            SaveAs::Bf16 => {
                let rounded: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
                let bytes = Cow::Owned(bytemuck::cast_slice(&rounded).to_vec());
                TensorRecord { name, dtype: FileDtype::Bf16, shape: shape.to_vec(), bytes }
            }
        }
    }

    /// A parameter as tensors of these names, equal parts of it along the first axis.
    pub(in crate::models) fn split(self, names: Vec<String>, value: &Tensor) -> Result<Vec<TensorRecord<'static>>> {
        let (values, mut shape) = (value.to_vec()?, value.shape().dims().to_vec());
        shape[0] /= names.len().max(1);
        let each = (values.len() / names.len().max(1)).max(1);
        let record = |(name, values)| {
            let TensorRecord { name, dtype, shape, bytes } = self.record(name, &shape, values);
            TensorRecord { name, dtype, shape, bytes: Cow::Owned(bytes.into_owned()) }
        };
        Ok(names.into_iter().zip(values.chunks(each)).map(record).collect())
    }
}

/// Name, shape and values of a tensor to be saved. Values that are f32 already are borrowed: a large model is not held
/// twice while it is written.
type Named<'m> = (String, Vec<usize>, Cow<'m, [f32]>);

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
    atomic::ensure_writable_dir(folder)?;
    let c = &model.config;
    let tensors = match layout {
        Layout::Original => original(model)?,
        Layout::Diffusers => diffusers(model)?,
    };
    let specs: Vec<_> = (0..c.depth())
        .map(|i| {
            let spec = |site| model.operator(i, site).map(|o| o.spec());
            json!({ "attn": spec(Site::Attn), "mlp": spec(Site::Mlp) })
        })
        .collect();
    let mut metadata = extra.clone();
    metadata.insert("format".into(), "pt".into());
    metadata.insert(OPERATORS_KEY.into(), json!(specs).to_string());
    metadata.remove(PAIRS_KEY);
    if !c.pairs.is_empty() {
        metadata.insert(PAIRS_KEY.into(), json!(c.pairs).to_string());
    }
    let records = tensors.iter().map(|(name, shape, values)| {
        let dtype = if is_positions(name) { SaveAs::F32 } else { dtype };
        dtype.record(name.clone(), shape, &values[..])
    });
    let (file, config) = match layout {
        Layout::Original => ("model.safetensors", original_config(c)),
        Layout::Diffusers => ("diffusion_pytorch_model.safetensors", diffusers_config(c)),
    };
    safetensors::write(&folder.join(file), records, &metadata)?;
    // Last, so that a folder with a configuration is a complete one.
    json::write(&folder.join("config.json"), &config)
}

/// Whether a tensor is the fixed position table, which is never rounded.
pub(super) fn is_positions(name: &str) -> bool {
    name == "pos_embed" || name == POSITIONS
}

fn values(tensor: &Tensor) -> Result<Cow<'_, [f32]>> {
    Ok(match tensor.dtype() {
        DType::F32 => tensor.values()?,
        _ => Cow::Owned(tensor.to_vec()?),
    })
}

fn original(model: &Dit) -> Result<Vec<Named<'_>>> {
    let own = model.params.iter();
    own.map(|(_, p)| Ok((p.name.clone(), p.value.shape().dims().to_vec(), values(&p.value)?))).collect()
}

fn diffusers(model: &Dit) -> Result<Vec<Named<'_>>> {
    let c = &model.config;
    let mut tensors: Vec<Named<'_>> = Vec::new();
    for (_, param) in model.params.iter() {
        let mut parts = diffusers_parts(&param.name);
        let mut shape = param.value.shape().dims().to_vec();
        let values = values(&param.value)?;
        if parts.is_empty() {
            if *values == position_table(c.grid(), c.width) {
                continue;
            }
            parts.push(POSITIONS.to_string());
        }
        shape[0] /= parts.len();
        let chunk = (values.len() / parts.len()).max(1);
        let values: Vec<Cow<'_, [f32]>> = match values {
            Cow::Borrowed(all) => all.chunks(chunk).map(Cow::Borrowed).collect(),
            Cow::Owned(all) => all.chunks(chunk).map(|part| Cow::Owned(part.to_vec())).collect(),
        };
        tensors.extend(parts.into_iter().zip(values).map(|(name, values)| (name, shape.clone(), values)));
    }
    for (copy, original) in diffusers_copies(c) {
        let found = tensors.iter().find(|(name, ..)| *name == original).map(|(_, s, v)| (s.clone(), v.clone()));
        tensors.extend(found.map(|(shape, values)| (copy, shape, values)));
    }
    Ok(tensors)
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
