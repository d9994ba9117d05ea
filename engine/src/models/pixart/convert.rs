//! Conversion of a transformer from one layout to another: the same values under other names, in the element type of the
//! checkpoint, so that there and back gives the same bits.

use super::names::Layout;
use super::{PixArtConfig, load, save};
use crate::error::{Error, Result};
use crate::io::dtype::FileDtype;
use crate::io::safetensors::{self, TensorRecord};
use crate::io::{atomic, json};
use crate::models::dit::SaveAs;
use crate::models::open::{Renamed, open};
use crate::models::source::Source;
use crate::tensor::Device;
use half::{bf16, f16};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;

/// What a conversion did.
#[derive(Clone, Debug)]
pub struct Converted {
    /// Sizes and operators.
    pub config: PixArtConfig,
    /// Element types that were written.
    pub dtypes: Vec<FileDtype>,
    /// Tensors of the checkpoint that only training uses and no layout keeps.
    pub left_out: Vec<String>,
}

/// Writes the transformer at `from` as the folder `to` in another layout, all or nothing. `dtype` changes the element
/// type of all tensors; without it each keeps its own.
///
/// # Errors
/// Those of [`load()`]; a folder `to` that is not empty; 64-bit weights without an element type.
pub fn convert(from: &Path, to: &Path, layout: Layout, dtype: Option<SaveAs>) -> Result<Converted> {
    atomic::vacant(to)?;
    let (opened, model) = (open(from)?, load(from, &Device::cpu(), false)?);
    let mut metadata = opened.metadata;
    metadata.insert("format".into(), "pt".into());
    let source = Renamed::without(opened.source, &super::load::PREFIXES);
    let (names, own) = (source.names(), Layout::of(source.as_ref()).unwrap_or(Layout::Original));
    let (mut records, mut used) = (Vec::new(), BTreeSet::new());
    for (_, param) in model.params.iter() {
        let stored = own.parts(&param.name);
        let kept = stored_type(source.as_ref(), &stored, dtype)?;
        used.extend(stored);
        let (parts, values) = (layout.parts(&param.name), param.value.f32s()?);
        let mut shape = param.value.shape().dims().to_vec();
        shape[0] /= parts.len();
        let each = (values.len() / parts.len()).max(1);
        for (name, values) in parts.into_iter().zip(values.chunks(each)) {
            records.push(TensorRecord { name, dtype: kept, shape: shape.clone(), bytes: encoded(values, kept) });
        }
    }
    let dtypes: BTreeSet<FileDtype> = records.iter().map(|record| record.dtype).collect();
    let (file, config) = match layout {
        Layout::Original => ("model.safetensors", original_config(&model.config)),
        Layout::Diffusers => ("diffusion_pytorch_model.safetensors", save::config(&model.config)),
    };
    atomic::write_folder(to, |folder| {
        safetensors::write(&folder.join(file), records, &metadata)?;
        // Last, so that a folder with a configuration is a complete one.
        json::write(&folder.join("config.json"), &config)
    })?;
    let left_out = names.into_iter().filter(|name| !used.contains(name)).collect();
    Ok(Converted { config: model.config.clone(), dtypes: dtypes.into_iter().collect(), left_out })
}

/// The element type that keeps all parts of a parameter as they are, or the one that is asked for.
fn stored_type(source: &dyn Source, parts: &[String], asked: Option<SaveAs>) -> Result<FileDtype> {
    match asked {
        Some(SaveAs::F32) => return Ok(FileDtype::F32),
        Some(SaveAs::Bf16) => return Ok(FileDtype::Bf16),
        None => {}
    }
    let mut found = None;
    for name in parts {
        let dtype = source.tensor(name).map(|t| t.dtype_name()).unwrap_or_default();
        if dtype == FileDtype::F64.name() {
            return Err(Error::usage(format!("{}: {name}", source.place()), "64-bit weights cannot be kept")
                .is(dtype)
                .must("F32, F16 or BF16")
                .fix("round them with --dtype f32"));
        }
        let dtype = FileDtype::from_name(&dtype).unwrap_or(FileDtype::F32);
        // Parts of different types are exact in f32.
        found = match found {
            None => Some(dtype),
            Some(first) if first == dtype => found,
            Some(_) => Some(FileDtype::F32),
        };
    }
    Ok(found.unwrap_or(FileDtype::F32))
}

fn encoded(values: &[f32], dtype: FileDtype) -> Cow<'_, [u8]> {
    match dtype {
        FileDtype::F16 => Cow::Owned(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect()),
        FileDtype::Bf16 => Cow::Owned(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()),
        _ => Cow::Borrowed(bytemuck::cast_slice(values)),
    }
}

