//! Settings of the stages; what a plan leaves out is as published (arXiv 2506.05340, §3.3 and §4.1).

use crate::error::{Error, Result};
use crate::nn::operators::Site;
use crate::ops::contracts::loss_regression;
use crate::sample::solver::Sampler;
use crate::train::config::Dtype;
use crate::train::optimizer::AdamWSettings;
use crate::train::trainer::LoopSettings;
use serde::{Deserialize, Deserializer, Serialize, de};
use std::path::PathBuf;

/// Stage 1: activation distillation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DistillConfig {
    /// Updates in all: 200 epochs of 8,000 images.
    pub steps: u64,
    /// Images per update.
    pub batch: usize,
    /// Seed of initial values, data order, timesteps and noise.
    pub seed: u64,
    /// Arithmetic of products.
    pub dtype: Dtype,
    /// Updates between checkpoints.
    pub checkpoint_every: u64,
    /// Batches of the test split on which the residuals are measured.
    pub held_out: u64,
    /// Optimiser of every site. No moving average is kept in this stage.
    #[serde(deserialize_with = "stage1_optimizer")]
    pub optimizer: AdamWSettings,
    /// Loss by site.
    pub loss: LossConfig,
    /// Multiply prediction and target by the block's gate of the site before they are compared.
    pub gate_scaled: bool,
    /// Updates between measurements of the residuals; 0 measures before the first and after the last only.
    pub held_out_every: u64,
    /// Folder that keeps activations of the teacher, so that it runs once and not in every pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// Images whose activations are kept, rounded up to whole batches: the published 8,000.
    pub cache_samples: usize,
    /// Element type of the kept activations; f32 keeps them exactly.
    pub cache_dtype: Dtype,
}

impl Default for DistillConfig {
    fn default() -> Self {
        DistillConfig {
            steps: 25_000,
            batch: 64,
            seed: 0,
            dtype: Dtype::F32,
            checkpoint_every: 500,
            held_out: 8,
            optimizer: AdamWSettings { lr: 1e-4, clip: 10.0, ema: 0.0, ..AdamWSettings::default() },
            loss: LossConfig::default(),
            gate_scaled: false,
            held_out_every: 0,
            cache: None,
            cache_samples: 8000,
            cache_dtype: Dtype::F32,
        }
    }
}

/// Which regression loss each kind of site takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossConfig {
    /// Of token mixers.
    pub attn: Loss,
    /// Of channel mixers.
    pub mlp: Loss,
    /// Of pairs of blocks.
    pub pair: Loss,
    /// Where the Huber loss turns from square to absolute.
    pub huber_delta: f32,
}

impl Default for LossConfig {
    fn default() -> Self {
        LossConfig { attn: Loss::L1, mlp: Loss::L2, pair: Loss::L1, huber_delta: 1.0 }
    }
}

/// A regression loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    /// Mean absolute error.
    L1,
    /// Mean squared error.
    L2,
    /// Squared near zero, absolute beyond.
    Huber,
}

impl LossConfig {
    /// The loss of a site that no graft gives its own.
    pub fn of(&self, site: Site) -> Loss {
        match site {
            Site::Attn => self.attn,
            Site::Mlp => self.mlp,
            Site::BlockPair => self.pair,
        }
    }

    /// Settings of the loss operator for a site.
    pub fn params(&self, site: Site) -> loss_regression::Params {
        self.params_of(self.of(site))
    }

    /// Settings of the loss operator for a loss.
    pub fn params_of(&self, loss: Loss) -> loss_regression::Params {
        let kind = match loss {
            Loss::L1 => 0,
            Loss::L2 => 1,
            Loss::Huber => 2,
        };
        loss_regression::Params { kind, delta: self.huber_delta }
    }
}

/// Where a grafted operator starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// At its own initialisation, as published.
    #[default]
    Random,
    /// At the teacher's parameters where it has one of the same name, shape and meaning.
    Teacher,
}

/// How layers are measured where a plan leaves their choice to the base model (`top-local:n`, `low-local:n`,
/// `auto:ratio`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SelectConfig {
    /// Half width of the band of the locality; 32, or an eighth of the tokens where these are fewer than 256.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub k: Option<usize>,
    /// Images sampled for the locality.
    pub samples: usize,
    /// Sampling steps of each.
    pub steps: usize,
    /// Classifier-free guidance scale of the sampling.
    pub guidance: f64,
    /// Updates of the short stage 1 of `auto:ratio`.
    pub updates: u64,
    /// Images of each of them.
    pub batch: usize,
    /// Seed of the sampling and of the short stage 1.
    pub seed: u64,
}

