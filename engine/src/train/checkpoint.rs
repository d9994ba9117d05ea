//! Checkpoints of a training run: parameters, moments, moving average and position in one file, replaced atomically.
//!
//! A run may train several stores side by side (the sites of stage 1): they share one file, so that all of them are
//! always at the same step. Parameter names must then differ between the stores.

use super::optimizer::AdamW;
use crate::autograd::{ParamId, ParamStore};
use crate::error::{Error, Result};
use crate::io::safetensors::{self, TensorFile, TensorRecord};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::path::Path;

const STEP: &str = "graft.step";
const FINGERPRINT: &str = "graft.run";

/// Writes the state of a run: stores with their optimisers, all at the same step. `fingerprint` describes what the
/// run is, so that another cannot resume from it.
///
/// # Errors
/// When the file cannot be written (the last checkpoint survives then), or the optimisers are at different steps.
pub fn save<'a>(
    path: &Path,
    parts: impl IntoIterator<Item = (&'a ParamStore, &'a AdamW)>,
    fingerprint: &str,
) -> Result<()> {
    let mut records = Vec::new();
    let mut step = None;
    for (store, optimiser) in parts {
        if *step.get_or_insert(optimiser.step) != optimiser.step {
            return Err(Error::failure(path.display().to_string(), "stores at different steps")
                .is(optimiser.step)
                .must("one step for all"));
        }
        for (_, param) in store.iter().filter(|(_, p)| p.trainable) {
            records.push(TensorRecord::f32(
                format!("param.{}", param.name),
                param.value.shape().dims(),
                param.value.f32s()?,
            ));
        }
        for slot in optimiser.slots() {
            let name = &store.get(slot.id).name;
            for (kind, tensor) in [("m", Some(&slot.m)), ("v", Some(&slot.v)), ("ema", slot.ema.as_ref())] {
                if let Some(tensor) = tensor {
                    records.push(TensorRecord::f32(format!("{kind}.{name}"), tensor.shape().dims(), tensor.f32s()?));
                }
            }
        }
    }
    let step = step.unwrap_or(0).to_string();
    let metadata = BTreeMap::from([(STEP.to_string(), step), (FINGERPRINT.to_string(), fingerprint.to_string())]);
    safetensors::write(path, records, &metadata)
}

/// Restores the state of a run; returns false where there is no checkpoint yet.
///
/// # Errors
/// A checkpoint of another run, or one that does not fit the stores: nothing is changed then.
pub fn restore(path: &Path, parts: &mut [(&mut ParamStore, &mut AdamW)], fingerprint: &str) -> Result<bool> {
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
    let found = file.metadata().get(FINGERPRINT);
    if found.map(String::as_str) != Some(fingerprint) {
        return Err(other_run(&differing(found, fingerprint), found, fingerprint));
    }
    let step = file.metadata().get(STEP).and_then(|s| s.parse().ok());
    let step = step.ok_or_else(|| other_run(STEP, file.metadata().get(STEP), "a number"))?;
    // Read everything before changing anything.
    let saved: Vec<Saved> =
        parts.iter().map(|(store, optimiser)| read(&file, store, optimiser)).collect::<Result<_>>()?;
    for ((store, optimiser), saved) in parts.iter_mut().zip(saved) {
        for (id, value) in saved.params {
            store.set(id, value)?;
        }
        for (slot, (m, v, ema)) in optimiser.slots_mut().iter_mut().zip(saved.slots) {
            (slot.m, slot.v, slot.ema) = (m, v, ema);
        }
        optimiser.step = step;
    }
    Ok(true)
}

/// The parts `name=value` in which two fingerprints differ.
fn differing(found: Option<&String>, wanted: &str) -> String {
    let parts = found.map(String::as_str).unwrap_or_default().split(' ').zip(wanted.split(' '));
    let names = parts.filter(|(a, b)| a != b).filter_map(|(_, b)| b.split_once('=')).map(|(name, _)| name);
    let names = names.collect::<Vec<_>>().join(" and ");
    if names.is_empty() { FINGERPRINT.to_string() } else { format!("another {names}") }
}

/// State of one store as a file holds it.
struct Saved {
    params: Vec<(ParamId, Tensor)>,
    slots: Vec<(Tensor, Tensor, Option<Tensor>)>,
}

