//! Grafting a model that reads text, on the pairs that it made itself.

use super::choose;
use super::evaluate::{self, Evaluation};
use super::fidelity;
use super::plan::Plan;
use super::run::RunFolder;
use super::source::RunSource;
use crate::error::{Error, Result};
use crate::models::pixart::PixArt;
use crate::tensor::Device;
use crate::train::config::DataConfig;
use crate::train::pairs::Pairs;
use std::path::Path;

/// Name of this kind of data in a plan.
pub const KIND: &str = "pairs";

/// Synthetic pairs, most to train on and some kept back.
pub struct TextData {
    /// What both stages train on.
    pub train: Pairs,
    /// What residuals and models are measured on.
    pub held_out: Pairs,
}

impl RunSource for TextData {
    type Model = PixArt;

    fn load(config: &DataConfig) -> Result<TextData> {
        if config.kind != KIND {
            return Err(Error::usage("data: kind", "not for a model that reads text")
                .is(&config.kind)
                .must(format!("{KIND:?}, with the folder that `graft synthesize` has filled")));
        }
        let [train, held_out] = Pairs::open(Path::new(&config.dir))?.split()?;
        Ok(TextData { train, held_out })
    }

    fn train(&self) -> &Pairs {
        &self.train
    }

    fn held_out(&self) -> &Pairs {
        &self.held_out
    }

    fn choose(
        plan: &Plan,
        _base: &PixArt,
        _folder: Option<&Path>,
        _data: Option<&TextData>,
        _report: &mut choose::Report<'_>,
    ) -> Result<Option<Plan>> {
        match plan.needs_choice() {
            false => Ok(Some(plan.clone())),
            true => Err(Error::usage(plan.name(), "layers that the base model decides are not measured in a PixArt")
                .must("a list, all, every-other, 3-of-4, deep:n or paper-pixart")),
        }
    }

    fn evaluate(&self, run: &RunFolder, device: &Device, report: &mut evaluate::Report<'_>) -> Result<Evaluation> {
        fidelity::evaluate(run, self, device, report)
    }
}

#[cfg(test)]
mod tests;
