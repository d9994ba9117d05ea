//! Stage 2, lightweight finetuning: the grafted model on the diffusion loss, all of it or by low-rank adapters beside
//! its frozen weights, with terms that keep it near to the base model where asked for.
//!
//! The loop is the one that pretraining uses; only start, settings and what tells runs apart are this stage's.

use super::plan::Assignment;
use super::settings::{FinetuneConfig, Method};
use crate::error::{Error, Result};
use crate::models::adapter;
use crate::nn::lora::{self, Lora};
use crate::train::sites::SiteLearner;
use crate::train::teacher::Teacher;
use crate::train::trainer::{Progress, Trainer};
use std::ops::ControlFlow;
use std::path::Path;

/// A grafted model in training.
pub struct Finetuner<M: SiteLearner> {
    trainer: Trainer<M>,
    steps: u64,
    /// Sites that train in full beside adapters.
    whole: Vec<String>,
}

/// Where stage 2 starts.
pub struct Start<'s, M> {
    /// The grafted model.
    pub grafted: M,
    /// Its grafted sites.
    pub sites: &'s [Assignment],
    /// The base model, where the settings ask for its terms ([`FinetuneConfig::needs_base`]).
    pub base: Option<M>,
}

impl<M: SiteLearner> Finetuner<M> {
    /// Starts from `start`, or resumes from the checkpoint in `folder`. The moving average starts at the grafted model.
    ///
    /// # Errors
    /// A module of the adapters that fits no layer, a folder that cannot be written or that another process uses, or a
    /// checkpoint of another run.
    pub fn open(start: Start<'_, M>, config: &FinetuneConfig, folder: &Path, fingerprint: String) -> Result<Self> {
        let (grafted, teacher, whole) = prepare(start, config)?;
        let mut trainer = Trainer::open(grafted, config.optimizer, config.loop_settings(), folder, fingerprint)?;
        trainer.teacher = teacher;
        Ok(Finetuner { trainer, steps: config.steps, whole })
    }

    /// As [`Finetuner::open`] without a folder: it can take single updates and leaves nothing behind.
    ///
    /// # Errors
    /// As [`Finetuner::open`], folder and checkpoint apart.
    pub(super) fn homeless(start: Start<'_, M>, config: &FinetuneConfig) -> Result<Self> {
        let (grafted, teacher, whole) = prepare(start, config)?;
        let mut trainer = Trainer::homeless(grafted, config.optimizer, config.loop_settings())?;
        trainer.teacher = teacher;
        Ok(Finetuner { trainer, steps: config.steps, whole })
    }

    /// The loop, for single updates.
    pub(super) fn trainer_mut(&mut self) -> &mut Trainer<M> {
        &mut self.trainer
    }

    /// Updates done so far.
    pub fn step(&self) -> u64 {
        self.trainer.step()
    }

    /// Trains to the last step, or until `report` breaks; returns whether the last step was reached.
    ///
    /// # Errors
    /// Images that do not fit, a loss that is not finite (the last good checkpoint stays), or a full disk.
    pub fn run(&mut self, data: &M::Data, report: &mut dyn FnMut(&Progress) -> ControlFlow<()>) -> Result<bool> {
        self.trainer.model.check(data)?;
        self.trainer.run(data, report)?;
        Ok(self.trainer.step() >= self.steps)
    }

    /// The model with averaged parameters (the raw ones where no average is kept), adapters merged into its weights.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn model(&self) -> Result<M> {
        let mut model = self.trainer.averaged()?;
        lora::merge(model.params_mut())?;
        Ok(model)
    }

    /// Writes the averaged adapters in PEFT's layout, with the operators that were trained in full.
    ///
    /// # Errors
    /// A stage without adapters, or a folder that cannot be written.
    pub fn save_adapters(&self, folder: &Path) -> Result<()> {
        adapter::save_adapter(&self.trainer.averaged()?, folder, &self.whole)
    }
}

/// The model that trains, with its adapters; the frozen base, where its terms are asked for; and the names of the sites
/// that train in full beside adapters.
fn prepare<M: SiteLearner>(
    start: Start<'_, M>,
    config: &FinetuneConfig,
) -> Result<(M, Option<Teacher<M>>, Vec<String>)> {
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
    Ok((grafted, teacher, whole))
}

/// Attaches adapters; returns the names of the sites that train in full.
fn adapt<M: SiteLearner>(grafted: &mut M, sites: &[Assignment], config: &FinetuneConfig) -> Result<Vec<String>> {
    let settings = config.lora();
    let whole: Vec<String> =
        if settings.train_grafts { sites.iter().map(ToString::to_string).collect() } else { vec![] };
    let defaults: Vec<String> = M::ADAPTED.iter().map(ToString::to_string).collect();
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
    lora::attach(grafted.params_mut(), &lora, &|name| whole.iter().any(|site| of_site(name, site)))
        .map_err(|e| e.context("finetune"))?;
    Ok(whole)
}
