//! Low-rank adapters of other programs on a transformer that reads text: PEFT folders and files, and single files in
//! the names of kohya's and OneTrainer's programs.
//!
//! A module is named in diffusers' names or the original's, with dots or with underscores. Adapters of queries, keys and
//! values, which are one matrix here, become one adapter of the sum of their ranks.

use super::open::open;
use super::pixart::{PixArt, diffusers_parts};
use super::source::{Source, read_weight};
use crate::autograd::{Adapter, ParamId};
use crate::error::{Error, Result};
use crate::io::{files, json};
use crate::tensor::Tensor;
use serde_json::Value;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

/// What programs put before a module's name.
const PREFIXES: [&str; 8] = [
    "base_model.model.transformer.",
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "lora_transformer_",
    "lora_unet_",
    "lora_",
    "model.",
];
/// Ends of names: what they hold.
const ENDS: [(&str, Part); 11] = [
    (".lora_A.weight", Part::Down),
    (".lora_B.weight", Part::Up),
    (".lora_A.default.weight", Part::Down),
    (".lora_B.default.weight", Part::Up),
    (".lora_down.weight", Part::Down),
    (".lora_up.weight", Part::Up),
    (".lora.down.weight", Part::Down),
    (".lora.up.weight", Part::Up),
    (".lora_linear_layer.down.weight", Part::Down),
    (".lora_linear_layer.up.weight", Part::Up),
    (".alpha", Part::Alpha),
];

#[derive(Clone, Copy, PartialEq)]
enum Part {
    Down,
    Up,
    Alpha,
}

/// Tensors of one module in a file.
#[derive(Default)]
struct Found {
    down: Option<String>,
    up: Option<String>,
    alpha: Option<f64>,
}

/// A place in a model: a parameter, and the rows of it that a module is.
#[derive(Clone, Copy)]
struct Target {
    id: ParamId,
    part: usize,
    parts: usize,
}

/// Attaches the adapters at `path`, a PEFT folder or a file, to a model whose weights are f32, scaled by `weight` on top
/// of their own scale; returns how many modules they belong to. Modules that were trained in full replace the model's.
///
/// [`crate::nn::lora::merge`] then makes them part of the weights.
///
/// # Errors
/// A module that the model has not, matrices that do not fit, an adapter of another kind, or none at all.
pub fn attach(model: &mut PixArt, path: &Path, weight: f64) -> Result<usize> {
    let opened = open_file(path)?;
    let config = AdapterConfig::beside(path)?;
    let source = opened.as_ref();
    let place = source.place();
    let mut modules: BTreeMap<String, Found> = BTreeMap::new();
    let mut whole = Vec::new();
    for name in source.names() {
        let Some((module, part)) = ENDS.iter().find_map(|(end, part)| Some((name.strip_suffix(end)?, *part))) else {
            if ["magnitude", "hada_", "lokr_", "dora_scale"].iter().any(|kind| name.contains(kind)) {
                return Err(Error::failure(format!("{place}: {name}"), "adapter of another kind")
                    .must("LoRA: two matrices for every module"));
            }
            whole.push(name);
            continue;
        };
        let found = modules.entry(module.to_string()).or_default();
        match part {
            Part::Down => found.down = Some(name),
            Part::Up => found.up = Some(name),
            Part::Alpha => found.alpha = scalar(source, &name)?,
        }
    }
    if modules.is_empty() {
        return Err(Error::failure(&place, "no adapters")
            .is(format!("{} tensors", source.names().len()))
            .must("tensors named lora_A and lora_B, or lora_down and lora_up"));
    }
    let targets = targets(model);
    let find = |module: &str| -> Result<Target> {
        let bare = PREFIXES.iter().find_map(|prefix| module.strip_prefix(prefix)).unwrap_or(module);
        let known = targets.get(&underscored(bare)).or_else(|| targets.get(&underscored(module)));
        known.copied().ok_or_else(|| {
            Error::failure(format!("{place}: {}", files::printable(module)), "the model has no such module")
                .must("a linear layer, such as transformer_blocks.0.attn1.to_q")
                .fix("use an adapter that was made for this transformer")
        })
    };
    // Everything is read and checked before the model changes.
    let mut planned: BTreeMap<ParamId, Vec<(Target, Matrices)>> = BTreeMap::new();
    for (module, found) in &modules {
        let target = find(module)?;
        let matrices = Matrices::read(model, source, module, found, target, (&config, weight))?;
        planned.entry(target.id).or_default().push((target, matrices));
    }
    let mut replaced: BTreeMap<ParamId, Vec<f32>> = BTreeMap::new();
    for name in &whole {
        replace(model, source, name, &mut replaced)?;
    }
    for (id, values) in replaced {
        let shape = model.params.get(id).value.shape();
        model.params.set(id, Tensor::from_f32(model.device(), shape.dims(), &values)?)?;
    }
    for (id, parts) in planned {
        join(model, id, &parts)?;
    }
    Ok(modules.len())
}

