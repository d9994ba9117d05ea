//! Settings of synthetic pairs.

use crate::error::{Error, Result};
use crate::graft::settings::at_least_one;
use crate::sample::solver::Sampler;
use crate::train::config::Dtype;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Pairs that the base model makes for its own graft, where the plan's data is not there yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SynthesizeConfig {
    /// File with a prompt on every line.
    pub prompts: PathBuf,
    /// Latents of every prompt.
    #[serde(default = "one")]
    pub per_prompt: usize,
    /// Seed of the first latent.
    #[serde(default)]
    pub seed: u64,
    /// Sampling steps.
    #[serde(default = "twenty")]
    pub steps: usize,
    /// `ddpm`, `ddim` or `dpm++`; the model's scheduler where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampler: Option<String>,
    /// Classifier-free guidance scale; 1 is none.
    #[serde(default = "usual_guidance")]
    pub guidance: f64,
    /// Latents computed together; changes no bit.
    #[serde(default = "one")]
    pub batch: usize,
    /// Pairs in a file.
    #[serde(default = "usual_shard")]
    pub shard: usize,
    /// Arithmetic of the products.
    #[serde(default)]
    pub dtype: Dtype,
    /// Element type of what is written.
    #[serde(default)]
    pub store: Dtype,
}

fn one() -> usize {
    1
}
fn twenty() -> usize {
    20
}
fn usual_guidance() -> f64 {
    4.5
}
fn usual_shard() -> usize {
    64
}

impl SynthesizeConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the setting.
    pub fn check(&self) -> Result<()> {
        let counts = [
            ("per_prompt", self.per_prompt as u64),
            ("steps", self.steps as u64),
            ("batch", self.batch as u64),
            ("shard", self.shard as u64),
        ];
        at_least_one("synthesize", &counts)?;
        if let Some(sampler) = &self.sampler {
            sampler.parse::<Sampler>().map_err(|e| e.context("synthesize"))?;
        }
        if !self.guidance.is_finite() {
            return Err(Error::usage("synthesize: guidance", "not a finite number")
                .is(self.guidance)
                .must("a finite number, 1 for no guidance"));
        }
        Ok(())
    }
}