/// What our own loader reads beside the names of the original, which has no configuration in its checkpoints.
fn original_config(c: &PixArtConfig) -> Value {
    json!({
        "num_heads": c.heads,
        "depth": c.depth(),
        "hidden_size": c.width,
        "sample_size": c.sample_size,
        "pe_interpolation": c.interpolation,
        "model_max_length": c.max_tokens,
        "norm_eps": c.norm_eps,
    })
}

#[cfg(test)]
mod tests {
    use super::super::PixArt;
    use super::*;
    use crate::io::files::{golden, read_bytes, test_dir};
    use crate::io::safetensors::TensorFile;
    use std::collections::BTreeMap;

    /// Names, types, shapes and bytes of a file.
    fn contents(path: &Path) -> BTreeMap<String, (FileDtype, Vec<usize>, Vec<u8>)> {
        let file = TensorFile::open(path).unwrap();
        file.iter().map(|t| (t.name.to_string(), (t.dtype, t.shape.to_vec(), t.bytes.to_vec()))).collect()
    }

    #[test]
    fn there_and_back_keeps_every_bit_and_type() {
        let dir = test_dir("pixart_convert");
        let config =
            PixArtConfig { sample_size: 8, caption_channels: 10, max_tokens: 7, ..PixArtConfig::plain(2, 24, 3) };
        let model = PixArt::random(config.clone(), &Device::cpu(), 9).unwrap();
        let types = [FileDtype::F32, FileDtype::Bf16, FileDtype::F16];
        let mut records = Vec::new();
        for (i, (_, param)) in model.params.iter().enumerate() {
            let (values, shape) = (param.value.f32s().unwrap(), param.value.shape().dims().to_vec());
            let dtype = types[i % 3];
            records.push(TensorRecord { name: param.name.clone(), dtype, shape, bytes: encoded(values, dtype) });
        }
        let null = vec![0.5f32; 70];
        records.push(TensorRecord::f32("y_embedder.y_embedding", &[7, 10], &null[..]));
        std::fs::create_dir_all(dir.join("a")).unwrap();
        let first = dir.join("a/model.safetensors");
        safetensors::write(&first, records, &BTreeMap::new()).unwrap();
        json::write(&dir.join("a/config.json"), &json!({ "num_heads": 3, "sample_size": 8, "interpolation_scale": 1 }))
            .unwrap();
        let go = |from: &str, to: &str, layout| convert(&dir.join(from), &dir.join(to), layout, None).unwrap();
        let there = go("a", "b", Layout::Diffusers);
        assert_eq!((&there.config, &there.left_out[..]), (&config, &["y_embedder.y_embedding".to_string()][..]));
        assert_eq!(there.dtypes.len(), 3);
        let back = go("b", "c", Layout::Original);
        assert_eq!((&back.config, back.left_out.len()), (&config, 0));
        let mut want = contents(&first);
        want.remove("y_embedder.y_embedding");
        assert!(want == contents(&dir.join("c/model.safetensors")), "bits, types or names differ");
        go("c", "d", Layout::Diffusers);
        let file = "diffusion_pytorch_model.safetensors";
        assert!(read_bytes(&dir.join("b").join(file)).unwrap() == read_bytes(&dir.join("d").join(file)).unwrap());
        let again = convert(&dir.join("a"), &dir.join("d"), Layout::Original, None).unwrap_err().to_string();
        assert!(again.contains("not empty"), "{again}");
        let half = convert(&dir.join("a"), &dir.join("e"), Layout::Original, Some(SaveAs::Bf16)).unwrap();
        assert_eq!(half.dtypes, [FileDtype::Bf16]);
    }

    /// A recorded `torch.save` checkpoint becomes the recorded diffusers folder of the same weights.
    #[test]
    fn checkpoints_of_the_original_become_folders_of_diffusers() {
        let dir = test_dir("pixart_convert_pth");
        let checkpoint = golden("pixart_original/interp_half_square/model/model.pth");
        let done = convert(&checkpoint, &dir.join("a"), Layout::Diffusers, None).unwrap();
        assert_eq!(done.left_out, ["pos_embed", "y_embedder.y_embedding"]);
        let want = golden("pixart_diffusers/interp_half_square/model/diffusion_pytorch_model.safetensors");
        assert!(contents(&want) == contents(&dir.join("a/diffusion_pytorch_model.safetensors")));
    }
}