impl Default for SelectConfig {
    fn default() -> Self {
        SelectConfig { k: None, samples: 16, steps: 10, guidance: 1.5, updates: 100, batch: 32, seed: 0 }
    }
}

impl SelectConfig {
    /// The half width for a model with `tokens`.
    pub fn band(&self, tokens: usize) -> usize {
        self.k.unwrap_or_else(|| (tokens / 8).clamp(1, 32))
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the setting.
    pub fn check(&self) -> Result<()> {
        let counts = [
            ("samples", self.samples as u64),
            ("steps", self.steps as u64),
            ("updates", self.updates),
            ("batch", self.batch as u64),
        ];
        at_least_one("select", &counts)?;
        if !self.guidance.is_finite() {
            return Err(Error::usage("select: guidance", "not a finite number")
                .is(self.guidance)
                .must("a finite number, 1 for no guidance"));
        }
        Ok(())
    }
}

/// Stage 2: lightweight finetuning of all parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FinetuneConfig {
    /// Updates in all.
    pub steps: u64,
    /// Images per update.
    pub batch: usize,
    /// Seed of data order, timesteps, dropout and noise.
    pub seed: u64,
    /// Probability that a label is replaced by the null label.
    pub label_dropout: f64,
    /// Arithmetic of products.
    pub dtype: Dtype,
    /// Updates between checkpoints.
    pub checkpoint_every: u64,
    /// Recompute blocks in the backward pass to save memory.
    pub activation_checkpointing: bool,
    /// Optimiser; its moving average starts at the grafted model.
    #[serde(deserialize_with = "stage2_optimizer")]
    pub optimizer: AdamWSettings,
    /// What trains.
    #[serde(skip_serializing_if = "Method::is_full")]
    pub method: Method,
    /// Adapters, for the method `lora`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraConfig>,
    /// Weight of the mean squared distance to the base model's prediction. This term and the next keep the base in
    /// memory beside the model and cost its forward pass at every update.
    #[serde(skip_serializing_if = "is_zero")]
    pub output_distill: f64,
    /// Weight of the squared distance to what the base gives at the grafted sites, relative to its mean square, mean
    /// over the sites. It also keeps one `[B, N, D]` target per site, and no activation checkpointing beside it.
    #[serde(skip_serializing_if = "is_zero")]
    pub feature_distill: f64,
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

/// What stage 2 trains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// All parameters.
    #[default]
    Full,
    /// Low-rank adapters beside frozen weights.
    Lora,
}

impl Method {
    fn is_full(&self) -> bool {
        *self == Method::Full
    }
}

/// Adapters of stage 2; the published PixArt-Σ graft has rank 64.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Rank.
    pub rank: usize,
    /// The addition is scaled by alpha over rank; equal to the rank where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Layers, by the ends of their names; [`crate::models::sites::SiteModel::ADAPTED`] where none is given.
    pub modules: Vec<String>,
    /// Grafted operators train in full; otherwise they get adapters like the rest.
    pub train_grafts: bool,
    /// Write the adapters for other programs too, beside the merged model.
    pub keep_adapters: bool,
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig { rank: 64, alpha: None, modules: Vec::new(), train_grafts: true, keep_adapters: false }
    }
}

impl LoraConfig {
    /// Numerator of the scale.
    pub fn alpha(&self) -> f64 {
        self.alpha.unwrap_or(self.rank as f64)
    }
}

impl Default for FinetuneConfig {
    fn default() -> Self {
        FinetuneConfig {
            steps: 50_000,
            batch: 256,
            seed: 0,
            label_dropout: 0.1,
            dtype: Dtype::F32,
            checkpoint_every: 500,
            activation_checkpointing: false,
            optimizer: AdamWSettings { lr: 1e-4, warmup: 1000, clip: 10.0, ema: 0.9999, ..AdamWSettings::default() },
            method: Method::Full,
            lora: None,
            output_distill: 0.0,
            feature_distill: 0.0,
        }
    }
}

impl FinetuneConfig {
    /// Whether a term compares with the base model.
    pub fn needs_base(&self) -> bool {
        self.output_distill > 0.0 || self.feature_distill > 0.0
    }

    /// Settings of the adapters.
    pub fn lora(&self) -> LoraConfig {
        self.lora.clone().unwrap_or_default()
    }

    /// Settings of the training loop.
    pub fn loop_settings(&self) -> LoopSettings {
        LoopSettings {
            steps: self.steps,
            batch: self.batch,
            seed: self.seed,
            label_dropout: self.label_dropout,
            precision: self.dtype.into(),
            checkpoint_every: self.checkpoint_every,
            activation_checkpointing: self.activation_checkpointing,
        }
    }
}

