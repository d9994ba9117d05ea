//! The file that `graft pretrain` reads.

use super::optimizer::AdamWSettings;
use crate::error::{Error, Result};
use crate::io::captioned::{self, CaptionedSet};
use crate::io::datasets::{self, ImageSet, Split};
use crate::models::dit::DitConfig;
use crate::models::pixart::PixArtConfig;
use crate::models::t5::T5Config;
use crate::sample::solver::Prediction;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A pretraining run: data, model, optimiser.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PretrainConfig {
    /// Folder of a model whose weights the run starts from; new weights where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// Data set.
    pub data: DataConfig,
    /// Model.
    pub model: ModelConfig,
    /// The text encoder that trains with the model, which is then a PixArt; a DiT where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<TextConfig>,
    /// Loop.
    pub train: TrainConfig,
    /// Optimiser.
    #[serde(default)]
    pub optimizer: AdamWSettings,
}

/// Which images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// `fashion-mnist`, `mnist` or `cifar10`; for models that read text `emoji`, or `pairs` to graft them.
    pub kind: String,
    /// Folder that holds it; `graft data` or `make data` fills `data-cache/<kind>`.
    pub dir: String,
}

impl DataConfig {
    /// Reads a split of the data set.
    ///
    /// # Errors
    /// An unknown kind, or a file that is missing or damaged.
    pub fn load(&self, split: Split) -> Result<ImageSet> {
        let dir = Path::new(&self.dir);
        match self.kind.as_str() {
            "fashion-mnist" => datasets::fashion_mnist(dir, split),
            "mnist" => datasets::mnist(dir, split),
            "cifar10" => datasets::cifar10(dir, split),
            other => {
                Err(Error::usage("data: kind", "unknown data set").is(other).must("fashion-mnist, mnist or cifar10"))
            }
        }
    }

    /// Reads a split of a data set with captions.
    ///
    /// # Errors
    /// As [`DataConfig::load`].
    pub fn load_captioned(&self, split: Split) -> Result<CaptionedSet> {
        match self.kind.as_str() {
            "emoji" => captioned::emoji(Path::new(&self.dir), split),
            other => Err(Error::usage("data: kind", "no data set with captions").is(other).must("emoji")),
        }
    }
}

/// Sizes of the model; patch and channels follow the data where not given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Blocks.
    pub depth: usize,
    /// Width D.
    pub width: usize,
    /// Heads H.
    pub heads: usize,
    /// Patch side P.
    pub patch: usize,
    /// MLP width over D.
    #[serde(default = "four")]
    pub mlp_ratio: f64,
    /// Predict variance values as well.
    #[serde(default = "yes")]
    pub learn_sigma: bool,
}

/// Sizes of a text encoder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextConfig {
    /// Blocks.
    pub depth: usize,
    /// Width D.
    pub width: usize,
    /// Heads H, which divide the width.
    pub heads: usize,
    /// Hidden width of the MLP F.
    pub hidden: usize,
    /// Most tokens of a caption.
    pub max_tokens: usize,
    /// What the model predicts: `noise` as PixArt does, or `velocity`.
    #[serde(default)]
    pub prediction: Prediction,
}

/// The loop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Updates in all.
    pub steps: u64,
    /// Images per update.
    pub batch: usize,
    /// Seed of everything.
    #[serde(default)]
    pub seed: u64,
    /// Probability that a label or caption is replaced by the null label or the empty text.
    #[serde(default = "tenth")]
    pub label_dropout: f64,
    /// `f32` or `bf16` products.
    #[serde(default)]
    pub dtype: Dtype,
    /// Updates between checkpoints.
    #[serde(default = "five_hundred")]
    pub checkpoint_every: u64,
    /// Recompute blocks in the backward pass to save memory.
    #[serde(default)]
    pub activation_checkpointing: bool,
}

/// Arithmetic of products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// f32.
    #[default]
    F32,
    /// bf16 products with f32 accumulation.
    Bf16,
}

impl From<Dtype> for crate::autograd::Precision {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => crate::autograd::Precision::F32,
            Dtype::Bf16 => crate::autograd::Precision::Bf16,
        }
    }
}

fn four() -> f64 {
    4.0
}
fn yes() -> bool {
    true
}
fn tenth() -> f64 {
    0.1
}
fn five_hundred() -> u64 {
    500
}

impl PretrainConfig {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// The position and what is wrong.
    pub fn read(path: &Path) -> Result<PretrainConfig> {
        let text = crate::io::files::read_text(path)?;
        let config: PretrainConfig = toml::from_str(&text).map_err(|e| {
            Error::usage(
                path.display().to_string(),
                format!("not a pretraining configuration: {}", e.to_string().trim_end().replace('\n', " ")),
            )
        })?;
        config.check().map_err(|e| e.context(path.display()))?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        self.optimizer.check()?;
        let t = &self.train;
        if t.steps == 0 || t.batch == 0 || t.checkpoint_every == 0 {
            return Err(Error::usage("train", "steps, batch and checkpoint_every must not be 0")
                .is(format!("{}, {}, {}", t.steps, t.batch, t.checkpoint_every))
                .must("at least 1 each"));
        }
        if !(0.0..=1.0).contains(&t.label_dropout) {
            return Err(Error::usage("train: label_dropout", "out of range").is(t.label_dropout).must("0 to 1"));
        }
        Ok(())
    }

    /// The model for images of a size.
    ///
    /// # Errors
    /// Sizes that do not make a model.
    pub fn model_for(&self, channels: usize, side: usize, classes: usize) -> Result<DitConfig> {
        let m = &self.model;
        let config = DitConfig {
            patch: m.patch,
            input_size: side,
            in_channels: channels,
            learn_sigma: m.learn_sigma,
            classes,
            blocks: vec![DitConfig::plain_block(m.heads, m.mlp_ratio); m.depth.min(1001)],
            ..DitConfig::plain(0, m.width, m.heads)
        };
        config.check()?;
        Ok(config)
    }

    /// The model for pictures of a size and the encoder of its captions, for a vocabulary.
    ///
    /// # Errors
    /// Sizes that do not make a model.
    pub fn text_models_for(
        &self,
        text: &TextConfig,
        (channels, side): (usize, usize),
        vocabulary: usize,
    ) -> Result<(PixArtConfig, T5Config)> {
        let m = &self.model;
        let transformer = PixArtConfig {
            patch: m.patch,
            sample_size: side,
            in_channels: channels,
            out_channels: if m.learn_sigma { 2 * channels } else { channels },
            caption_channels: text.width,
            max_tokens: text.max_tokens,
            blocks: vec![DitConfig::plain_block(m.heads, m.mlp_ratio); m.depth.min(1001)],
            ..PixArtConfig::plain(0, m.width, m.heads)
        };
        transformer.check()?;
        if text.heads == 0 || !text.width.is_multiple_of(text.heads) {
            return Err(Error::usage("text: heads", "does not divide the width")
                .is(text.heads)
                .must(format!("a divisor of {}", text.width)));
        }
        let encoder = T5Config {
            width: text.width,
            heads: text.heads,
            head_width: text.width / text.heads,
            hidden: text.hidden,
            depth: text.depth,
            vocabulary,
            ..T5Config::xxl()
        };
        Ok((transformer, encoder))
    }
}
