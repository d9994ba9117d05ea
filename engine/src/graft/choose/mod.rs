//! The layers of patterns that depend on what the base model does.
//!
//! | pattern | measured | chosen |
//! |---|---|---|
//! | `top-local:n`, `low-local:n` | locality of attention, see [`crate::graft::locality`] | the n highest, the n lowest |
//! | `auto:ratio` | also a short stage 1 over all candidates | the lowest held-out residuals |
//!
//! Residuals that agree to a hundredth count as equal; the more local layer goes first then, and at last the earlier
//! one. The protocol is the plan's `[select]`; everything is seeded, so that a choice can be made again. A layer whose
//! site another graft claims is no candidate, and measured grafts choose in the order of the plan. What was chosen is
//! kept in the run folder.

use crate::error::{Error, Result};
use crate::graft::assemble;
use crate::graft::distill::Distiller;
use crate::graft::locality::{self, Locality, Protocol};
use crate::graft::plan::{Assignment, Graft, Plan, operator};
use crate::graft::run::RunData;
use crate::graft::select::{Layers, Measured};
use crate::graft::settings::DistillConfig;
use crate::io::{hash, json};
use crate::models::dit::Dit;
use crate::nn::operators::Site;
use crate::train::optimizer::AdamWSettings;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;

/// Name of the file in a run folder that keeps what was chosen.
pub const FILE: &str = "layers.json";
/// Folder in a run folder for the short stages 1.
const FOLDER: &str = "select";

/// Layers that were chosen for a graft, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// Number of the graft in the plan, from 0.
    pub graft: usize,
    /// Its site.
    pub site: Site,
    /// Its pattern.
    pub pattern: String,
    /// The layers, in rising order.
    pub layers: Vec<usize>,
    /// Half width of the band.
    pub k: usize,
    /// L_k of every layer; none where its operator is not attention.
    pub locality: Vec<Option<f64>>,
    /// Relative held-out residual of every candidate after the short stage 1, where there was one.
    pub residuals: Option<Vec<Option<f64>>>,
}

/// What a run folder keeps.
#[derive(Serialize, Deserialize)]
struct Kept {
    fingerprint: String,
    choices: Vec<Choice>,
}

/// How far a choice is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being measured: `locality` or `residuals`.
    pub what: &'static str,
    /// Steps done.
    pub done: u64,
    /// Steps in all.
    pub total: u64,
}

/// Receives progress; breaking stops after a checkpoint.
pub type Report<'r> = dyn FnMut(Progress) -> ControlFlow<()> + Send + 'r;

/// The plan with the layers that its run folder keeps, where it has any to keep.
///
/// # Errors
/// A damaged file.
pub fn kept(plan: &Plan, dir: &Path) -> Result<Plan> {
    let path = dir.join(FILE);
    if !plan.needs_choice() || !path.exists() {
        return Ok(plan.clone());
    }
    Ok(decided(plan, &read(&path)?.choices))
}

fn read(path: &Path) -> Result<Kept> {
    serde_json::from_value(json::read(path)?).map_err(|e| {
        Error::failure(path.display().to_string(), format!("not a choice of layers: {e}"))
            .fix("remove the file; the layers are chosen again then")
    })
}

fn decided(plan: &Plan, choices: &[Choice]) -> Plan {
    let mut plan = plan.clone();
    for choice in choices {
        if let Some(graft) = plan.grafts.get_mut(choice.graft) {
            graft.chosen = Some(choice.layers.clone());
        }
    }
    plan
}

impl Plan {
    /// Patterns that the base model has decided, each with its site and layers.
    pub fn chosen(&self) -> Vec<(Site, String, Vec<usize>)> {
        let chosen = |g: &Graft| Some((g.site, pattern(g), g.chosen.clone()?));
        self.grafts.iter().filter_map(chosen).collect()
    }
}

fn pattern(graft: &Graft) -> String {
    match graft.layers.get_ref() {
        Layers::Pattern(name) => name.clone(),
        Layers::List(_) => String::new(),
    }
}

/// The plan with all its layers: those of measured patterns are taken from `folder` where it keeps them, and measured
/// and kept there otherwise. Nothing where `report` broke off.
///
/// `data` is needed for `auto:ratio` alone, and so is a folder.
///
/// # Errors
/// A base without attention, fewer candidates than layers asked for, or those of stage 1.
pub fn choose(
    plan: &Plan,
    base: &Dit,
    folder: Option<&Path>,
    data: Option<&RunData>,
    report: &mut Report<'_>,
) -> Result<Option<Plan>> {
    if !plan.needs_choice() {
        return Ok(Some(plan.clone()));
    }
    let fingerprint = hash::sha256(format!("{} {}", plan.identity(), assemble::digest(base)?).as_bytes());
    let file = folder.map(|f| f.join(FILE));
    if let Some(file) = file.as_ref().filter(|f| f.exists()) {
        let kept = read(file)?;
        if kept.fingerprint == fingerprint {
            return Ok(Some(decided(plan, &kept.choices)));
        }
    }
    let chooser = Chooser { plan, base, folder, data, locality: measure(plan, base, folder, report)?, fingerprint };
    let Some(choices) = chooser.all(report)? else { return Ok(None) };
    let decided = decided(plan, &choices);
    if let Some(file) = file {
        let kept = Kept { fingerprint: chooser.fingerprint, choices };
        json::write(&file, &serde_json::to_value(kept).map_err(|e| Error::failure("layers", e.to_string()))?)?;
    }
    Ok(Some(decided))
}