fn open_file(path: &Path) -> Result<Box<dyn Source>> {
    let named = path.join("adapter_model.safetensors");
    Ok(open(if named.is_file() { &named } else { path })?.source)
}

fn scalar(source: &dyn Source, name: &str) -> Result<Option<f64>> {
    let Some(tensor) = source.tensor(name) else { return Ok(None) };
    Ok(tensor.values()?.first().map(|v| f64::from(*v)))
}

fn underscored(name: &str) -> String {
    name.replace('.', "_")
}

/// Every linear layer of a model by its names in both layouts, underscored.
fn targets(model: &PixArt) -> BTreeMap<String, Target> {
    let mut targets = BTreeMap::new();
    for (id, param) in model.params.iter().filter(|(_, p)| p.linear) {
        let parts = diffusers_parts(&param.name);
        let bare = |name: &str| underscored(name.strip_suffix(".weight").unwrap_or(name));
        targets.insert(bare(&param.name), Target { id, part: 0, parts: 1 });
        for (part, name) in parts.iter().enumerate() {
            targets.insert(bare(name), Target { id, part, parts: parts.len() });
        }
    }
    targets
}

/// The two matrices of a module, the second with its scale in it.
struct Matrices {
    rank: usize,
    /// `[R, in]`.
    down: Vec<f32>,
    /// `[rows, R]`.
    up: Vec<f32>,
}

impl Matrices {
    fn read(
        model: &PixArt,
        source: &dyn Source,
        module: &str,
        found: &Found,
        target: Target,
        (config, weight): (&AdapterConfig, f64),
    ) -> Result<Matrices> {
        let (Some(down), Some(up)) = (&found.down, &found.up) else {
            return Err(Error::failure(format!("{}: {module}", source.place()), "half of an adapter is missing")
                .must("both of its matrices"));
        };
        let value = &model.params.get(target.id).value;
        let (rows, inputs) = (value.dim(0) / target.parts, value.dim(1));
        let stored = source.tensor(down).map(|t| t.shape().to_vec()).unwrap_or_default();
        let rank = stored.first().copied().unwrap_or(0);
        if rank == 0 {
            return Err(Error::failure(format!("{}: {down}", source.place()), "adapter of rank 0").must("at least 1"));
        }
        // A linear layer may be stored as a convolution of one pixel.
        let shaped =
            |shape: [usize; 2]| if stored.len() == 4 { vec![shape[0], shape[1], 1, 1] } else { shape.to_vec() };
        let scale = (weight * config.scale(module, rank, found.alpha)) as f32;
        let mut up = read_weight(source, up, &shaped([rows, rank]))?;
        up.iter_mut().for_each(|v| *v *= scale);
        Ok(Matrices { rank, down: read_weight(source, down, &shaped([rank, inputs]))?, up })
    }
}

/// Puts a parameter that was trained in full, or a part of one, into the values that will replace the model's.
fn replace(model: &PixArt, source: &dyn Source, name: &str, values: &mut BTreeMap<ParamId, Vec<f32>>) -> Result<()> {
    let bare = PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name);
    for (id, param) in model.params.iter() {
        let parts = if param.name == bare { vec![bare.to_string()] } else { diffusers_parts(&param.name) };
        let Some(part) = parts.iter().position(|part| part == bare) else { continue };
        let mut shape = param.value.shape().dims().to_vec();
        shape[0] /= parts.len();
        let found = read_weight(source, name, &shape)?;
        let whole = match values.entry(id) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(param.value.to_vec()?),
        };
        whole[part * found.len()..][..found.len()].copy_from_slice(&found);
        return Ok(());
    }
    Err(Error::failure(format!("{}: {}", source.place(), files::printable(name)), "unexpected tensor")
        .must("part of an adapter, or a whole parameter of the model"))
}

