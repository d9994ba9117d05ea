//! Checkpoints of a training run: parameters, moments, moving average and position in one file, replaced atomically.
//!
//! A run may train several stores side by side (the sites of stage 1): they share one file, so that all of them are
//! always at the same step. Parameter names must then differ between the stores.

use super::optimizer::AdamW;
use crate::autograd::{ParamId, ParamStore};
use crate::error::{Error, Result};
use crate::io::atomic::{RunLock, ensure_writable_dir, remove_leftovers};
use crate::io::dtype::FileDtype;
use crate::io::jsonl::JsonLog;
use crate::io::safetensors::{self, TensorFile, TensorRecord, TensorView};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Checkpoint in the folder of a run.
pub const CHECKPOINT: &str = "checkpoint.safetensors";
/// Log in the folder of a run: one line for each update.
pub const LOSS_LOG: &str = "loss.jsonl";

const STEP: &str = "graft.step";
const FINGERPRINT: &str = "graft.run";

/// Writes the state of a run: stores with their optimisers, all at the same step. `fingerprint` describes what the
/// run is, so that another cannot resume from it.
///
/// # Errors
/// When the file cannot be written, a parameter is not finite, or the optimisers are at different steps: the last
/// checkpoint survives.
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
            let values = param.value.values()?;
            if let Some(value) = values.iter().find(|v| !v.is_finite()) {
                return Err(Error::failure(format!("{}: step {}", param.name, optimiser.step), "not finite")
                    .is(value)
                    .must("finite parameters")
                    .fix("lower the learning rate; the last checkpoint is good and stays"));
            }
            records.push(TensorRecord::f32(format!("param.{}", param.name), param.value.shape().dims(), values));
        }
        for slot in optimiser.slots() {
            let name = &store.get(slot.id).name;
            for (kind, tensor) in slot.states() {
                records.push(TensorRecord::f32(format!("{kind}.{name}"), tensor.shape().dims(), tensor.values()?));
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
            .fix("use another --run folder, or the plan, base model and settings this run was started with")
    };
    let found = file.metadata().get(FINGERPRINT);
    if found.map(String::as_str) != Some(fingerprint) {
        return Err(other_run(&differing(found, fingerprint), found, fingerprint));
    }
    let step = file.metadata().get(STEP).and_then(|s| s.parse().ok());
    let step = step.ok_or_else(|| other_run(STEP, file.metadata().get(STEP), "a number"))?;
    // Everything is checked before anything changes; then values go straight to their places, so that resuming takes
    // no more memory than the run itself.
    for (store, optimiser) in parts.iter() {
        for (_, param) in store.iter().filter(|(_, p)| p.trainable) {
            view(&file, &format!("param.{}", param.name), &param.value)?;
        }
        for slot in optimiser.slots() {
            for (kind, tensor) in slot.states() {
                view(&file, &format!("{kind}.{}", store.get(slot.id).name), tensor)?;
            }
        }
    }
    for (store, optimiser) in parts.iter_mut() {
        let trainable: Vec<ParamId> = store.iter().filter(|(_, p)| p.trainable).map(|(id, _)| id).collect();
        for id in trainable {
            let name = format!("param.{}", store.get(id).name);
            read(&file, &name, &mut store.get_mut(id).value)?;
        }
        for slot in optimiser.slots_mut() {
            let name = &store.get(slot.id).name;
            for (kind, tensor) in slot.states_mut() {
                read(&file, &format!("{kind}.{name}"), tensor)?;
            }
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

/// A tensor of the file that fits `like`.
fn view<'f>(file: &'f TensorFile, name: &str, like: &Tensor) -> Result<TensorView<'f>> {
    let place = || format!("{}: {name}", file.place());
    let view = file.get(name).ok_or_else(|| Error::failure(place(), "missing tensor").must("present"))?;
    if view.shape != like.shape().dims() || view.dtype != FileDtype::F32 {
        return Err(Error::failure(place(), "wrong shape or dtype")
            .is(format!("{} {:?}", view.dtype, view.shape))
            .must(format!("F32 {}", like.shape())));
    }
    Ok(view)
}

fn read(file: &TensorFile, name: &str, target: &mut Tensor) -> Result<()> {
    let view = view(file, name, target)?;
    if !target.is_unique() {
        *target = target.device().empty(view.shape)?;
    }
    let bytes = view.bytes.as_chunks::<4>().0;
    target.edit(|target| target.iter_mut().zip(bytes).for_each(|(value, b)| *value = f32::from_le_bytes(*b)))?;
    file.release();
    Ok(())
}

/// The folder of a run in training: held by this process, with its checkpoint.
#[derive(Debug)]
pub struct Home {
    /// The folder.
    pub folder: PathBuf,
    fingerprint: String,
    // Held for as long as the home lives: no second process writes the same folder.
    _lock: RunLock,
}

impl Home {
    /// Takes a folder, which is made if need be, and clears it of what a killed process left half-written.
    /// `fingerprint` tells runs apart.
    ///
    /// # Errors
    /// A folder that cannot be written or that another process uses.
    pub fn open(folder: &Path, fingerprint: String) -> Result<Home> {
        ensure_writable_dir(folder)?;
        let lock = RunLock::acquire(folder)?;
        remove_leftovers(folder)?;
        Ok(Home { folder: folder.to_path_buf(), fingerprint, _lock: lock })
    }

    /// As [`restore`].
    ///
    /// # Errors
    /// As [`restore`].
    pub fn restore(&self, parts: &mut [(&mut ParamStore, &mut AdamW)]) -> Result<bool> {
        restore(&self.folder.join(CHECKPOINT), parts, &self.fingerprint)
    }

    /// As [`save`].
    ///
    /// # Errors
    /// As [`save`].
    pub fn save<'a>(&self, parts: impl IntoIterator<Item = (&'a ParamStore, &'a AdamW)>) -> Result<()> {
        save(&self.folder.join(CHECKPOINT), parts, &self.fingerprint)
    }

    /// The log of losses, cut back to a step.
    ///
    /// # Errors
    /// A damaged log, or one that cannot be written.
    pub fn loss_log(&self, step: u64) -> Result<JsonLog> {
        JsonLog::resume(&self.folder.join(LOSS_LOG), step)
    }
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

    #[test]
    fn values_that_are_not_finite_never_replace_a_checkpoint() {
        let path = test_dir("checkpoint_nan").join("c.safetensors");
        let mut a = part("a", 1);
        save(&path, [(&a.0, &a.1)], "run").unwrap();
        let good = crate::io::files::read_bytes(&path).unwrap();
        let id = a.0.find("a").unwrap();
        a.0.get_mut(id).value.f32s_mut().unwrap()[1] = f32::INFINITY;
        a.1.step = 4;
        let error = save(&path, [(&a.0, &a.1)], "run").unwrap_err().to_string();
        assert!(error.starts_with("a: step 4: not finite; is inf"), "{error}");
        assert_eq!(crate::io::files::read_bytes(&path).unwrap(), good);
    }
}
