//! The layers of patterns that depend on what the base model does.
//!
//! | pattern | measured | chosen |
//! |---|---|---|
//! | `top-local:n`, `low-local:n` | locality of attention, see [`super::locality`] | the n highest, the n lowest |
//! | `auto:ratio` | also a short stage 1 over all candidates | the lowest held-out residuals |
//!
//! Residuals that agree to a hundredth count as equal; the more local layer goes first then, and at last the earlier
//! one. The protocol is the plan's `[select]`; everything is seeded, so that a choice can be made again. A layer whose
//! site another graft claims is no candidate, and measured grafts choose in the order of the plan. What was chosen is
//! kept in the run folder.

use super::assemble;
use super::distill::Distiller;
use super::locality::{self, Locality, Protocol};
use super::plan::{Assignment, Graft, Plan, operator};
use super::run::RunData;
use super::select::{Layers, Measured};
use super::settings::DistillConfig;
use crate::error::{Error, Result};
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
            let layers = self.plan.layers(graft, depth)?;
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
mod tests {
    use super::*;
    use crate::graft::plan::tests::plan;
    use crate::io::datasets::ImageSet;
    use crate::io::files::test_dir;
    use crate::models::dit::DitConfig;
    use crate::tensor::Device;
    use graft_kernels::rng::Philox;

    #[test]
    fn ranks_by_hand() {
        let locality = [Some(0.5), None, Some(0.9), Some(0.1), Some(0.5)];
        assert_eq!(by_locality((0..5).collect(), &locality, true), [2, 0, 4, 3]);
        assert_eq!(by_locality((0..5).collect(), &locality, false), [3, 0, 4, 2]);
        // 0.301 and 0.304 count as equal, so that the more local layer goes first; layer 1 was not measured.
        let residuals = [Some(0.301), None, Some(0.304), Some(0.2), Some(0.9)];
        assert_eq!(by_residual((0..5).collect(), &residuals, &locality), [3, 2, 0, 4]);
    }

    fn base() -> Dit {
        let sizes = DitConfig { patch: 2, input_size: 8, in_channels: 1, classes: 3, ..DitConfig::plain(4, 16, 2) };
        let mut model = Dit::new(sizes, &Device::cpu(), 1).unwrap();
        let ids: Vec<_> = model.params.iter().filter(|(_, p)| p.trainable).map(|(id, _)| id).collect();
        for id in ids {
            let mut value = model.params.get(id).value.copy().unwrap();
            let mut noise = vec![0.0; value.len()];
            Philox::new(2, id.index() as u64).fill_normal(&mut noise);
            value.f32s_mut().unwrap().iter_mut().zip(&noise).for_each(|(v, n)| *v += 0.1 * n);
            model.params.set(id, value).unwrap();
        }
        model
    }

    fn data() -> RunData {
        let images = |n: usize, seed| {
            let mut rng = Philox::new(seed, 0);
            let pixels = (0..64 * n).map(|_| rng.below(256) as u8).collect();
            let labels = (0..n).map(|i| (i % 3) as u8).collect();
            ImageSet { n, channels: 1, height: 8, width: 8, pixels, labels, class_names: vec!["a", "b", "c"] }
        };
        RunData { train: images(16, 1), held_out: images(8, 2) }
    }

    fn graft(layers: &str, operator: &str) -> String {
        format!("[[graft]]\nsite = \"attn\"\nlayers = \"{layers}\"\noperator = {{ kind = \"{operator}\" }}\n")
    }

    const SELECT: &str = "[distill]\nheld_out = 1\n[select]\nsamples = 3\nsteps = 2\nupdates = 3\nbatch = 4\n";

    fn chosen(text: &str, folder: Option<&Path>) -> Result<Vec<Vec<usize>>> {
        let plan = plan(&(text.to_string() + SELECT))?;
        let decided = choose(&plan, &base(), folder, Some(&data()), &mut |_| ControlFlow::Continue(()))?.unwrap();
        let sites = decided.resolve(&base().config)?.len();
        let layers: Vec<Vec<usize>> = decided.chosen().into_iter().map(|(.., layers)| layers).collect();
        assert_eq!(sites, layers.iter().map(Vec::len).sum::<usize>() + text.matches("deep:1").count());
        Ok(layers)
    }

