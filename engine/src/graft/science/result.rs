//! What a job has measured, as its `result.json` holds it.

use crate::error::{Error, Result};
use crate::eval::score::Score;
use crate::graft::cost::{ModelCost, percent};
use crate::graft::evaluate::Evaluated;
use crate::graft::summary::{SiteSummary, StageSummary, Summary};
use crate::io::json;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// A job in numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct JobResult {
    /// Row of the study.
    pub row: String,
    /// Seed of the job.
    pub seed: u64,
    /// What the result depends on, as a digest.
    pub identity: String,
    /// Operator → number of sites that hold it.
    pub operators: BTreeMap<String, usize>,
    /// Share of the layers whose attention gave way to something that is not softmax attention over all tokens.
    pub attention_replaced: f64,
    /// What the grafted model costs against the base.
    pub change: Change,
    /// Mean over the sites of the relative error on held-out images after stage 1.
    pub residual: Option<f64>,
    /// Stage 1, where there was one.
    pub distill: Option<StageSummary>,
    /// Stage 2, where there was one.
    pub finetune: Option<StageSummary>,
    /// Models that were sampled.
    pub stages: Vec<Scored>,
}

/// Change against the base in per cent, as table 4 of the paper counts it: operators of the kinds of site that the
/// graft touches, over all layers; and of the whole model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// FLOPs of the operators.
    pub operator_flops: f64,
    /// FLOPs of the projections around them.
    pub projection_flops: f64,
    /// Parameters of the operators with their projections.
    pub operator_params: f64,
    /// FLOPs of a forward pass.
    pub flops: f64,
    /// Parameters.
    pub params: f64,
}

impl From<Change> for [f64; 5] {
    fn from(c: Change) -> [f64; 5] {
        [c.operator_flops, c.projection_flops, c.operator_params, c.flops, c.params]
    }
}

/// A model that was sampled.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scored {
    /// `original`, `random`, `distilled` or `finetuned`.
    pub name: String,
    /// Scores of its samples.
    pub score: Option<Score>,
    /// Denoising loss on held-out images: the same images, timesteps and noise for every model.
    pub loss: Option<f64>,
    /// Seconds per scored image.
    pub seconds_per_image: Option<f64>,
    /// Pictures as a PNG sheet, which is a file of its own beside the result.
    #[serde(skip)]
    pub sheet: Vec<u8>,
}

impl Scored {
    pub(super) fn new(e: Evaluated, loss: f64) -> Scored {
        let Evaluated { name, score, seconds_per_image, sheet, .. } = e;
        Scored { name, score, loss: Some(loss), seconds_per_image, sheet }
    }
}

impl Change {
    fn between(before: &ModelCost, after: &ModelCost) -> Change {
        let touched = |b: fn(&ModelCost) -> f64, a: fn(&ModelCost) -> f64| {
            // Only the kind of site that changed counts, so that half of the attention is not measured against MLPs.
            let (old, new) = if before.attn == after.attn { (a(before), a(after)) } else { (b(before), b(after)) };
            percent(old, new)
        };
        Change {
            operator_flops: touched(|c| c.attn.flops_operator, |c| c.mlp.flops_operator),
            projection_flops: touched(|c| c.attn.flops_projections, |c| c.mlp.flops_projections),
            operator_params: touched(|c| c.attn.params as f64, |c| c.mlp.params as f64),
            flops: percent(before.flops, after.flops),
            params: percent(before.params as f64, after.params as f64),
        }
    }
}

impl JobResult {
    /// Of a graft in a model of `depth` blocks.
    pub(super) fn of_graft(summary: &Summary, depth: usize, stages: Vec<Scored>) -> JobResult {
        let mut operators = BTreeMap::new();
        for site in &summary.sites {
            *operators.entry(site.after.clone()).or_default() += 1;
        }
        let replaced = |s: &&SiteSummary| s.site.ends_with(".attn") && !s.after.starts_with("mha");
        let attention_replaced = summary.sites.iter().filter(replaced).count() as f64 / depth.max(1) as f64;
        let residuals: Vec<f64> =
            summary.sites.iter().filter_map(|s| s.residual_distilled.map(|r| r.relative)).collect();
        let residual = (!residuals.is_empty()).then(|| residuals.iter().sum::<f64>() / residuals.len() as f64);
        let change = Change::between(&summary.cost_before, &summary.cost_after);
        let distill = Some(summary.distill);
        JobResult {
            operators,
            attention_replaced,
            change,
            residual,
            distill,
            finetune: summary.finetune,
            stages,
            ..JobResult::default()
        }
    }

    pub(super) fn of_control(finetune: Option<StageSummary>, scored: Scored) -> JobResult {
        JobResult { finetune, stages: vec![scored], ..JobResult::default() }
    }

    /// The last model that was sampled.
    pub fn last(&self) -> Option<&Scored> {
        self.stages.last()
    }

    /// Reads a `result.json`.
    ///
    /// # Errors
    /// A file that is damaged.
    pub fn read(path: &Path) -> Result<JobResult> {
        serde_json::from_value(json::read(path)?).map_err(|e| {
            Error::failure(path.display().to_string(), "not a result of a study")
                .is(e)
                .fix("remove the file; the job runs again")
        })
    }

    /// As JSON.
    ///
    /// # Errors
    /// A number that JSON cannot hold.
    pub fn json(&self) -> Result<Value> {
        serde_json::to_value(self).map_err(|e| Error::failure("result", e.to_string()).must("finite numbers"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graft::cost::Counter;
    use crate::graft::plan::tests::plan;
    use crate::models::dit::DitConfig;

    #[test]
    fn changes_are_those_of_the_touched_sites() {
        let base = DitConfig::named("DiT-XL/2").unwrap();
        let change = |site: &str, operator: &str| {
            let text = format!("[[graft]]\nsite = \"{site}\"\nlayers = \"every-other\"\noperator = {operator}\n");
            let assignments = plan(&text).unwrap().resolve(&base).unwrap();
            let after = crate::graft::assemble::grafted_config(&base, &assignments).unwrap();
            Change::between(&Counter::new(&base).model().unwrap(), &Counter::new(&after).model().unwrap())
        };
        let hyena = change("attn", "{ kind = \"hyena_x\" }");
        assert!(
            (hyena.operator_flops + 49.90).abs() < 0.005 && (hyena.operator_params - 0.16).abs() < 0.005,
            "{hyena:?}"
        );
        let mlp = change("mlp", "{ kind = \"mlp\", ratio = 3 }");
        assert!(
            (mlp.operator_flops + 12.5).abs() < 1e-9 && mlp.projection_flops == 0.0 && mlp.flops > -12.5,
            "{mlp:?}"
        );
    }

    #[test]
    fn results_come_back_as_they_went() {
        let score = Score { n: 5, frechet: 1.5, kid: 0.1, precision: 0.5, recall: 0.25, agreement: 1.0 };
        let scored = Scored {
            name: "finetuned".into(),
            score: Some(score),
            loss: Some(0.04),
            seconds_per_image: Some(0.5),
            sheet: vec![],
        };
        let result = JobResult { row: "a".into(), seed: 3, residual: Some(0.5), ..JobResult::of_control(None, scored) };
        let path = crate::io::files::test_dir("science").join("result.json");
        json::write(&path, &result.json().unwrap()).unwrap();
        assert_eq!(JobResult::read(&path).unwrap(), result);
        std::fs::write(&path, "{}").unwrap();
        assert!(JobResult::read(&path).unwrap_err().to_string().contains("not a result of a study"));
    }
}