/// How the models before and after are compared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalConfig {
    /// Images drawn from each model.
    pub samples: usize,
    /// Sampling steps.
    pub steps: usize,
    /// `ddpm`, `ddim` or `dpm++`.
    pub sampler: String,
    /// Classifier-free guidance scale of the scored images; 1 is none.
    pub guidance: f64,
    /// Classifier-free guidance scale of the pictures in the report.
    pub picture_guidance: f64,
    /// Folder of the classifier in whose feature space images are compared; without one nothing is scored.
    pub classifier: Option<PathBuf>,
    /// Folder of pictures with captions among which those of a model that reads text are looked up; without one they
    /// are not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub captions: Option<PathBuf>,
    /// Seed of the noise.
    pub seed: u64,
}

impl Default for EvalConfig {
    fn default() -> Self {
        let sampler = "ddpm".into();
        EvalConfig {
            samples: 50_000,
            steps: 250,
            sampler,
            guidance: 1.5,
            picture_guidance: 4.0,
            classifier: None,
            captions: None,
            seed: 0,
        }
    }
}

fn stage1_optimizer<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<AdamWSettings, D::Error> {
    overlay(DistillConfig::default().optimizer, deserializer)
}

fn stage2_optimizer<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<AdamWSettings, D::Error> {
    overlay(FinetuneConfig::default().optimizer, deserializer)
}

/// Optimiser settings where those not given are a stage's own defaults, not the optimiser's.
fn overlay<'de, D: Deserializer<'de>>(
    defaults: AdamWSettings,
    deserializer: D,
) -> std::result::Result<AdamWSettings, D::Error> {
    let mut table = toml::Table::try_from(defaults).map_err(de::Error::custom)?;
    table.extend(toml::Table::deserialize(deserializer)?);
    table.try_into().map_err(|e: toml::de::Error| de::Error::custom(e.message()))
}

pub(super) fn at_least_one(section: &str, fields: &[(&str, u64)]) -> Result<()> {
    match fields.iter().find(|(_, value)| *value == 0) {
        Some((name, _)) => Err(Error::usage(format!("{section}: {name}"), "nothing to do").is(0).must("at least 1")),
        None => Ok(()),
    }
}

impl DistillConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the setting.
    pub fn check(&self) -> Result<()> {
        let counts = [
            ("steps", self.steps),
            ("batch", self.batch as u64),
            ("checkpoint_every", self.checkpoint_every),
            ("held_out", self.held_out),
            ("cache_samples", self.cache_samples as u64),
        ];
        at_least_one("distill", &counts)?;
        if u32::try_from(self.cache_samples.saturating_add(self.batch)).is_err() {
            return Err(Error::usage("distill: cache_samples", "out of range")
                .is(self.cache_samples)
                .must(format!("at most {}", u32::MAX - self.batch as u32)));
        }
        self.optimizer.check().map_err(|e| e.context("distill: optimizer"))?;
        if self.optimizer.ema != 0.0 {
            return Err(Error::usage("distill: optimizer: ema", "stage 1 keeps no moving average")
                .is(self.optimizer.ema)
                .must(0)
                .fix("remove it; stage 2 averages from the grafted model on"));
        }
        if self.loss.huber_delta.is_nan() || self.loss.huber_delta <= 0.0 {
            return Err(Error::usage("distill: loss: huber_delta", "out of range")
                .is(self.loss.huber_delta)
                .must("positive"));
        }
        Ok(())
    }
}

impl FinetuneConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the setting.
    pub fn check(&self) -> Result<()> {
        let counts = [("steps", self.steps), ("batch", self.batch as u64), ("checkpoint_every", self.checkpoint_every)];
        at_least_one("finetune", &counts)?;
        self.optimizer.check().map_err(|e| e.context("finetune: optimizer"))?;
        if !(0.0..=1.0).contains(&self.label_dropout) {
            return Err(Error::usage("finetune: label_dropout", "out of range").is(self.label_dropout).must("0 to 1"));
        }
        for (name, weight) in [("output_distill", self.output_distill), ("feature_distill", self.feature_distill)] {
            if !(weight >= 0.0 && weight.is_finite()) {
                return Err(Error::usage(format!("finetune: {name}"), "out of range")
                    .is(weight)
                    .must("0 for none, or a positive weight"));
            }
        }
        if self.feature_distill > 0.0 && self.activation_checkpointing {
            return Err(Error::usage("finetune: feature_distill", "needs what activation_checkpointing throws away")
                .must("one of the two")
                .fix("set activation_checkpointing = false, or use output_distill alone"));
        }
        self.check_lora()
    }

    fn check_lora(&self) -> Result<()> {
        let lora = self.lora();
        if self.lora.is_some() && self.method != Method::Lora {
            return Err(Error::usage("finetune: lora", "settings of adapters, but none are trained")
                .is("method = \"full\"")
                .must("method = \"lora\"")
                .fix("set the method, or remove `lora`"));
        }
        if lora.rank == 0 {
            return Err(Error::usage("finetune: lora: rank", "nothing to train").is(0).must("at least 1"));
        }
        if !(lora.alpha() > 0.0 && lora.alpha().is_finite()) {
            return Err(Error::usage("finetune: lora: alpha", "out of range").is(lora.alpha()).must("positive"));
        }
        Ok(())
    }
}

