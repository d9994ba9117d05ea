//! What a run has reached: costs, residuals, losses and times, gathered from its folder into one JSON file.
//!
//! Times come from the logs, so that a run that was stopped and resumed reports the sum of its parts.

use super::cost::{Counter, ModelCost};
use super::distill::{HELD_OUT_LOG, Residual};
use super::evaluate::Evaluation;
use super::plan::{Assignment, Plan};
use super::run::RunFolder;
use crate::error::{Error, Result};
use crate::io::jsonl;
use crate::models::sites::{SiteConfig, SiteModel};
use crate::nn::operators::Site;
use crate::train::trainer::LOSS_LOG;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// A run in numbers.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Folder of the base model, as the plan says it.
    pub base: String,
    /// Every grafted site.
    pub sites: Vec<SiteSummary>,
    /// Cost of the base.
    pub cost_before: ModelCost,
    /// Cost of the grafted model.
    pub cost_after: ModelCost,
    /// Stage 1.
    pub distill: StageSummary,
    /// Stage 2, where it has begun.
    pub finetune: Option<StageSummary>,
    /// Samples of every stage, where they were compared.
    pub evaluation: Option<Evaluation>,
}

/// A grafted site.
#[derive(Clone, Debug, Serialize)]
pub struct SiteSummary {
    /// `blocks.3.attn`.
    pub site: String,
    /// Operator of the base.
    pub before: String,
    /// Operator in its place.
    pub after: String,
    /// Held-out residual of the operator as it was initialised.
    pub residual_initial: Option<Residual>,
    /// Held-out residual after stage 1.
    pub residual_distilled: Option<Residual>,
}

/// A stage of training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageSummary {
    /// Updates done.
    pub steps: u64,
    /// Images seen.
    pub images: u64,
    /// Seconds spent in updates.
    pub seconds: f64,
    /// Mean loss of the first tenth of the updates (mean over the sites in stage 1).
    pub loss_first: f64,
    /// Mean loss of the last tenth.
    pub loss_last: f64,
}

impl Summary {
    /// Gathers what is in a run folder.
    ///
    /// # Errors
    /// A missing base model, or a damaged log.
    pub fn gather<M: SiteModel>(run: &RunFolder) -> Result<Summary> {
        let plan = &run.decided()?;
        let base = M::describe(&plan.base)?;
        let assignments = plan.resolve(&base)?;
        let after = super::assemble::grafted_config(&base, &assignments)?;
        let held_out = read_log(&run.distill_folder().join(HELD_OUT_LOG))?;
        let finetune = finetune_stage(&run.finetune_folder().join(LOSS_LOG), plan)?;
        Ok(Summary {
            base: plan.base.display().to_string(),
            sites: assignments.iter().map(|a| site(a, &base, &held_out)).collect(),
            cost_before: Counter::new(&base).model()?,
            cost_after: Counter::new(&after).model()?,
            distill: stage(&run.distill_folder().join(LOSS_LOG), plan.distill.batch, mean_site_loss)?,
            finetune: (finetune.steps > 0).then_some(finetune),
            evaluation: None,
        })
    }

    /// As JSON.
    ///
    /// # Errors
    /// A number that JSON cannot hold.
    pub fn json(&self) -> Result<Value> {
        serde_json::to_value(self).map_err(|e| Error::failure("summary", e.to_string()).must("finite numbers"))
    }
}

pub(super) fn read_log(path: &Path) -> Result<Vec<Value>> {
    if path.exists() { jsonl::read(path) } else { Ok(Vec::new()) }
}

fn site<C: SiteConfig>(a: &Assignment, base: &C, held_out: &[Value]) -> SiteSummary {
    let name = a.to_string();
    let block = base.blocks().get(a.block);
    let before = match a.site {
        Site::Attn => block.map(|b| b.attn.to_string()),
        Site::Mlp => block.map(|b| b.mlp.to_string()),
        Site::BlockPair => Some("serial".to_string()),
    };
    let residual = |line: Option<&Value>| {
        let values = line?.get("sites")?.get(&name)?;
        Some(Residual { loss: values.get("loss")?.as_f64()?, relative: values.get("relative")?.as_f64()? })
    };
    let step = |line: &&Value| line["step"].as_u64();
    SiteSummary {
        before: before.unwrap_or_default(),
        after: a.spec.to_string(),
        residual_initial: residual(held_out.iter().find(|l| step(l) == Some(0))),
        residual_distilled: residual(held_out.iter().rfind(|l| step(l) > Some(0))),
        site: name,
    }
}

/// Stage 2 by its loss log.
pub(super) fn finetune_stage(log: &Path, plan: &Plan) -> Result<StageSummary> {
    stage(log, plan.finetune.batch, |line| line["loss"].as_f64())
}

fn mean_site_loss(line: &Value) -> Option<f64> {
    let losses = line["losses"].as_object()?;
    Some(losses.values().filter_map(Value::as_f64).sum::<f64>() / losses.len().max(1) as f64)
}

fn stage(log: &Path, batch: usize, loss: fn(&Value) -> Option<f64>) -> Result<StageSummary> {
    let lines = read_log(log)?;
    let losses: Vec<f64> = lines.iter().filter_map(loss).collect();
    let tenth = losses.len().div_ceil(10);
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len().max(1) as f64;
    let seconds = lines.iter().filter_map(|l| l["images_per_second"].as_f64()).map(|rate| batch as f64 / rate).sum();
    let steps = lines.len() as u64;
    let (loss_first, loss_last) = (mean(&losses[..tenth]), mean(&losses[losses.len() - tenth..]));
    Ok(StageSummary { steps, images: steps * batch as u64, seconds, loss_first, loss_last })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;
    use crate::io::jsonl::JsonLog;
    use serde_json::json;

    #[test]
    fn a_stage_adds_up_its_log() {
        let path = test_dir("summary").join("loss.jsonl");
        assert_eq!(stage(&path, 8, mean_site_loss).unwrap(), StageSummary::default());
        let mut log = JsonLog::create(&path).unwrap();
        for step in 1..=20 {
            let loss = f64::from(21 - step);
            log.append(&json!({ "step": step, "losses": { "a": loss, "b": 3.0 * loss }, "images_per_second": 16.0 }))
                .unwrap();
        }
        let found = stage(&path, 8, mean_site_loss).unwrap();
        assert_eq!((found.steps, found.images, found.seconds), (20, 160, 10.0));
        assert_eq!((found.loss_first, found.loss_last), (39.0, 3.0));
    }
}
