//! What the folders of both transformers have in common: tensors split into the parts of another layout, operators in
//! the metadata, `config.json` written last.

use super::dit::{BlockSpec, SaveAs};
use super::sites::{SiteConfig, SiteModel};
use crate::error::{Error, Result};
use crate::io::dtype::FileDtype;
use crate::io::safetensors::{self, TensorRecord};
use crate::io::{atomic, json};
use crate::nn::operators::{Site, Spec};
use crate::tensor::{DType, Tensor};
use half::bf16;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// Metadata key under which a folder carries the operators of its blocks.
pub(super) const OPERATORS_KEY: &str = "graft.operators";

/// Values of a tensor as f32.
pub(super) fn values(tensor: &Tensor) -> Result<Cow<'_, [f32]>> {
    Ok(match tensor.dtype() {
        DType::F32 => tensor.values()?,
        _ => Cow::Owned(tensor.to_vec()?),
    })
}

impl SaveAs {
    /// A tensor as it is written. Values that are f32 already are borrowed: a large model is not held twice while it is
    /// written.
    fn record<'v>(self, name: String, shape: &[usize], values: Cow<'v, [f32]>) -> TensorRecord<'v> {
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
    pub(super) fn split(self, names: Vec<String>, value: &Tensor) -> Result<Vec<TensorRecord<'_>>> {
        let (values, mut shape) = (values(value)?, value.shape().dims().to_vec());
        shape[0] /= names.len().max(1);
        let each = (values.len() / names.len().max(1)).max(1);
        let parts: Vec<Cow<'_, [f32]>> = match values {
            Cow::Borrowed(all) => all.chunks(each).map(Cow::Borrowed).collect(),
            Cow::Owned(all) => all.chunks(each).map(|part| Cow::Owned(part.to_vec())).collect(),
        };
        Ok(names.into_iter().zip(parts).map(|(name, values)| self.record(name, &shape, values)).collect())
    }
}

/// The operators of every block, as they stand in the metadata.
pub(super) fn operators<M: SiteModel>(model: &M) -> String {
    let specs: Vec<_> = (0..model.config().depth())
        .map(|i| {
            let spec = |site| model.operator(i, site).map(|o| o.spec());
            json!({ "attn": spec(Site::Attn), "mlp": spec(Site::Mlp) })
        })
        .collect();
    json!(specs).to_string()
}

/// Sets the operators of `blocks` to those that the metadata of a folder states, where it states any; says whether it
/// does.
///
/// # Errors
/// Metadata that cannot be read, or that of another depth.
pub(super) fn stated_operators(
    place: &str,
    metadata: &BTreeMap<String, String>,
    blocks: &mut [BlockSpec],
) -> Result<bool> {
    let Some(text) = metadata.get(OPERATORS_KEY) else { return Ok(false) };
    let specs: Vec<BTreeMap<String, Spec>> = serde_json::from_str(text).map_err(|e| {
        Error::failure(place, format!("metadata {OPERATORS_KEY} cannot be read: {e}"))
            .must("the text that this program wrote")
    })?;
    if specs.len() != blocks.len() {
        return Err(Error::failure(place, format!("metadata {OPERATORS_KEY} does not fit the depth"))
            .is(format!("{} blocks", specs.len()))
            .must(format!("{} blocks", blocks.len())));
    }
    for (block, spec) in blocks.iter_mut().zip(specs) {
        for (site, target) in [("attn", &mut block.attn), ("mlp", &mut block.mlp)] {
            if let Some(given) = spec.get(site) {
                *target = given.clone();
            }
        }
    }
    Ok(true)
}

/// Writes weights and configuration of a model, the configuration last, so that a folder that has it is complete.
///
/// # Errors
/// When the folder cannot be written; an older file is never left half-overwritten.
pub(super) fn write<'r>(
    folder: &Path,
    file: &str,
    records: impl IntoIterator<Item = TensorRecord<'r>>,
    metadata: &BTreeMap<String, String>,
    config: &Value,
) -> Result<()> {
    atomic::ensure_writable_dir(folder)?;
    safetensors::write(&folder.join(file), records, metadata)?;
    json::write(&folder.join("config.json"), config)
}