fn read(file: &TensorFile, store: &ParamStore, optimiser: &AdamW) -> Result<Saved> {
    let place = file.place();
    let read = |name: String, like: &Tensor| -> Result<Tensor> {
        let view = file
            .get(&name)
            .ok_or_else(|| Error::failure(format!("{place}: {name}"), "missing tensor").must("present"))?;
        if view.shape != like.shape().dims() {
            return Err(Error::failure(format!("{place}: {name}"), "wrong shape")
                .is(format!("{:?}", view.shape))
                .must(like.shape()));
        }
        Tensor::from_f32(like.device(), like.shape().dims(), &view.to_f32()?)
    };
    let trainable = store.iter().filter(|(_, p)| p.trainable);
    let params = trainable.map(|(id, param)| Ok((id, read(format!("param.{}", param.name), &param.value)?)));
    let slots = optimiser.slots().iter().map(|slot| {
        let name = &store.get(slot.id).name;
        let ema = slot.ema.as_ref().map(|e| read(format!("ema.{name}"), e)).transpose()?;
        Ok((read(format!("m.{name}"), &slot.m)?, read(format!("v.{name}"), &slot.v)?, ema))
    });
    Ok(Saved { params: params.collect::<Result<_>>()?, slots: slots.collect::<Result<_>>()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;
    use crate::nn::{Builder, Init, Scheme};
    use crate::tensor::Device;
    use crate::train::optimizer::AdamWSettings;

    fn part(name: &str, seed: u64) -> (ParamStore, AdamW) {
        let mut store = ParamStore::default();
        Builder::new(&mut store, &Device::cpu(), seed, Scheme::Torch).param(name, &[3], Init::Normal(1.0)).unwrap();
        let optimiser = AdamW::new(AdamWSettings::default(), &store).unwrap();
        (store, optimiser)
    }

    fn values(part: &(ParamStore, AdamW)) -> Vec<f32> {
        part.0.iter().flat_map(|(_, p)| p.value.to_vec().unwrap()).collect()
    }

    #[test]
    fn several_stores_share_a_file() {
        let path = test_dir("checkpoint").join("c.safetensors");
        let (mut a, mut b) = (part("a", 1), part("b", 2));
        (a.1.step, b.1.step) = (7, 7);
        save(&path, [(&a.0, &a.1), (&b.0, &b.1)], "run").unwrap();
        let (mut a2, mut b2) = (part("a", 3), part("b", 4));
        assert_ne!(values(&a), values(&a2));
        let mut parts = [(&mut a2.0, &mut a2.1), (&mut b2.0, &mut b2.1)];
        assert!(restore(&path, &mut parts, "run").unwrap());
        assert_eq!((values(&a), values(&b), a2.1.step, b2.1.step), (values(&a2), values(&b2), 7, 7));
        b.1.step = 8;
        assert!(save(&path, [(&a.0, &a.1), (&b.0, &b.1)], "run").is_err());
    }

    #[test]
    fn nothing_changes_where_one_store_does_not_fit() {
        let path = test_dir("checkpoint_misfit").join("c.safetensors");
        let (mut a, mut c) = (part("a", 3), part("c", 4));
        assert!(!restore(&path, &mut [(&mut a.0, &mut a.1)], "run").unwrap());
        let saved = part("a", 1);
        save(&path, [(&saved.0, &saved.1)], "run").unwrap();
        let before = values(&a);
        let error = restore(&path, &mut [(&mut a.0, &mut a.1), (&mut c.0, &mut c.1)], "run").unwrap_err();
        assert!(error.to_string().contains("param.c: missing tensor"), "{error}");
        assert_eq!(values(&a), before);
        let error = restore(&path, &mut [(&mut a.0, &mut a.1)], "other").unwrap_err();
        assert_eq!(error.problem(), "checkpoint of another run (graft.run)");
        save(&path, [(&saved.0, &saved.1)], "plan=1 base=2").unwrap();
        let problem = |run: &str, a: &mut (ParamStore, AdamW)| {
            restore(&path, &mut [(&mut a.0, &mut a.1)], run).unwrap_err().problem().to_string()
        };
        assert_eq!(problem("plan=1 base=3", &mut a), "checkpoint of another run (another base)");
        assert_eq!(problem("plan=0 base=3", &mut a), "checkpoint of another run (another plan and base)");
        assert_eq!(values(&a), before);
    }
}
