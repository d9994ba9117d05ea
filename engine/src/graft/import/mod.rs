//! The authors' YAML configurations as plans (github.com/keshik6/grafting).
//!
//! A configuration says for one operator and one site: `operator: {type, name, config_filepath}`, and either
//! `sample_config` (a grafted checkpoint to be sampled), or `train_config` beside `train` (stage 1 without
//! `graft_indexes`, stage 2 with them). What a plan has no place for, and what contradicts itself, is a warning with
//! its line and column: the released configurations contain several of the latter.

mod operator;

use super::plan::Plan;
use crate::error::{Error, Result};
use crate::io::files;
use crate::io::yaml::{self, Node};
use crate::models::dit::DitConfig;
use crate::nn::operators::Site;
use std::path::Path;

/// A plan made from a configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Imported {
    /// Text of the plan.
    pub plan: String,
    /// What to look at before it is run.
    pub warnings: Vec<String>,
}

/// Keys that a plan has no use for: places of the authors' machines, and what the engine decides by itself.
const UNUSED: [&str; 13] = [
    "samples_save_dir",
    "tar_str_indexes",
    "num_samples_per_class",
    "train_scions",
    "selected_image_paths_file",
    "return_tuple_keys",
    "shuffle",
    "train_subset",
    "sha_key",
    "warmup_epochs",
    "batch_size_per_gpu",
    "init_type",
    "image_size",
];

/// What is known while a configuration is read.
struct Reader<'r> {
    file: &'r str,
    warnings: Vec<String>,
}

impl Reader<'_> {
    fn warn(&mut self, at: &Node, text: impl std::fmt::Display) {
        self.warnings.push(format!("{}: {text}", at.place(self.file)));
    }

    fn refuse(&self, at: &Node, problem: impl Into<String>) -> Error {
        let error = Error::usage(at.place(self.file), problem);
        match at.text() {
            Some(text) => error.is(format!("{text:?}")),
            None => error,
        }
    }

    /// A part that must be there and be a map.
    fn map<'n>(&self, parent: &'n Node, key: &str) -> Result<&'n Node> {
        match parent.get(key) {
            Some(node) if node.entries().is_some() => Ok(node),
            Some(node) => Err(self.refuse(node, format!("{key} is not a map"))),
            None => Err(self.refuse(parent, format!("{key} is missing")).must("a configuration of the released code")),
        }
    }

    /// A number that is there or not.
    fn number(&self, parent: &Node, key: &str) -> Result<Option<f64>> {
        let Some(node) = parent.get(key).filter(|n| !n.is_none()) else { return Ok(None) };
        node.number().map(Some).ok_or_else(|| self.refuse(node, format!("{key} is not a number")))
    }

    /// A positive whole number that is there or not.
    fn whole(&self, parent: &Node, key: &str) -> Result<Option<u64>> {
        let Some(node) = parent.get(key).filter(|n| !n.is_none()) else { return Ok(None) };
        let whole = node.whole().filter(|n| *n <= 1 << 40);
        whole.map(Some).ok_or_else(|| self.refuse(node, format!("{key} is not a whole number")))
    }

    /// Warns of every key of a map that is not known.
    fn unknown_keys(&mut self, map: &Node, known: &[&str]) {
        for (key, _) in map.entries().unwrap_or_default() {
            let name = key.text().unwrap_or_default();
            if !known.contains(&name) && !UNUSED.contains(&name) {
                self.warn(key, format!("unknown key {name} is left out"));
            }
        }
    }
}

/// Reads a configuration; `base` is the model that the plan shall name.
///
/// # Errors
/// A file that is no configuration of the released code, an operator that this version does not have, or a layer that
/// the model does not have.
pub fn read(config: &Path, base: Option<&Path>) -> Result<Imported> {
    let text = files::read_text(config)?;
    let folder = config.parent().unwrap_or(Path::new("."));
    import(&config.display().to_string(), &text, folder, base)
}

fn import(file: &str, text: &str, folder: &Path, base: Option<&Path>) -> Result<Imported> {
    let root = yaml::parse(file, text)?;
    let mut r = Reader { file, warnings: Vec::new() };
    r.unknown_keys(&root, &["operator", "sample_config", "train_config", "train", "val"]);
    let (settings, is_sample) = match root.get("sample_config") {
        Some(_) => (r.map(&root, "sample_config")?, true),
        None => (r.map(&root, "train_config")?, false),
    };
    let model = model(&mut r, settings)?;
    let found = operator::read(&mut r, &root, folder, &model)?;
    let mut plan = format!("# Imported from {}.\n", files::file_name(Path::new(file)));
    plan += &format!("[base]\nmodel = {}\n", quoted(&base_path(&mut r, settings, base)));
    let layers = layers(&mut r, settings)?;
    plan += &format!("\n[[graft]]\nsite = \"{}\"\nlayers = {}\n", found.site, layers.as_deref().unwrap_or("\"all\""));
    plan += &format!("operator = {}\n", found.text);
    plan += &data(&mut r, &root)?;
    plan += &match (is_sample, &layers) {
        (true, _) => sample(&mut r, settings)?,
        (false, None) => stage1(&mut r, &root, settings, found.site)?,
        (false, Some(_)) => stage2(&mut r, &root, settings)?,
    };
    // The text must be a plan that this model can take; what is wrong with it is wrong in the configuration.
    Plan::parse(file, plan.clone())
        .and_then(|plan| plan.resolve(&model))
        .map_err(|e| Error::usage(file, "makes no plan").is(e))?;
    Ok(Imported { plan, warnings: r.warnings })
}

fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

/// The model that a configuration is for; stage 1 does not say.
fn model(r: &mut Reader<'_>, settings: &Node) -> Result<DitConfig> {
    let mut model = match settings.get("dit_model_name") {
        Some(name) => {
            let text = name.text().unwrap_or_default();
            DitConfig::named(text).map_err(|e| e.context(name.place(r.file)))?
        }
        None => DitConfig::named("DiT-XL/2")?,
    };
    if let Some(size) = r.whole(settings, "image_size")? {
        // The autoencoder shrinks pictures eightfold.
        model.input_size = usize::try_from(size / 8).unwrap_or(0);
        model.check().map_err(|e| e.context(settings.place(r.file)))?;
    }
    if let Some(init) = settings.get("init_type").filter(|i| i.text() != Some("graft")) {
        r.warn(init, "init_type is not graft: a plan always starts from the base model");
    }
    Ok(model)
}

fn base_path(r: &mut Reader<'_>, settings: &Node, base: Option<&Path>) -> String {
    if let Some(base) = base {
        return base.display().to_string();
    }
    if let Some(path) = settings.get("dit_ckpt_path").filter(|p| !p.is_none()).and_then(Node::text) {
        return path.to_string();
    }
    r.warn(settings, "the configuration names no base model file: give --base, or correct [base] of the plan");
    "DiT-XL-2-256x256.pt".to_string()
}

/// The layers of `graft_indexes` as they go into the plan; none where there is no such list.
fn layers(r: &mut Reader<'_>, settings: &Node) -> Result<Option<String>> {
    let Some(indexes) = settings.get("graft_indexes") else {
        if let Some(weights) = settings.get("graft_weights") {
            r.warn(weights, "graft_weights without graft_indexes is left out");
        }
        return Ok(None);
    };
    let items = indexes.items().ok_or_else(|| r.refuse(indexes, "graft_indexes is not a list"))?;
    let mut layers = Vec::new();
    for item in items {
        let layer = item.whole().ok_or_else(|| r.refuse(item, "a layer that is not a whole number"))?;
        if layers.contains(&layer) {
            r.warn(item, format!("layer {layer} stands twice in graft_indexes"));
        } else {
            layers.push(layer);
        }
    }
    if let Some(weights) = settings.get("graft_weights").filter(|w| !w.is_none()) {
        check_weights(r, weights, &layers);
    }
    Ok(Some(format!("{layers:?}")))
}

/// Looks for what goes wrong in the released code's own reading of `graft_weights`; a plan does not use them.
fn check_weights(r: &mut Reader<'_>, weights: &Node, layers: &[u64]) {
    let entries: Vec<(Node, Node)> = match (weights.entries(), weights.items()) {
        (Some(entries), _) => entries.to_vec(),
        (None, Some(items)) => {
            r.warn(
                weights,
                "graft_weights is a list of one-key maps, in which the released code finds no layer: it would leave \
                 the operators random; read as one map",
            );
            items.iter().flat_map(|item| item.entries().unwrap_or_default().to_vec()).collect()
        }
        _ => return r.warn(weights, "graft_weights is neither a map nor a list of maps"),
    };
    let mut named = Vec::new();
    for (key, path) in &entries {
        let Some(layer) = key.whole() else {
            r.warn(key, "a key of graft_weights that is not a layer");
            continue;
        };
        named.push(layer);
        if !layers.contains(&layer) {
            r.warn(key, format!("graft_weights names layer {layer}, which graft_indexes does not"));
        }
        let of = path.text().and_then(block_of);
        if let Some(other) = of.filter(|other| *other != layer) {
            r.warn(path, format!("layer {layer} is given the weights of block {other}"));
        }
    }
    for layer in layers.iter().filter(|layer| !named.contains(layer)) {
        r.warn(weights, format!("graft_indexes names layer {layer}, for which graft_weights has nothing"));
    }
    r.warn(weights, "weights of stage 1 are not taken over: the plan's own stage 1 trains them");
}

