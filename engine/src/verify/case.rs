//! Reading a case: its `case.json`, its tensors and its scalars.

use crate::error::{Error, Result};
use crate::io::dtype::FileDtype;
use crate::io::json;
use crate::io::safetensors::{TensorFile, TensorView};
use crate::tensor::{Device, Tensor};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A recorded case.
pub struct Case {
    /// Its folder.
    pub folder: PathBuf,
    /// What it tests.
    pub family: String,
    /// Name in the family.
    pub name: String,
    /// Sizes and settings.
    pub config: Value,
    /// Tolerances by `<tensor> (<dtype>)`.
    pub tolerance: Value,
    /// What computes the models of the case.
    pub device: Device,
    inputs: Option<TensorFile>,
    expected: Option<TensorFile>,
}

/// Values of a recorded tensor, exact in f64 except for integers beyond 2⁵³.
pub struct Values {
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Row-major.
    pub data: Vec<f64>,
    /// Whether they are integers, which must be met exactly.
    pub integer: bool,
    /// Relative rounding of the type they are stored in.
    pub rounding: f64,
}

impl Case {
    /// Reads the case in `folder`, whose models `device` computes.
    ///
    /// # Errors
    /// When a file is damaged, or the family is not stated.
    pub fn open(folder: &Path, device: &Device) -> Result<Case> {
        let path = folder.join("case.json");
        let value = json::read(&path)?;
        let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_string);
        let family = text("family").ok_or_else(|| {
            Error::failure(format!("{}: family", path.display()), "missing field").must("the name of a family")
        })?;
        let folder_name = folder.file_name().map(|n| n.to_string_lossy().into_owned());
        let part = |key: &str| value.get(key).cloned().unwrap_or(Value::Null);
        let tensors = |file: &str| {
            let path = folder.join(file);
            path.exists().then(|| TensorFile::open(&path)).transpose()
        };
        Ok(Case {
            folder: folder.to_path_buf(),
            family,
            name: text("case").or(folder_name).unwrap_or_default(),
            config: part("config"),
            tolerance: part("tolerance"),
            device: device.clone(),
            inputs: tensors("inputs.safetensors")?,
            expected: tensors("expected.safetensors")?,
        })
    }

    fn place(&self, key: &str) -> String {
        format!("{}: {key}", self.folder.join("case.json").display())
    }

    /// A number of the configuration.
    ///
    /// # Errors
    /// When it is missing or not a number.
    pub fn number(&self, key: &str) -> Result<f64> {
        let value = self.config.get(key);
        value.and_then(json::number).ok_or_else(|| {
            let is = value.map_or("missing".to_string(), Value::to_string);
            Error::failure(self.place(&format!("config.{key}")), "not a number").is(is).must("a number")
        })
    }

    /// A non-negative whole number of the configuration.
    ///
    /// # Errors
    /// As [`Case::number`].
    pub fn whole(&self, key: &str) -> Result<usize> {
        let value = self.number(key)?;
        if value >= 0.0 && value.fract() == 0.0 && value < 1e9 {
            return Ok(value as usize);
        }
        Err(Error::failure(self.place(&format!("config.{key}")), "not a whole number")
            .is(value)
            .must("a non-negative integer"))
    }

    /// A text of the configuration.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.config.get(key).and_then(Value::as_str)
    }

    /// A JSON file of the case.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub fn json(&self, file: &str) -> Result<Value> {
        json::read(&self.folder.join(file))
    }

    /// The folder or files of the model.
    pub fn model(&self) -> PathBuf {
        self.folder.join("model")
    }

    /// Names of the expected tensors.
    pub fn expected_names(&self) -> impl Iterator<Item = &str> {
        self.expected.iter().flat_map(TensorFile::names)
    }

    /// An expected tensor.
    ///
    /// # Errors
    /// When it is there but cannot be read.
    pub fn expected(&self, name: &str) -> Result<Option<Values>> {
        self.expected.as_ref().and_then(|file| file.get(name)).map(|view| values(&view)).transpose()
    }

    /// Whether an input is there.
    pub fn has_input(&self, name: &str) -> bool {
        self.inputs.as_ref().is_some_and(|file| file.get(name).is_some())
    }

    /// An input.
    ///
    /// # Errors
    /// When it is missing or cannot be read.
    pub fn input(&self, name: &str) -> Result<Values> {
        let path = self.folder.join("inputs.safetensors");
        let missing = || Error::failure(format!("{}: {name}", path.display()), "missing tensor").must("present");
        values(&self.inputs.as_ref().and_then(|file| file.get(name)).ok_or_else(missing)?)
    }

    /// A floating-point input as a tensor.
    ///
    /// # Errors
    /// As [`Case::input`].
    pub fn input_f32(&self, device: &Device, name: &str) -> Result<Tensor> {
        self.input(name)?.to_f32(device)
    }

    /// An integer input as a tensor.
    ///
    /// # Errors
    /// As [`Case::input`].
    pub fn input_i32(&self, device: &Device, name: &str) -> Result<Tensor> {
        let values = self.input(name)?;
        let data: Vec<i32> = values.data.iter().map(|&v| v as i32).collect();
        Tensor::from_i32(device, &values.shape, &data)
    }
}

impl Values {
    /// As an f32 tensor.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn to_f32(&self, device: &Device) -> Result<Tensor> {
        Tensor::from_f32(device, &self.shape, &self.f32s())
    }

    /// Rounded to f32.
    pub fn f32s(&self) -> Vec<f32> {
        self.data.iter().map(|&v| v as f32).collect()
    }
}

/// Reads a tensor of any numeric type.
fn values(view: &TensorView<'_>) -> Result<Values> {
    let data = match view.dtype {
        FileDtype::F64 => view.bytes.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b)).collect(),
        dtype if dtype.is_weight() => view.to_f32()?.into_iter().map(f64::from).collect(),
        _ => view.to_i64()?.into_iter().map(|v| v as f64).collect(),
    };
    let rounding = match view.dtype {
        FileDtype::F32 => f64::from(f32::EPSILON) / 2.0,
        FileDtype::F16 => 2f64.powi(-11),
        FileDtype::Bf16 => 2f64.powi(-8),
        _ => 0.0,
    };
    Ok(Values { shape: view.shape.to_vec(), data, integer: !view.dtype.is_weight(), rounding })
}
