//! Stage 2, lightweight finetuning: the grafted model on the diffusion loss, all of it or by low-rank adapters beside
//! its frozen weights, with terms that keep it near to the base model where asked for.
//!
//! The loop is the one that pretraining uses; only start, settings and what tells runs apart are this stage's.

use super::distill::check_images;
use super::plan::Assignment;
use super::settings::{FinetuneConfig, Method};
use crate::error::{Error, Result};
use crate::io::datasets::ImageSet;
use crate::models::dit::{self, Dit};
use crate::nn::lora::{self, Lora};
use crate::train::teacher::Teacher;
use crate::train::trainer::{Progress, Trainer};
use std::ops::ControlFlow;
use std::path::Path;

/// A grafted model in training.
pub struct Finetuner {
    trainer: Trainer,
    steps: u64,
    /// Sites that train in full beside adapters.
    whole: Vec<String>,
}

/// Where stage 2 starts.
pub struct Start<'s> {
    /// The grafted model.
    pub grafted: Dit,
    /// Its grafted sites.
    pub sites: &'s [Assignment],
    /// The base model, where the settings ask for its terms ([`FinetuneConfig::needs_base`]).
    pub base: Option<Dit>,
}

impl Finetuner {
    /// Starts from `start`, or resumes from the checkpoint in `folder`. The moving average starts at the grafted model.
    ///
    /// # Errors
    /// A module of the adapters that fits no layer, a folder that cannot be written or that another process uses, or a
    /// checkpoint of another run.
    pub fn open(start: Start<'_>, config: &FinetuneConfig, folder: &Path, fingerprint: String) -> Result<Finetuner> {
        let Start { mut grafted, sites, base } = start;
        let whole = match config.method {
            Method::Full => Vec::new(),
            Method::Lora => adapt(&mut grafted, sites, config)?,
        };
        let teacher = match base.filter(|_| config.needs_base()) {
            Some(model) => Some(Teacher {
                model,
                output: config.output_distill,
                feature: config.feature_distill,
                sites: sites.iter().map(|a| (a.block, a.site)).collect(),
            }),
            None if config.needs_base() => {
                return Err(Error::failure("finetune", "no base model").must("one, for the distillation terms"));
            }
            None => None,
        };
        let mut trainer = Trainer::open(grafted, config.optimizer, config.loop_settings(), folder, fingerprint)?;
        trainer.teacher = teacher;
        Ok(Finetuner { trainer, steps: config.steps, whole })
    }

    /// Updates done so far.
    pub fn step(&self) -> u64 {
        self.trainer.step()
    }

    /// Trains to the last step, or until `report` breaks; returns whether the last step was reached.
    ///
    /// # Errors
    /// Images that do not fit, a loss that is not finite (the last good checkpoint stays), or a full disk.
    pub fn run(&mut self, data: &ImageSet, report: &mut dyn FnMut(&Progress) -> ControlFlow<()>) -> Result<bool> {
        check_images(&self.trainer.model, data)?;
        self.trainer.run(data, report)?;
        Ok(self.trainer.step() >= self.steps)
    }

    /// The model with averaged parameters (the raw ones where no average is kept), adapters merged into its weights.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn model(&self) -> Result<Dit> {
        let mut model = self.trainer.averaged()?;
        lora::merge(&mut model.params)?;
        Ok(model)
    }

    /// Writes the averaged adapters in PEFT's layout, with the operators that were trained in full.
    ///
    /// # Errors
    /// A stage without adapters, or a folder that cannot be written.
    pub fn save_adapters(&self, folder: &Path) -> Result<()> {
        dit::save_adapter(&self.trainer.averaged()?, folder, &self.whole)
    }
}

/// Attaches adapters; returns the names of the sites that train in full.
fn adapt(grafted: &mut Dit, sites: &[Assignment], config: &FinetuneConfig) -> Result<Vec<String>> {
    let settings = config.lora();
    let whole: Vec<String> =
        if settings.train_grafts { sites.iter().map(ToString::to_string).collect() } else { vec![] };
    let defaults = DEFAULT_MODULES.map(String::from);
    let strict = !settings.modules.is_empty();
    let lora = Lora {
        rank: settings.rank,
        alpha: settings.alpha(),
        modules: if strict { &settings.modules } else { &defaults },
        strict,
        seed: config.seed,
    };
    let of_site =
        |name: &str, site: &String| name.strip_prefix(site.as_str()).is_some_and(|rest| rest.starts_with('.'));
    lora::attach(&mut grafted.params, &lora, &|name| whole.iter().any(|site| of_site(name, site)))
        .map_err(|e| e.context("finetune"))?;
    Ok(whole)
}

/// Layers with adapters where a plan names none: the projections of attention, of grafted operators and of the MLP, and
/// the modulation, as the usual recipes for PixArt adapt them.
pub const DEFAULT_MODULES: [&str; 7] = ["qkv", "proj", "in_proj", "out_proj", "fc1", "fc2", "adaLN_modulation.1"];
