//! Arguments that several commands share: a model, its arithmetic and details, and how labels are named.

use super::Dtype;
use crate::autograd::Precision;
use crate::backend::{self, Device};
use crate::error::{Error, Result};
use crate::io::{files, hash, json, safetensors::TensorFile};
use crate::models::dit::{self, Dit, Semantics};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Metadata key under which a model carries the names of its classes, as a JSON list.
pub const CLASS_NAMES_KEY: &str = "graft.class_names";

/// A model and how to run it.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Model folder (diffusers layout, or with an original .pt), or a checkpoint file.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    #[command(flatten)]
    pub run: RunArgs,
}

/// How to run a model.
#[derive(Clone, clap::Args)]
pub struct RunArgs {
    /// What runs the operators: cpu, oracle, emu or cuda.
    #[arg(long, default_value = "cpu", value_name = "NAME")]
    backend: String,
    /// Arithmetic of the products; bf16 also halves the memory of the weights. A GPU computes in it throughout.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    pub dtype: Dtype,
    /// Details in which implementations differ: those of training, or diffusers'.
    #[arg(long, value_enum, default_value_t = SemanticsArg::Original)]
    semantics: SemanticsArg,
}

/// Implementation whose details are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum SemanticsArg {
    /// As the model was trained.
    Original,
    /// As diffusers runs it.
    Diffusers,
}

impl RunArgs {
    /// On a backend, with the details of training.
    pub fn new(backend: &str, dtype: Dtype) -> RunArgs {
        RunArgs { backend: backend.into(), dtype, semantics: SemanticsArg::Original }
    }

    /// The device that runs the operators; a GPU computes in the type of `--dtype`.
    ///
    /// # Errors
    /// A backend that this machine cannot run.
    pub fn device(&self) -> Result<Device> {
        backend::open_as(&self.backend, Precision::from(self.dtype).into())
    }

    /// Whether diffusers' details are asked for.
    pub fn as_diffusers(&self) -> bool {
        self.semantics == SemanticsArg::Diffusers
    }

    /// Name of the details, for records.
    pub fn semantics_name(&self) -> &'static str {
        if self.as_diffusers() { "diffusers" } else { "original" }
    }

    /// Name of the arithmetic, for records.
    pub fn dtype_name(&self) -> &'static str {
        if self.dtype == Dtype::Bf16 { "bf16" } else { "f32" }
    }
}

impl ModelArgs {
    /// Loads the model.
    ///
    /// # Errors
    /// Those of the loader, and a backend that this machine cannot run.
    pub fn load(&self) -> Result<Dit> {
        let device = self.run.device()?;
        let mut model = dit::load(&self.model, &device)?;
        if self.run.dtype == Dtype::Bf16 {
            dit::to_bf16(&mut model)?;
            device.trim();
        }
        Ok(model)
    }

    /// Details to run with.
    pub fn semantics(&self, model: &Dit) -> Semantics {
        match self.run.as_diffusers() {
            false => Semantics::ORIGINAL,
            true => Semantics::diffusers(model.config.norm_eps),
        }
    }
}

/// Channels that guidance applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channels {
    /// Every noise channel.
    All,
    /// This many, from the first.
    First(usize),
}

impl std::str::FromStr for Channels {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "all" => Ok(Channels::All),
            _ => text.parse().map(Channels::First).map_err(|_| "must be a number of channels, or all".to_string()),
        }
    }
}

impl Channels {
    /// The number for a model with `channels` noise channels.
    pub fn count(self, channels: usize) -> usize {
        match self {
            Channels::All => channels,
            Channels::First(n) => n,
        }
    }
}

/// Names of a model's classes, from its metadata or the `id2label` table of its folder; empty where there are none.
///
/// # Errors
/// When a file that has them cannot be read.
pub fn class_names(model: &Path, classes: usize) -> Result<Vec<String>> {
    for file in dit::weight_files(model)?.iter().filter(|f| f.extension().is_some_and(|e| e == "safetensors")) {
        if let Some(text) = TensorFile::open(file)?.metadata().get(CLASS_NAMES_KEY) {
            let names: Vec<String> = serde_json::from_str(text).unwrap_or_default();
            if names.len() == classes {
                return Ok(names);
            }
        }
    }
    let above = model.parent().map(|p| p.join("model_index.json"));
    for path in [Some(model.join("model_index.json")), Some(model.join("config.json")), above].into_iter().flatten() {
        if !path.is_file() {
            continue;
        }
        let value = json::read(&path)?;
        let table = value.get("id2label").and_then(Value::as_object);
        let name = |i: usize| table.and_then(|t| t.get(&i.to_string())).and_then(Value::as_str).map(str::to_string);
        if let Some(names) = (0..classes).map(name).collect::<Option<Vec<_>>>() {
            return Ok(names);
        }
    }
    Ok(Vec::new())
}

/// Parses `0,2,ankle boot` against the classes of a model.
///
/// # Errors
/// A usage error for a number out of range or a name that no class has.
pub fn parse_labels(text: &str, names: &[String], classes: usize) -> Result<Vec<i32>> {
    let one = |word: &str| -> Result<i32> {
        let word = word.trim();
        if let Ok(number) = word.parse::<i64>() {
            return match usize::try_from(number) {
                Ok(n) if n < classes => Ok(n as i32),
                _ => Err(Error::usage("--class-labels", "class out of range")
                    .is(number)
                    .must(format!("0 to {}", classes.saturating_sub(1)))),
            };
        }
        // diffusers' tables list synonyms, separated by commas.
        let matches = |name: &String| {
            name.eq_ignore_ascii_case(word) || name.split(',').any(|part| part.trim().eq_ignore_ascii_case(word))
        };
        names.iter().position(matches).map(|i| i as i32).ok_or_else(|| {
            let shown: Vec<&str> = names.iter().take(20).map(String::as_str).collect();
            let must = match shown.is_empty() {
                true => {
                    format!("a number from 0 to {}: this model does not name its classes", classes.saturating_sub(1))
                }
                false => format!("a number, or one of {}", shown.join(", ")),
            };
            Error::usage("--class-labels", "unknown class").is(format!("{word:?}")).must(must)
        })
    };
    text.split(',').map(one).collect()
}

/// SHA-256 of a model's weights: of the file, or of the digests of its shards in order.
///
/// # Errors
/// When a file cannot be read.
pub fn weights_digest(model: &Path) -> Result<String> {
    let digests: Vec<String> = dit::weight_files(model)?.iter().map(|f| hash::sha256_file(f)).collect::<Result<_>>()?;
    Ok(match digests.as_slice() {
        [only] => only.clone(),
        many => hash::sha256(many.concat().as_bytes()),
    })
}

/// The last part of a path, for captions and records.
pub fn short_name(path: &Path) -> String {
    files::file_name(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_by_number_name_and_synonym() {
        let names: Vec<String> = ["bag", "ankle boot, bootie"].map(String::from).into();
        assert_eq!(parse_labels("1, 0", &names, 2).unwrap(), [1, 0]);
        assert_eq!(parse_labels("Bag,bootie", &names, 2).unwrap(), [0, 1]);
        let message = |text: &str| parse_labels(text, &names, 2).unwrap_err().to_string();
        assert!(message("2").contains("class out of range; is 2; must be 0 to 1"));
        assert!(message("-1").contains("class out of range"));
        assert!(message("hat").contains("unknown class; is \"hat\""));
        assert!(message("").contains("unknown class"));
    }
}
