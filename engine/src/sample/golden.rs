//! Reader of the golden cases, for tests only.

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::path::PathBuf;

/// One folder of `tests/golden`.
pub struct Case {
    folder: PathBuf,
}

impl Case {
    /// `path` is `family/case`.
    pub fn open(path: &str) -> Self {
        Case { folder: PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden")).join(path) }
    }

    pub fn text(&self, file: &str) -> String {
        std::fs::read_to_string(self.folder.join(file)).unwrap()
    }

    pub fn json(&self, file: &str) -> Value {
        serde_json::from_str(&self.text(file)).unwrap()
    }

    /// A tensor's values; f32 and int64 files alike come back as f64, which holds both exactly here.
    pub fn tensor(&self, file: &str, name: &str) -> Vec<f64> {
        let bytes = std::fs::read(self.folder.join(format!("{file}.safetensors"))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let view = tensors.tensor(name).unwrap();
        match view.dtype() {
            Dtype::F32 => {
                view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect()
            }
            Dtype::I64 => {
                view.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect()
            }
            other => panic!("{name}: unexpected dtype {other:?}"),
        }
    }

    pub fn input(&self, name: &str) -> Vec<f64> {
        self.tensor("inputs", name)
    }

    pub fn input_f32(&self, name: &str) -> Vec<f32> {
        self.input(name).into_iter().map(|x| x as f32).collect()
    }

    pub fn expected(&self, name: &str) -> Vec<f64> {
        self.tensor("expected", name)
    }

    /// `(max_abs, rel_l2)` of an entry of the case's tolerances.
    pub fn tolerance(&self, entry: &str) -> (f64, f64) {
        let t = &self.json("case.json")["tolerance"][entry];
        (t["max_abs"].as_f64().unwrap(), t["rel_l2"].as_f64().unwrap())
    }
}

/// A JSON array of numbers.
pub fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// Checks both the largest difference and the relative L2 distance.
#[track_caller]
pub fn assert_close(name: &str, got: &[f64], want: &[f64], (max_abs, rel_l2): (f64, f64)) {
    assert_eq!(got.len(), want.len(), "{name}: length");
    let largest =
        got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, |m: f64, d| if d > m || d.is_nan() { d } else { m });
    let distance: f64 = got.iter().zip(want).map(|(g, w)| (g - w) * (g - w)).sum();
    let norm: f64 = want.iter().map(|w| w * w).sum();
    let relative = (distance / norm).sqrt();
    assert!(largest <= max_abs, "{name}: max abs {largest:e} > {max_abs:e}");
    assert!(relative <= rel_l2, "{name}: rel l2 {relative:e} > {rel_l2:e}");
}
