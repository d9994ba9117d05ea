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

/// Name, shape and values of a tensor to be saved. Values that are f32 already are borrowed: a large model is not held
/// twice while it is written.
pub(super) type Named<'m> = (String, Vec<usize>, Cow<'m, [f32]>);

/// Values of a tensor as f32.
pub(super) fn values(tensor: &Tensor) -> Result<Cow<'_, [f32]>> {
    Ok(match tensor.dtype() {
        DType::F32 => tensor.values()?,
        _ => Cow::Owned(tensor.to_vec()?),
    })
}

/// A tensor as equal parts along its first axis, with their names.
pub(super) fn split(parts: Vec<String>, tensor: &Tensor) -> Result<Vec<Named<'_>>> {
    let (mut shape, values) = (tensor.shape().dims().to_vec(), values(tensor)?);
    if let [only] = parts.as_slice() {
        return Ok(vec![(only.clone(), shape, values)]);
    }
    shape[0] /= parts.len().max(1);
    let chunk = (values.len() / parts.len().max(1)).max(1);
    let values: Vec<Cow<'_, [f32]>> = match values {
        Cow::Borrowed(all) => all.chunks(chunk).map(Cow::Borrowed).collect(),
        Cow::Owned(all) => all.chunks(chunk).map(|part| Cow::Owned(part.to_vec())).collect(),
    };
    Ok(parts.into_iter().zip(values).map(|(name, values)| (name, shape.clone(), values)).collect())
}

/// A tensor as it is written.
pub(super) fn record<'n>((name, shape, values): &'n Named<'_>, dtype: SaveAs) -> TensorRecord<'n> {
    if dtype == SaveAs::F32 {
        return TensorRecord::f32(name.clone(), shape, &values[..]);
    }
    let rounded: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
    let bytes = Cow::Owned(bytemuck::cast_slice(&rounded).to_vec());
    TensorRecord { name: name.clone(), dtype: FileDtype::Bf16, shape: shape.clone(), bytes }
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