fn measure(plan: &Plan, base: &Dit, folder: Option<&Path>, report: &mut Report<'_>) -> Result<Locality> {
    let s = plan.select;
    let protocol = Protocol { samples: s.samples, steps: s.steps, guidance: s.guidance, seed: s.seed };
    let mut files = vec![plan.base.join(locality::FILE)];
    files.extend(folder.map(|f| f.join(locality::FILE)));
    let files: Vec<&Path> = files.iter().map(AsRef::as_ref).collect();
    locality::measured(base, protocol, &[], &files, &mut |done, total| {
        // A sampling of seconds leaves nothing half-done: it is not broken off in between.
        let _ = report(Progress { what: "locality", done, total });
    })
}

struct Chooser<'c> {
    plan: &'c Plan,
    base: &'c Dit,
    folder: Option<&'c Path>,
    data: Option<&'c RunData>,
    locality: Locality,
    fingerprint: String,
}

impl Chooser<'_> {
    fn all(&self, report: &mut Report<'_>) -> Result<Option<Vec<Choice>>> {
        let depth = self.base.config.depth();
        let mut claimed: BTreeSet<(Site, usize)> = BTreeSet::new();
        for graft in self.plan.grafts.iter().filter(|g| g.measured.is_none()) {
            let layers = self.plan.layers(graft, graft.site.count(depth))?;
            claimed.extend(layers.into_iter().map(|(layer, _)| (graft.site, layer)));
        }
        let k = self.plan.select.band(self.base.config.tokens());
        let locality = self.locality.band(k);
        let mut choices = Vec::new();
        for (index, graft) in self.plan.grafts.iter().enumerate() {
            let Some(measured) = graft.measured else { continue };
            let free: Vec<usize> = (0..depth).filter(|layer| !claimed.contains(&(graft.site, *layer))).collect();
            let mut residuals = None;
            let ranked = match measured {
                Measured::TopLocal(_) => by_locality(free, &locality, true),
                Measured::LowLocal(_) => by_locality(free, &locality, false),
                Measured::Auto(_) => {
                    let Some(found) = self.residuals(index, graft, &free, report)? else { return Ok(None) };
                    let ranked = by_residual(free, &found, &locality);
                    residuals = Some(found);
                    ranked
                }
            };
            let count = measured.count(depth);
            if count > ranked.len() {
                return Err(self.plan.layers_error(graft, "more layers than there are to choose from").must(format!(
                    "at most {}: layers that no other graft claims and that can be measured",
                    ranked.len()
                )));
            }
            let mut layers = ranked[..count].to_vec();
            layers.sort_unstable();
            claimed.extend(layers.iter().map(|layer| (graft.site, *layer)));
            let (site, pattern, locality) = (graft.site, pattern(graft), locality.clone());
            choices.push(Choice { graft: index, site, pattern, layers, k, locality, residuals });
        }
        Ok(Some(choices))
    }

    /// Held-out residual of every candidate after a short stage 1 over all of them.
    fn residuals(
        &self,
        index: usize,
        graft: &Graft,
        candidates: &[usize],
        report: &mut Report<'_>,
    ) -> Result<Option<Vec<Option<f64>>>> {
        let (Some(folder), Some(data)) = (self.folder, self.data) else {
            return Err(self
                .plan
                .layers_error(graft, "these layers are decided by a short stage 1")
                .must("a run folder that keeps it, and the data")
                .fix("give --run DIR"));
        };
        let (plan, s) = (self.plan, self.plan.select);
        let optimizer =
            AdamWSettings { warmup: plan.distill.optimizer.warmup.min(s.updates / 10), ..plan.distill.optimizer };
        let (steps, batch, seed) = (s.updates, s.batch, s.seed);
        let config = DistillConfig { steps, batch, seed, checkpoint_every: steps, optimizer, ..plan.distill.clone() };
        let spec = operator(graft.operator.get_ref(), graft.site, self.base.config.block_dims())?.spec();
        let assignments: Vec<Assignment> = candidates
            .iter()
            .map(|block| Assignment {
                start: *graft.start.get_ref(),
                loss: graft.loss,
                ..Assignment::new(*block, graft.site, spec.clone())
            })
            .collect();
        let fingerprint = hash::sha256(format!("{} select {index}", self.fingerprint).as_bytes());
        let folder = folder.join(FOLDER).join(index.to_string());
        let mut distiller = Distiller::open(self.base, &assignments, &config, &folder, fingerprint)?;
        distiller.run(&data.train, &data.held_out, &mut |p| {
            report(Progress { what: "residuals", done: p.step, total: p.steps })
        })?;
        if distiller.step() < steps {
            return Ok(None);
        }
        let found = distiller.residuals(&data.held_out)?;
        let mut residuals = vec![None; self.base.config.depth()];
        for a in &assignments {
            residuals[a.block] = found.get(&a.to_string()).map(|r| r.relative);
        }
        Ok(Some(residuals))
    }
}

/// Layers whose attention can be measured, the most (or least) local first.
fn by_locality(mut layers: Vec<usize>, locality: &[Option<f64>], highest: bool) -> Vec<usize> {
    layers.retain(|layer| locality[*layer].is_some());
    let sign = if highest { -1.0 } else { 1.0 };
    let key = |layer: &usize| sign * locality[*layer].unwrap_or_default();
    layers.sort_by(|a, b| key(a).total_cmp(&key(b)));
    layers
}

/// Layers with the lowest residual to a hundredth first; among equals the more local one.
fn by_residual(mut layers: Vec<usize>, residuals: &[Option<f64>], locality: &[Option<f64>]) -> Vec<usize> {
    layers.retain(|layer| residuals[*layer].is_some());
    let coarse = |layer: usize| (100.0 * residuals[layer].unwrap_or_default()).round();
    let local = |layer: usize| locality[layer].unwrap_or_default();
    layers.sort_by(|a, b| coarse(*a).total_cmp(&coarse(*b)).then(local(*b).total_cmp(&local(*a))));
    layers
}

#[cfg(test)]
mod tests;
