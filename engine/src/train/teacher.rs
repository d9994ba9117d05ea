//! Distillation terms of the training loss: a frozen model that sees the same noised images and labels.
//!
//! Its prediction, and what it gives at chosen sites, are targets; nothing is recorded for it. It costs memory: its own
//! parameters, once more the activations of an inference pass, and per chosen site one `[B, N, D]` target; the student
//! then also keeps each of these sites' results on its tape, which a fused step would not.

use super::objective::Noised;
use crate::autograd::{Graph, Var};
use crate::error::Result;
use crate::models::sites::{Observer, Seen, SiteConfig, SiteModel};
use crate::nn::operators::Site;
use crate::ops::contracts::loss_regression;
use crate::tensor::Tensor;
use serde::Serialize;

const SQUARED: loss_regression::Params = loss_regression::Params { kind: 1, delta: 1.0 };

/// A teacher with the weights of its terms.
pub struct Teacher<M: SiteModel> {
    /// The model to stay near to.
    pub model: M,
    /// Weight of the mean squared distance of the predictions.
    pub output: f64,
    /// Weight of the distance at `sites`: squared, relative to the mean square of the teacher's, mean over the sites.
    pub feature: f64,
    /// Sites of the feature term, before their gates.
    pub sites: Vec<(usize, Site)>,
}

/// The parts of a loss, as the log keeps them.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Terms {
    /// The diffusion loss.
    pub diffusion: f64,
    /// Mean squared distance of the predictions, unweighted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_distill: Option<f64>,
    /// Relative squared distance at the sites, unweighted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feature_distill: Option<f64>,
}

/// What the teacher says about a batch.
struct Lesson {
    prediction: Tensor,
    /// In the order of [`Teacher::sites`].
    features: Vec<Tensor>,
}

impl<M: SiteModel> Teacher<M> {
    /// Whether the student must show its sites.
    pub fn watches(&self) -> bool {
        self.feature > 0.0 && !self.sites.is_empty()
    }

    fn place(&self, block: usize, site: Site) -> Option<usize> {
        self.sites.iter().position(|at| *at == (block, site)).filter(|_| self.watches())
    }

    fn teach(&self, noised: &Noised<M::Condition>, g: &Graph<'_>) -> Result<Lesson> {
        let g = Graph::inference(g.precision());
        let x = Var::constant(noised.x_t.clone());
        let mut features = vec![None; if self.watches() { self.sites.len() } else { 0 }];
        let mut observer = |seen: &Seen<'_>| {
            if let Some(i) = self.place(seen.block, seen.site) {
                features[i] = Some(seen.output.tensor().clone());
            }
            Ok(())
        };
        let observer: Option<&mut Observer<'_>> = if self.watches() { Some(&mut observer) } else { None };
        let prediction = self.model.predict(&g, &x, &noised.t, &noised.condition, false, observer)?;
        Ok(Lesson { prediction: prediction.into_tensor(), features: features.into_iter().flatten().collect() })
    }

    /// The terms for a student that predicts `prediction` and gave `features` at the sites: the weighted sum with the
    /// diffusion loss, and the parts.
    fn compare(
        &self,
        g: &Graph<'_>,
        diffusion: &Var,
        prediction: &Var,
        features: &[Option<Var>],
        lesson: &Lesson,
    ) -> Result<(Var, Terms)> {
        let value = |x: &Var| Ok::<_, crate::error::Error>(f64::from(x.tensor().values()?[0]));
        let mut terms = Terms { diffusion: value(diffusion)?, output_distill: None, feature_distill: None };
        let mut parts = vec![(1.0, diffusion.clone())];
        if self.output > 0.0 {
            let term = distance(g, prediction, &lesson.prediction)?;
            terms.output_distill = Some(value(&term)?);
            parts.push((self.output as f32, term));
        }
        if self.watches() {
            let count = self.sites.len() as f64;
            let mut mean = 0.0;
            for (given, wanted) in features.iter().zip(&lesson.features) {
                let Some(given) = given else { continue };
                let size = wanted.values()?.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / wanted.len() as f64;
                // A site whose teacher is silent has no scale of its own.
                let scale = if size > 0.0 { 1.0 / size } else { 1.0 };
                let term = distance(g, given, wanted)?;
                mean += value(&term)? * scale / count;
                parts.push(((self.feature * scale / count) as f32, term));
            }
            terms.feature_distill = Some(mean);
        }
        let weighted: Vec<(f32, &Var)> = parts.iter().map(|(factor, term)| (*factor, term)).collect();
        Ok((g.weighted_sum(&weighted)?, terms))
    }
}

/// Mean squared distance.
fn distance(g: &Graph<'_>, given: &Var, wanted: &Tensor) -> Result<Var> {
    let rows = |len: usize| [given.dim(0), 1, len / given.dim(0)];
    let shape = rows(wanted.len());
    g.loss_regression(&g.reshape(given, &shape)?, &Var::constant(wanted.reshape(&shape)?), SQUARED)
}

/// The loss of a model on a noised batch with the terms of its teacher, a scalar on the graph.
///
/// # Errors
/// When a shape does not fit.
pub fn taught_loss<'m, M: SiteModel>(
    g: &Graph<'m>,
    model: &'m M,
    noised: &Noised<M::Condition>,
    checkpoint: bool,
    teacher: &Teacher<M>,
) -> Result<(Var, Terms)> {
    let lesson = teacher.teach(noised, g)?;
    let x = Var::constant(noised.x_t.clone());
    let mut features = vec![None; lesson.features.len()];
    let prediction = if teacher.watches() {
        let mut observer = |seen: &Seen<'_>| {
            if let Some(i) = teacher.place(seen.block, seen.site) {
                features[i] = Some(seen.output.clone());
            }
            Ok(())
        };
        model.predict(g, &x, &noised.t, &noised.condition, checkpoint, Some(&mut observer))?
    } else {
        model.predict(g, &x, &noised.t, &noised.condition, checkpoint, None)?
    };
    let diffusion = noised.loss(g, &prediction, model.config().learns_variance())?;
    teacher.compare(g, &diffusion, &prediction, &features, &lesson)
}