/// Adds one adapter for all modules of a parameter: ranks one after the other, each on its own rows.
fn join(model: &mut PixArt, id: ParamId, modules: &[(Target, Matrices)]) -> Result<()> {
    let param = model.params.get(id);
    let (name, outputs, inputs) = (param.name.clone(), param.value.dim(0), param.value.dim(1));
    if model.params.adapter(id).is_some() {
        return Err(
            Error::failure(name, "has an adapter already").fix("merge the first adapters before more are added")
        );
    }
    let rank: usize = modules.iter().map(|(_, m)| m.rank).sum();
    let (mut down, mut up, mut first) = (Vec::with_capacity(rank * inputs), vec![0.0f32; outputs * rank], 0);
    for (target, matrices) in modules {
        down.extend_from_slice(&matrices.down);
        let rows = outputs / target.parts;
        for (row, values) in matrices.up.chunks_exact(matrices.rank).enumerate() {
            up[(target.part * rows + row) * rank + first..][..matrices.rank].copy_from_slice(values);
        }
        first += matrices.rank;
    }
    let device = model.device().clone();
    let layer = name.strip_suffix(".weight").unwrap_or(&name);
    let a = Tensor::from_f32(&device, &[rank, inputs], &down)?;
    let b = Tensor::from_f32(&device, &[outputs, rank], &up)?;
    let a = model.params.add(format!("{layer}.lora_A.weight"), a, true);
    let b = model.params.add(format!("{layer}.lora_B.weight"), b, true);
    model.params.attach(id, Adapter { a, b, scale: 1.0 });
    Ok(())
}

/// What PEFT's `adapter_config.json` says of scales.
#[derive(Default)]
struct AdapterConfig {
    alpha: Option<f64>,
    alphas: Vec<(String, f64)>,
    rank_stabilised: bool,
}