impl EvalConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the setting.
    pub fn check(&self) -> Result<()> {
        at_least_one("eval", &[("samples", self.samples as u64), ("steps", self.steps as u64)])?;
        self.sampler.parse::<Sampler>().map_err(|e| e.context("eval"))?;
        if !self.guidance.is_finite() || !self.picture_guidance.is_finite() {
            return Err(Error::usage("eval: guidance", "not a finite number")
                .is(format!("{}, {}", self.guidance, self.picture_guidance))
                .must("a finite number, 1 for no guidance"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_optimiser_given_in_part_keeps_the_stage_defaults() {
        let stage1: DistillConfig = toml::from_str("optimizer = { lr = 5e-4 }").unwrap();
        assert_eq!((stage1.optimizer.lr, stage1.optimizer.ema, stage1.optimizer.clip), (5e-4, 0.0, 10.0));
        let stage2: FinetuneConfig = toml::from_str("optimizer = { clip = 1 }").unwrap();
        assert_eq!((stage2.optimizer.warmup, stage2.optimizer.ema, stage2.optimizer.clip), (1000, 0.9999, 1.0));
        let error = toml::from_str::<DistillConfig>("optimizer = { rate = 1 }").unwrap_err();
        assert!(error.message().contains("unknown field `rate`"), "{error}");
    }

    #[test]
    fn losses_follow_the_site() {
        let loss: LossConfig = toml::from_str("mlp = \"huber\"\nhuber_delta = 0.5").unwrap();
        assert_eq!(loss.params(Site::Attn).kind, 0);
        assert_eq!((loss.params(Site::Mlp).kind, loss.params(Site::Mlp).delta), (2, 0.5));
        assert_eq!(LossConfig::default().params(Site::Mlp).kind, 1);
        assert_eq!(LossConfig::default().params(Site::BlockPair).kind, 0);
    }

    #[test]
    fn the_band_is_an_eighth_of_few_tokens() {
        let select = SelectConfig::default();
        assert_eq!([4, 49, 64, 256, 16_384].map(|n| select.band(n)), [1, 6, 8, 32, 32]);
        assert_eq!(SelectConfig { k: Some(3), ..select }.band(256), 3);
    }

    #[test]
    fn adapters_take_their_defaults() {
        let config: FinetuneConfig = toml::from_str("method = \"lora\"").unwrap();
        assert!(config.check().is_ok());
        assert_eq!((config.lora().rank, config.lora().alpha(), config.lora().train_grafts), (64, 64.0, true));
        let config: FinetuneConfig = toml::from_str("method = \"lora\"\nlora = { rank = 8 }").unwrap();
        assert_eq!(config.lora().alpha(), 8.0);
        assert!(toml::from_str::<FinetuneConfig>("method = \"adapter\"").is_err());
    }

    #[test]
    fn ranges_are_checked() {
        let bad =
            DistillConfig { optimizer: AdamWSettings { ema: 0.9, ..AdamWSettings::default() }, ..Default::default() };
        assert!(
            bad.check().unwrap_err().to_string().contains("distill: optimizer: ema: stage 1 keeps no moving average")
        );
        let bad = FinetuneConfig { steps: 0, ..Default::default() };
        assert!(bad.check().unwrap_err().to_string().starts_with("finetune: steps"));
        for (text, expected) in [
            ("lora = { rank = 8 }", "finetune: lora: settings of adapters, but none are trained"),
            ("method = \"lora\"\nlora = { rank = 0 }", "finetune: lora: rank"),
            ("method = \"lora\"\nlora = { alpha = 0.0 }", "finetune: lora: alpha"),
            ("output_distill = -1.0", "finetune: output_distill: out of range"),
            ("feature_distill = 1.0\nactivation_checkpointing = true", "finetune: feature_distill"),
        ] {
            let bad: FinetuneConfig = toml::from_str(text).unwrap();
            assert!(bad.check().unwrap_err().to_string().starts_with(expected), "{text}");
        }
        let bad = EvalConfig { sampler: "euler".into(), ..Default::default() };
        assert!(bad.check().unwrap_err().to_string().contains("eval: sampler"));
    }
}
