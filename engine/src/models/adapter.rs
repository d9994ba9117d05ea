//! Saving adapters in the layout of PEFT, for other programs: `adapter_config.json`, `adapter_model.safetensors`.

use super::sites::SiteModel;
use crate::error::{Error, Result};
use crate::io::safetensors::{self, TensorRecord};
use crate::io::{atomic, json};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

/// Writes the adapters of a model, in the names of its diffusers folder: an adapter of our packed q, k and v becomes one
/// for each, which share A and take a third of B. `whole` names sites (`blocks.3.attn`) that were trained in full: their
/// parameters go along as PEFT's `modules_to_save`.
///
/// # Errors
/// A model without adapters or with adapters of different sizes, or a folder that cannot be written.
pub fn save_adapter<M: SiteModel>(model: &M, folder: &Path, whole: &[String]) -> Result<()> {
    atomic::ensure_writable_dir(folder)?;
    let params = model.params();
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    let (mut targets, mut sizes) = (Vec::new(), Vec::new());
    for (weight, adapter) in params.adapters() {
        let [a, b] = [adapter.a, adapter.b].map(|id| &params.get(id).value);
        let (rank, outputs) = (a.dim(0), b.dim(0));
        let (a_values, b_values) = (a.to_vec()?, b.to_vec()?);
        let parts = M::diffusers_parts(&params.get(weight).name);
        let rows = outputs / parts.len().max(1);
        for (part, b_values) in parts.iter().zip(b_values.chunks((rows * rank).max(1))) {
            let module = part.strip_suffix(".weight").unwrap_or(part);
            let name = |matrix: &str| format!("base_model.model.{module}.lora_{matrix}.weight");
            tensors.push((name("A"), a.shape().dims().to_vec(), a_values.clone()));
            tensors.push((name("B"), vec![rows, rank], b_values.to_vec()));
            targets.push(module.to_string());
        }
        sizes.push((rank, adapter.scale));
    }
    let Some((rank, scale)) = sizes.first().copied().filter(|first| sizes.iter().all(|size| size == first)) else {
        return Err(Error::failure(folder.display().to_string(), "cannot save adapters")
            .is(format!("{} sizes", sizes.len()))
            .must("one rank and scale for all"));
    };
    for (_, param) in params.iter() {
        let site = |name: &&String| param.name.strip_prefix(name.as_str()).is_some_and(|rest| rest.starts_with('.'));
        let parts = if whole.iter().any(|name| site(&name)) { M::diffusers_parts(&param.name) } else { Vec::new() };
        let (values, mut shape) = (param.value.to_vec()?, param.value.shape().dims().to_vec());
        shape[0] /= parts.len().max(1);
        let chunk = values.len() / parts.len().max(1);
        for (part, values) in parts.iter().zip(values.chunks(chunk.max(1))) {
            tensors.push((format!("base_model.model.{part}"), shape.clone(), values.to_vec()));
        }
    }
    let modules = whole.iter().flat_map(|site| M::diffusers_parts(&format!("{site}.module")));
    let modules: Vec<String> = modules.map(|name| name.trim_end_matches(".module").to_string()).collect();
    let records = tensors.iter().map(|(name, shape, values)| TensorRecord::f32(name.clone(), shape, values));
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::write(&folder.join("adapter_model.safetensors"), records, &metadata)?;
    targets.sort_unstable();
    json::write(
        &folder.join("adapter_config.json"),
        &json!({
            "alpha_pattern": {},
            "base_model_name_or_path": null,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": scale * rank as f32,
            "lora_dropout": 0.0,
            "modules_to_save": if modules.is_empty() { None } else { Some(modules) },
            "peft_type": "LORA",
            "r": rank,
            "rank_pattern": {},
            "target_modules": targets,
            "task_type": null,
            "use_dora": false,
            "use_rslora": false,
        }),
    )
}