    #[test]
    fn the_most_and_the_least_local_layers_share_the_model() {
        let select = plan(&(graft("all", "mha") + SELECT)).unwrap().select;
        let protocol =
            Protocol { samples: select.samples, steps: select.steps, guidance: select.guidance, seed: select.seed };
        let band = locality::measured(&base(), protocol, &[], &[], &mut |_, _| {}).unwrap().band(2);
        let order = by_locality((0..4).collect(), &band, true);
        let sorted = |layers: &[usize]| {
            let mut layers = layers.to_vec();
            layers.sort_unstable();
            layers
        };
        // 16 tokens: the band is 2 wide.
        let both = graft("top-local:1", "hyena_x") + &graft("low-local:3", "mha");
        assert_eq!(chosen(&both, None).unwrap(), [vec![order[0]], sorted(&order[1..])]);
        // A layer that another graft claims is no candidate.
        let rest = graft("low-local:3", "hyena_x") + &graft("deep:1", "mha");
        assert_eq!(chosen(&rest, None).unwrap(), [[0, 1, 2]]);
        let message = chosen(&(graft("low-local:4", "hyena_x") + &graft("deep:1", "mha")), None).unwrap_err();
        let message = message.to_string();
        assert!(message.starts_with("plan.toml:8:10: more layers than there are"), "{message}");
        assert!(message.contains("must be at most 3"), "{message}");
    }

    #[test]
    fn an_automatic_choice_is_kept_and_can_be_made_again() {
        let (first, second) = (test_dir("auto1"), test_dir("auto2"));
        let text = graft("auto:0.5", "hyena_x");
        let layers = chosen(&text, Some(&first)).unwrap();
        assert_eq!(layers[0].len(), 2);
        assert_eq!(chosen(&text, Some(&second)).unwrap(), layers);
        let kept = read(&first.join(FILE)).unwrap();
        let found = kept.choices[0].residuals.clone().unwrap();
        assert_eq!(found, read(&second.join(FILE)).unwrap().choices[0].residuals.clone().unwrap());
        // The residuals say why: no layer that was left has a smaller one by more than a hundredth.
        let worst = layers[0].iter().map(|l| found[*l].unwrap()).fold(0.0, f64::max);
        let left = (0..4).filter(|l| !layers[0].contains(l)).map(|l| found[l].unwrap()).fold(9.0, f64::min);
        assert!(worst <= left + 0.01, "{found:?} {layers:?}");
        // What the folder keeps is taken without measuring.
        let plan = plan(&(text.clone() + SELECT)).unwrap();
        let kept = super::kept(&plan, &first).unwrap();
        assert_eq!(kept.chosen()[0].2, layers[0]);
        let again = choose(&plan, &base(), Some(&first), None, &mut |_| ControlFlow::Break(())).unwrap().unwrap();
        assert_eq!(again.chosen(), kept.chosen());
        // Without a folder there is no place for a short stage 1.
        let message = chosen(&text, None).unwrap_err().to_string();
        assert!(message.contains("decided by a short stage 1") && message.contains("--run DIR"), "{message}");
    }

    #[test]
    fn a_choice_that_is_broken_off_goes_on() {
        let (whole, broken) = (test_dir("auto-whole"), test_dir("auto-broken"));
        let text = graft("auto:0.25", "hyena_x");
        let layers = chosen(&text, Some(&whole)).unwrap();
        let plan = plan(&(text.clone() + SELECT)).unwrap();
        let stopped = choose(&plan, &base(), Some(&broken), Some(&data()), &mut |_| ControlFlow::Break(())).unwrap();
        assert!(stopped.is_none() && !broken.join(FILE).exists());
        assert_eq!(chosen(&text, Some(&broken)).unwrap(), layers);
        let residuals = |dir: &Path| read(&dir.join(FILE)).unwrap().choices[0].residuals.clone();
        assert_eq!(residuals(&whole), residuals(&broken));
    }
}
