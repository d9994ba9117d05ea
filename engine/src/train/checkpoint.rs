//! Checkpoints of a training run: parameters, moments, moving average and position in one file, replaced atomically.

use super::optimizer::AdamW;
use crate::autograd::ParamStore;
use crate::error::{Error, Result};
use crate::io::safetensors::{self, TensorFile, TensorRecord};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::path::Path;

const STEP: &str = "graft.step";
const FINGERPRINT: &str = "graft.run";

/// Writes the state of a run. `fingerprint` describes what the run is, so that another cannot resume from it.
///
/// # Errors
/// When the file cannot be written; the last checkpoint survives then.
pub fn save(path: &Path, store: &ParamStore, optimiser: &AdamW, fingerprint: &str) -> Result<()> {
    let mut records = Vec::new();
    for (_, param) in store.iter().filter(|(_, p)| p.trainable) {
        records.push(TensorRecord::f32(format!("param.{}", param.name), param.value.shape().dims(), param.value.f32s()?));
    }
    for slot in optimiser.slots() {
        let name = &store.get(slot.id).name;
        for (kind, tensor) in [("m", Some(&slot.m)), ("v", Some(&slot.v)), ("ema", slot.ema.as_ref())] {
            if let Some(tensor) = tensor {
                records.push(TensorRecord::f32(format!("{kind}.{name}"), tensor.shape().dims(), tensor.f32s()?));
            }
        }
    }
    let metadata = BTreeMap::from([(STEP.to_string(), optimiser.step.to_string()), (FINGERPRINT.to_string(), fingerprint.to_string())]);
    safetensors::write(path, records, &metadata)
}

/// Restores the state of a run; returns false where there is no checkpoint yet.
///
/// # Errors
/// A checkpoint of another run, or one that does not fit the model: nothing is changed then.
pub fn restore(path: &Path, store: &mut ParamStore, optimiser: &mut AdamW, fingerprint: &str) -> Result<bool> {
    if !path.exists() {
        return Ok(false);
    }
    let file = TensorFile::open(path)?;
    let place = path.display().to_string();
    let other_run = |field: &str, is: Option<&String>, must: &str| {
        Error::failure(&place, format!("checkpoint of another run ({field})"))
            .is(is.map_or("absent", String::as_str))
            .must(must)
            .fix("use another --run folder, or the configuration this run was started with")
    };
    if file.metadata().get(FINGERPRINT).map(String::as_str) != Some(fingerprint) {
        return Err(other_run(FINGERPRINT, file.metadata().get(FINGERPRINT), fingerprint));
    }
    let step = file.metadata().get(STEP).and_then(|s| s.parse().ok());
    let step = step.ok_or_else(|| other_run(STEP, file.metadata().get(STEP), "a number"))?;
    let read = |name: String, like: &Tensor| -> Result<Tensor> {
        let view = file.get(&name).ok_or_else(|| Error::failure(format!("{place}: {name}"), "missing tensor").must("present"))?;
        if view.shape != like.shape().dims() {
            return Err(Error::failure(format!("{place}: {name}"), "wrong shape").is(format!("{:?}", view.shape)).must(like.shape()));
        }
        Tensor::from_f32(like.device(), like.shape().dims(), &view.to_f32()?)
    };
    // Read everything before changing anything.
    let mut params = Vec::new();
    for (id, param) in store.iter().filter(|(_, p)| p.trainable) {
        params.push((id, read(format!("param.{}", param.name), &param.value)?));
    }
    let mut states = Vec::new();
    for slot in optimiser.slots() {
        let name = &store.get(slot.id).name;
        let ema = slot.ema.as_ref().map(|e| read(format!("ema.{name}"), e)).transpose()?;
        states.push((read(format!("m.{name}"), &slot.m)?, read(format!("v.{name}"), &slot.v)?, ema));
    }
    for (id, value) in params {
        store.set(id, value)?;
    }
    for (slot, (m, v, ema)) in optimiser.slots_mut().iter_mut().zip(states) {
        (slot.m, slot.v, slot.ema) = (m, v, ema);
    }
    optimiser.step = step;
    Ok(true)
}
