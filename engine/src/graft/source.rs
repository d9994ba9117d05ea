//! The data of a run, and with it the kind of model that it grafts.

use super::choose;
use super::evaluate::{self, Evaluation};
use super::plan::Plan;
use super::run::RunFolder;
use crate::error::Result;
use crate::io::datasets::{ImageSet, Split};
use crate::io::hub;
use crate::models::dit::Dit;
use crate::models::{component, pixart};
use crate::tensor::Device;
use crate::train::config::DataConfig;
use crate::train::learner::Learner;
use crate::train::sites::SiteLearner;
use std::path::Path;

/// Examples for both stages and for the comparison after them.
pub trait RunSource: Sized + Sync {
    /// What they train.
    type Model: SiteLearner;

    /// Reads the data that a plan names.
    ///
    /// # Errors
    /// Data of another kind, or a file that is missing or damaged.
    fn load(config: &DataConfig) -> Result<Self>;

    /// What both stages train on.
    fn train(&self) -> &<Self::Model as Learner>::Data;

    /// What residuals are measured on.
    fn held_out(&self) -> &<Self::Model as Learner>::Data;

    /// As [`choose::choose`].
    ///
    /// # Errors
    /// Those of the choice; layers that are decided by what cannot be measured of this kind of model.
    fn choose(
        plan: &Plan,
        base: &Self::Model,
        folder: Option<&Path>,
        data: Option<&Self>,
        report: &mut choose::Report<'_>,
    ) -> Result<Option<Plan>>;

    /// Compares the models of a finished run.
    ///
    /// # Errors
    /// A model that cannot be read.
    fn evaluate(&self, run: &RunFolder, device: &Device, report: &mut evaluate::Report<'_>) -> Result<Evaluation>;
}

/// Whether the base model of a plan reads text, so that it is grafted on [`super::text_source::TextData`].
/// What is wrong with one that cannot be opened, its loader says.
pub fn reads_text(plan: &Plan) -> bool {
    let found = hub::resolve(&plan.base).and_then(|path| pixart::is_pixart(&component(&path, "transformer")));
    found.unwrap_or(false)
}

/// Labelled images.
pub struct RunData {
    /// What both stages train on.
    pub train: ImageSet,
    /// What residuals are measured on.
    pub held_out: ImageSet,
}

impl RunData {
    /// Train and test split of a data set.
    ///
    /// # Errors
    /// An unknown kind, or a file that is missing or damaged.
    pub fn load(config: &DataConfig) -> Result<RunData> {
        Ok(RunData { train: config.load(Split::Train)?, held_out: config.load(Split::Test)? })
    }

    /// Number of classes.
    pub fn class_count(&self) -> usize {
        self.train.class_names.len()
    }
}

impl RunSource for RunData {
    type Model = Dit;

    fn load(config: &DataConfig) -> Result<RunData> {
        RunData::load(config)
    }

    fn train(&self) -> &ImageSet {
        &self.train
    }

    fn held_out(&self) -> &ImageSet {
        &self.held_out
    }

    fn choose(
        plan: &Plan,
        base: &Dit,
        folder: Option<&Path>,
        data: Option<&RunData>,
        report: &mut choose::Report<'_>,
    ) -> Result<Option<Plan>> {
        choose::choose(plan, base, folder, data, report)
    }

    fn evaluate(&self, run: &RunFolder, device: &Device, report: &mut evaluate::Report<'_>) -> Result<Evaluation> {
        evaluate::evaluate(run, self, device, report)
    }
}