/// The number in `…/block_7/…`.
fn block_of(path: &str) -> Option<u64> {
    path.split('/').find_map(|part| part.strip_prefix("block_")?.parse().ok())
}

fn data(r: &mut Reader<'_>, root: &Node) -> Result<String> {
    let dir = root.get("train").and_then(|t| t.get("tar_dir")).and_then(Node::text).unwrap_or("data");
    r.warn(root, "the data is ImageNet in the authors' archives: put a data set that this program reads into [data]");
    Ok(format!("\n[data]\nkind = \"imagenet-latents\"\ndir = {}\n", quoted(dir)))
}

fn sample(r: &mut Reader<'_>, settings: &Node) -> Result<String> {
    let known =
        ["init_type", "global_seed", "dit_model_name", "grafted_dit_ckpt_path", "graft_indexes", "graft_weights"];
    r.unknown_keys(settings, &known);
    if let Some(path) = settings.get("grafted_dit_ckpt_path").filter(|p| !p.is_none()) {
        r.warn(path, "the grafted checkpoint is no part of a plan; a plan makes its own");
    }
    Ok(match r.whole(settings, "global_seed")? {
        Some(seed) => format!("\n[eval]\nseed = {seed}\n"),
        None => String::new(),
    })
}

/// Updates, images an update, and the optimiser: what both stages share.
fn training(r: &mut Reader<'_>, root: &Node, settings: &Node) -> Result<(String, String)> {
    let train = r.map(root, "train")?;
    let known = ["tar_dir", "num_workers", "num_samples", "batch_size", "operator_type"];
    r.unknown_keys(train, &known);
    if let Some(val) = root.get("val") {
        r.unknown_keys(val, &known);
    }
    let get = |key| r.whole(train, key);
    let (samples, batch, workers) = (get("num_samples")?, get("batch_size")?, get("num_workers")?);
    let mut text = String::new();
    if let (Some(samples), Some(batch)) = (samples, batch) {
        let batch = batch.saturating_mul(workers.unwrap_or(1));
        if batch == 0 {
            return Err(r.refuse(train, "a batch of no images"));
        }
        if let Some(epochs) = r.whole(settings, "epochs")? {
            text += &format!("steps = {}\n", epochs.saturating_mul(samples.div_ceil(batch)));
        }
        text += &format!("batch = {batch}\n");
        if workers.is_some_and(|w| w > 1) {
            r.warn(
                train,
                format!(
                    "batch = {batch} is batch_size times num_workers; the released code has that only with as many \
                         processes"
                ),
            );
        }
    }
    if let Some(seed) = r.whole(settings, "global_seed")? {
        text += &format!("seed = {seed}\n");
    }
    let mut optimiser = Vec::new();
    for (key, field) in [("initial_learning_rate", "lr"), ("wd", "weight_decay"), ("clip_norm_val", "clip")] {
        if let Some(value) = r.number(settings, key)? {
            optimiser.push(format!("{field} = {}", toml::Value::from(value)));
        }
    }
    Ok((text, format!("optimizer = {{ {} }}\n", optimiser.join(", "))))
}

const TRAINING_KEYS: [&str; 9] = [
    "initial_learning_rate",
    "wd",
    "epochs",
    "global_seed",
    "clip_norm_val",
    "min_learning_rate",
    "dit_model_name",
    "dit_ckpt_path",
    "graft_indexes",
];

fn stage1(r: &mut Reader<'_>, root: &Node, settings: &Node, site: Site) -> Result<String> {
    r.unknown_keys(settings, &TRAINING_KEYS);
    if let Some(least) = settings.get("min_learning_rate") {
        r.warn(least, "the released code halves the rate at epochs 50, 100 and 150 and on plateaus; the plan keeps it");
    }
    r.warn(settings, "a configuration of stage 1 names no layers, its command line does: the plan takes all of them");
    let other = root.get("train").and_then(|t| t.get("operator_type"));
    let want = if site == Site::Attn { "mha" } else { "mlp" };
    if let Some(other) = other.filter(|o| o.text() != Some(want)) {
        r.warn(other, format!("operator_type does not fit the operator, whose site is {site}"));
    }
    let (text, optimiser) = training(r, root, settings)?;
    Ok(format!("\n[distill]\n{text}{optimiser}"))
}

fn stage2(r: &mut Reader<'_>, root: &Node, settings: &Node) -> Result<String> {
    let known: Vec<&str> = TRAINING_KEYS.into_iter().chain(["graft_weights"]).collect();
    r.unknown_keys(settings, &known);
    let (text, optimiser) = training(r, root, settings)?;
    Ok(format!("\n[finetune]\n{text}{optimiser}"))
}

#[cfg(test)]
mod tests;
