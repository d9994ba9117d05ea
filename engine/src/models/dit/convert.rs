//! Conversion of a model from one layout to another, without loss.

use super::load::open;
use super::save::{SaveAs, is_positions, save_in};
use super::{Assumed, DitConfig, Layout};
use crate::error::{Error, Result};
use crate::io::atomic;
use crate::models::folder::OPERATORS_KEY;
use crate::models::source::Source;
use crate::nn::operators::OptionValue;
use crate::tensor::Device;
use std::collections::BTreeMap;
use std::path::Path;

/// What a conversion writes.
#[derive(Clone, Debug)]
pub struct Conversion {
    /// Names of the tensors.
    pub layout: Layout,
    /// Element type; as the checkpoint has it where not given.
    pub dtype: Option<SaveAs>,
    /// Values of options that the checkpoint leaves open, by the option's name.
    pub options: BTreeMap<String, f64>,
    /// Metadata for keys that the checkpoint has not.
    pub extra: BTreeMap<String, String>,
}

/// Writes the model at `from` as the folder `to`, all or nothing; returns its description, the element type that was
/// written, and the options for which the published values were taken.
///
/// Metadata of the checkpoint, a plan above all, is kept. Without a change of the element type, converting there and
/// back gives the same tensors to the bit.
///
/// # Errors
/// Those of [`super::load()`]; a folder `to` that is not empty; 64-bit weights without an element type; an option that
/// the checkpoint does not leave open.
pub fn convert(from: &Path, to: &Path, conversion: &Conversion) -> Result<(DitConfig, SaveAs, Vec<Assumed>)> {
    atomic::vacant(to)?;
    let mut opened = open(from)?;
    let dtype = match conversion.dtype {
        Some(dtype) => dtype,
        None => stored(opened.source.as_ref())?,
    };
    settle(&mut opened.config, &opened.assumed, &conversion.options)?;
    let mut metadata = std::mem::take(&mut opened.metadata);
    metadata.remove(OPERATORS_KEY);
    for (key, value) in &conversion.extra {
        metadata.entry(key.clone()).or_insert_with(|| value.clone());
    }
    let mut assumed = std::mem::take(&mut opened.assumed);
    assumed.retain(|a| !conversion.options.contains_key(a.option));
    let model = opened.load(&Device::cpu())?;
    atomic::write_folder(to, |folder| save_in(&model, folder, conversion.layout, dtype, &metadata))?;
    Ok((model.config, dtype, assumed))
}

/// The element type that keeps every weight of a checkpoint as it is.
fn stored(source: &dyn Source) -> Result<SaveAs> {
    let mut all_bf16 = true;
    for name in source.names() {
        let dtype = source.tensor(&name).map(|t| t.dtype_name()).unwrap_or_default();
        if dtype == "F64" {
            return Err(Error::usage(format!("{}: {name}", source.place()), "64-bit weights cannot be kept")
                .is(dtype)
                .must("F32, F16 or BF16")
                .fix("round them with --dtype f32"));
        }
        all_bf16 &= dtype == "BF16" || is_positions(&name);
    }
    Ok(if all_bf16 { SaveAs::Bf16 } else { SaveAs::F32 })
}