impl AdapterConfig {
    fn beside(path: &Path) -> Result<AdapterConfig> {
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new(".")) };
        let file = folder.join("adapter_config.json");
        if !file.is_file() {
            return Ok(AdapterConfig::default());
        }
        let value = json::read(&file)?;
        let place = file.display().to_string();
        let flag = |key: &str| value.get(key).and_then(Value::as_bool).unwrap_or(false);
        let kind = value.get("peft_type").and_then(Value::as_str).unwrap_or("LORA");
        if kind != "LORA" || flag("use_dora") || flag("fan_in_fan_out") {
            return Err(Error::failure(place, "adapter of another kind")
                .is(if kind == "LORA" { "DoRA or turned matrices" } else { kind })
                .must("LORA without use_dora and fan_in_fan_out"));
        }
        let patterns = value.get("alpha_pattern").and_then(Value::as_object);
        let alphas = patterns.into_iter().flatten().filter_map(|(k, v)| Some((k.clone(), v.as_f64()?))).collect();
        let alpha = value.get("lora_alpha").and_then(Value::as_f64);
        Ok(AdapterConfig { alpha, alphas, rank_stabilised: flag("use_rslora") })
    }

    /// Scale of a module's product: α over the rank or its root; 1 where no α is known.
    fn scale(&self, module: &str, rank: usize, own: Option<f64>) -> f64 {
        let fits = |pattern: &str| {
            let pattern = pattern.trim_start_matches('^').trim_end_matches('$');
            module.strip_suffix(pattern).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        let stated = self.alphas.iter().find(|(pattern, _)| fits(pattern)).map(|(_, alpha)| *alpha);
        let Some(alpha) = own.or(stated).or(self.alpha) else { return 1.0 };
        alpha / if self.rank_stabilised { (rank as f64).sqrt() } else { rank as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::{golden, test_dir};
    use crate::io::safetensors::{TensorFile, TensorRecord, write};
    use crate::models::pixart;
    use crate::nn::lora;
    use crate::tensor::Device;

    fn merged(adapter: &Path, weight: f64) -> PixArt {
        let mut model = pixart::load(&golden("lora/attention_only/model/base"), &Device::cpu(), false).unwrap();
        assert_eq!(attach(&mut model, adapter, weight).unwrap(), 16);
        lora::merge(&mut model.params).unwrap();
        model
    }

    fn values(model: &PixArt, name: &str) -> Vec<f32> {
        model.params.get(model.params.find(name).unwrap()).value.to_vec().unwrap()
    }

    /// The same adapter in kohya's names and in the original's gives the same weights.
    #[test]
    fn names_of_other_programs() {
        let folder = golden("lora/attention_only/model/adapter");
        let want = merged(&folder, 1.0);
        let file = TensorFile::open(&folder.join("adapter_model.safetensors")).unwrap();
        let dir = test_dir("lora_names");
        let mut records = Vec::new();
        for tensor in file.iter() {
            let bare = tensor.name.strip_prefix("base_model.model.").unwrap();
            let (module, end) = bare.split_once(".lora_").unwrap();
            let end = if end.starts_with('A') { "lora_down.weight" } else { "lora_up.weight" };
            let name = format!("lora_transformer_{}", module.replace('.', "_"));
            records.push((format!("{name}.{end}"), tensor.shape.to_vec(), tensor.to_f32().unwrap()));
            records.push((format!("{name}.alpha"), vec![1], vec![8.0]));
        }
        records.sort_by(|a, b| a.0.cmp(&b.0));
        records.dedup_by(|a, b| a.0 == b.0);
        let path = dir.join("kohya.safetensors");
        let records = records.iter().map(|(n, s, v)| TensorRecord::f32(n.clone(), s, v));
        write(&path, records, &BTreeMap::new()).unwrap();
        let got = merged(&path, 1.0);
        for name in ["blocks.0.attn.qkv.weight", "blocks.1.cross_attn.kv_linear.weight", "blocks.1.attn.proj.weight"] {
            assert_eq!(values(&got, name), values(&want, name), "{name}");
        }
        // Twice the weight is twice the change.
        let (none, twice) = (merged(&path, 0.0), merged(&path, 2.0));
        let name = "blocks.0.cross_attn.q_linear.weight";
        let parts = values(&none, name).into_iter().zip(values(&want, name)).zip(values(&twice, name));
        for ((base, once), twice) in parts {
            assert!((2.0 * (once - base) - (twice - base)).abs() < 1e-5);
        }
    }

    #[test]
    fn what_does_not_fit_is_named_and_changes_nothing() {
        let dir = test_dir("lora_bad");
        let path = dir.join("a.safetensors");
        let mut model = pixart::load(&golden("lora/attention_only/model/base"), &Device::cpu(), false).unwrap();
        let count = model.params.len();
        let mut refuse = |tensors: &[(&str, &[usize])], word: &str| {
            let values: Vec<Vec<f32>> = tensors.iter().map(|(_, s)| vec![0.5; s.iter().product()]).collect();
            let records = tensors.iter().zip(&values).map(|((n, s), v)| TensorRecord::f32(n.to_string(), s, v));
            write(&path, records, &BTreeMap::new()).unwrap();
            let error = attach(&mut model, &path, 1.0).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
            assert_eq!(model.params.len(), count);
        };
        let q = "transformer.transformer_blocks.0.attn1.to_q";
        refuse(&[("x", &[1])], "no adapters");
        refuse(&[(&format!("{q}.lora_A.weight"), &[2, 32])], "half of an adapter is missing");
        let up = format!("{q}.lora_B.weight");
        refuse(&[(&format!("{q}.lora_A.weight"), &[2, 31]), (&up, &[32, 2])], "wrong shape");
        refuse(
            &[("lora_unet_blocks_9_x.lora_down.weight", &[2, 3]), ("lora_unet_blocks_9_x.lora_up.weight", &[3, 2])],
            "no such module",
        );
        refuse(&[(&format!("{q}.lora_magnitude_vector"), &[32])], "another kind");
    }
}
