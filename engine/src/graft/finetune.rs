//! Stage 2, lightweight finetuning: all parameters of the grafted model, on the diffusion loss.
//!
//! The loop is the one that pretraining uses; only start, settings and what tells runs apart are this stage's.

use super::distill::check_images;
use super::settings::FinetuneConfig;
use crate::error::Result;
use crate::io::datasets::ImageSet;
use crate::models::dit::Dit;
use crate::train::trainer::{Progress, Trainer};
use std::ops::ControlFlow;
use std::path::Path;

/// A grafted model in training.
pub struct Finetuner {
    trainer: Trainer,
    steps: u64,
}

impl Finetuner {
    /// Starts from `grafted`, or resumes from the checkpoint in `folder`. The moving average starts at `grafted`.
    ///
    /// # Errors
    /// A folder that cannot be written or that another process uses, or a checkpoint of another run.
    pub fn open(grafted: Dit, config: &FinetuneConfig, folder: &Path, fingerprint: String) -> Result<Finetuner> {
        let trainer = Trainer::open(grafted, config.optimizer, config.loop_settings(), folder, fingerprint)?;
        Ok(Finetuner { trainer, steps: config.steps })
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

    /// The model with averaged parameters (the raw ones where no average is kept).
    ///
    /// # Errors
    /// When memory runs out.
    pub fn model(&self) -> Result<Dit> {
        self.trainer.averaged()
    }
}