/// Sets the options that a checkpoint leaves open.
fn settle(config: &mut DitConfig, assumed: &[Assumed], options: &BTreeMap<String, f64>) -> Result<()> {
    for (option, value) in options {
        let mut open = assumed.iter().filter(|a| a.option == option).peekable();
        if open.peek().is_none() {
            return Err(Error::usage(format!("--{option}"), "the checkpoint does not leave this open")
                .is(value)
                .must("absent")
                .fix("see its operators with `graft inspect`"));
        }
        for place in open {
            if let Some(spec) = config.spec_mut(place.block, place.site) {
                spec.options.insert(option.clone(), OptionValue::Number(*value));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Dit, SaveAs, describe, load, save};
    use super::*;
    use crate::io::files::{self, test_dir};
    use crate::io::safetensors::TensorFile;
    use crate::nn::operators::Spec;
    use graft_kernels::rng::Philox;

    fn grafted(positions: f32) -> Dit {
        let mut config = DitConfig { input_size: 4, in_channels: 1, classes: 3, ..DitConfig::plain(4, 8, 2) };
        config.blocks[1].attn = Spec::new("hyena_x").with("taps", 3.0).with("direction", "causal");
        config.blocks[2].mlp = Spec::new("mlp").with("ratio", 2.5);
        config.pairs = vec![1];
        config.norm_eps = 1e-3;
        let mut model = Dit::new(config, &Device::cpu(), 1).unwrap();
        let ids: Vec<_> = model.params.iter().map(|(id, p)| (id, p.trainable)).collect();
        for (id, trainable) in ids {
            let mut value = model.params.get(id).value.copy().unwrap();
            let values = value.f32s_mut().unwrap();
            match trainable {
                true => Philox::new(9, id.index() as u64).fill_normal(values),
                false => values.iter_mut().for_each(|v| *v += positions),
            }
            model.params.set(id, value).unwrap();
        }
        model
    }

    fn to(layout: Layout) -> Conversion {
        Conversion { layout, dtype: None, options: BTreeMap::new(), extra: BTreeMap::new() }
    }

    fn same(a: &Dit, b: &Dit) {
        assert_eq!(a.config, b.config);
        for ((_, p), (_, q)) in a.params.iter().zip(b.params.iter()) {
            let bits = |p: &crate::autograd::Param| -> Vec<u32> {
                p.value.to_vec().unwrap().iter().map(|v| v.to_bits()).collect()
            };
            assert!(p.name == q.name && bits(p) == bits(q), "{}", p.name);
        }
    }

    #[test]
    fn there_and_back_is_exact_for_grafted_models() {
        let device = Device::cpu();
        for (dtype, positions) in [(SaveAs::F32, 0.0), (SaveAs::F32, 0.25), (SaveAs::Bf16, 0.0), (SaveAs::Bf16, 0.25)] {
            let dir = test_dir("convert");
            let plan = BTreeMap::from([("graft.plan".to_string(), "the plan".to_string())]);
            save(&grafted(positions), &dir.join("a"), dtype, &plan).unwrap();
            let start = load(&dir.join("a"), &device).unwrap();
            let (_, kept, assumed) = convert(&dir.join("a"), &dir.join("b"), &to(Layout::Original)).unwrap();
            assert_eq!((kept, assumed.len()), (dtype, 0));
            let file = TensorFile::open(&dir.join("b/model.safetensors")).unwrap();
            assert_eq!(file.metadata()["graft.plan"], "the plan");
            for name in
                ["pos_embed", "blocks.1.attn.short_filter.weight", "blocks.0.attn.qkv.bias", "pairs.1.merge.bias"]
            {
                assert!(file.get(name).is_some(), "{name}");
            }
            same(&start, &load(&dir.join("b"), &device).unwrap());
            convert(&dir.join("b"), &dir.join("c"), &to(Layout::Diffusers)).unwrap();
            let name = "diffusion_pytorch_model.safetensors";
            let read = |folder: &str| files::read_bytes(&dir.join(folder).join(name)).unwrap();
            assert!(read("a") == read("c"), "there and back gives another file");
            assert_eq!(files::list(&dir).unwrap().len(), 3, "something temporary is left");
        }
    }

    #[test]
    fn an_element_type_may_be_chosen() {
        let dir = test_dir("convert_dtype");
        let model = grafted(0.0);
        save(&model, &dir.join("a"), SaveAs::F32, &BTreeMap::new()).unwrap();
        let half = Conversion { dtype: Some(SaveAs::Bf16), ..to(Layout::Original) };
        convert(&dir.join("a"), &dir.join("b"), &half).unwrap();
        let file = TensorFile::open(&dir.join("b/model.safetensors")).unwrap();
        assert!(file.iter().all(|t| t.dtype.name() == if t.name == "pos_embed" { "F32" } else { "BF16" }));
        assert_eq!(describe(&dir.join("b")).unwrap(), model.config);
    }

    #[test]
    fn nothing_is_overwritten_and_nothing_half_written() {
        let dir = test_dir("convert_refuse");
        save(&grafted(0.0), &dir.join("a"), SaveAs::F32, &BTreeMap::new()).unwrap();
        let message = |from: &str, into: &str, c: &Conversion| {
            convert(&dir.join(from), &dir.join(into), c).unwrap_err().to_string()
        };
        let before = files::read_bytes(&dir.join("a/config.json")).unwrap();
        assert!(message("a", "a", &to(Layout::Original)).contains("the folder is not empty"));
        assert_eq!(files::read_bytes(&dir.join("a/config.json")).unwrap(), before);
        assert!(message("none", "b", &to(Layout::Original)).contains("no such file or folder"));
        let window = BTreeMap::from([("window".to_string(), 3.0)]);
        let c = Conversion { options: window, ..to(Layout::Original) };
        assert!(message("a", "b", &c).contains("--window: the checkpoint does not leave this open"));
        assert_eq!(files::list(&dir).unwrap(), [dir.join("a")]);
        // An empty folder is as good as none.
        atomic::ensure_writable_dir(&dir.join("b")).unwrap();
        convert(&dir.join("a"), &dir.join("b"), &to(Layout::Original)).unwrap();
        assert_eq!(files::list(&dir.join("b")).unwrap().len(), 2);
    }

    /// What a program that names no operators would write: only the tensors.
    #[test]
    fn operators_are_recognised_without_metadata() {
        let dir = test_dir("convert_bare");
        let model = grafted(0.25);
        save(&model, &dir.join("a"), SaveAs::F32, &BTreeMap::new()).unwrap();
        convert(&dir.join("a"), &dir.join("b"), &to(Layout::Original)).unwrap();
        let path = dir.join("b/model.safetensors");
        let strip = |keep: &dyn Fn(&str) -> Option<String>| {
            let file = TensorFile::open(&path).unwrap();
            let records = file.iter().filter_map(|t| Some((keep(t.name)?, t.shape.to_vec(), t.to_f32().unwrap())));
            let records: Vec<_> = records.collect();
            let records = records.iter().map(|(n, s, v)| crate::io::safetensors::TensorRecord::f32(n.clone(), s, v));
            crate::io::safetensors::write(&path, records, &BTreeMap::new()).unwrap();
        };
        strip(&|name| Some(name.to_string()));
        same(&model, &load(&dir.join("b"), &Device::cpu()).unwrap());
        // An operator that nobody knows, and a plain one that lacks a tensor.
        strip(&|name| Some(name.replace("blocks.1.attn.short_filter", "blocks.1.attn.long_filter")));
        let error = describe(&dir.join("b")).unwrap_err().to_string();
        assert!(
            error.contains("blocks.1.attn: unknown operator; is in_proj.bias [24], in_proj.weight [24, 8], long"),
            "{error}"
        );
        assert!(error.contains("must be the tensors of mha, "), "{error}");
        strip(&|name| (!name.contains("long_filter") && !name.contains("_proj")).then(|| name.to_string()));
        let error = load(&dir.join("b"), &Device::cpu()).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("blocks.1.attn.qkv.weight: missing tensor"), "{error}");
    }
}
