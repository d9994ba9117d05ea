//! Loading: sizes and operators are read off the tensors, what they do not tell off the configuration beside them.

use super::names::Layout;
use super::{PixArt, PixArtConfig};
use crate::error::{Error, Result};
use crate::io::json;
use crate::models::dit::{BlockSpec, DitConfig};
use crate::models::fill::{Fill, Place, fill};
use crate::models::folder;
use crate::models::open::{Opened, Renamed, open};
use crate::models::source::Source;
use crate::nn::operators::{self, BlockDims, Shapes, Site};
use crate::tensor::Device;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// What training and other programs put before every name.
pub(super) const PREFIXES: [&str; 3] = ["model.diffusion_model.", "base_model.", "model."];

/// Loads a transformer from a diffusers folder, an original `.pth`, or a safetensors file; `bf16` rounds the weights of
/// products as they are read.
///
/// # Errors
/// One line that names the file, the tensor, what it is and what it must be.
pub fn load(path: &Path, device: &Device, bf16: bool) -> Result<PixArt> {
    let (config, layout, source) = examine(path)?;
    // On a dry device, so that no weight is held twice.
    let mut model = PixArt::unset(config, &Device::dry())?;
    let place = |name: &str| Place { parts: layout.parts(name), filters: false };
    // Read off by `examine`, or of use in training only.
    let ignored = |name: &str| name == "pos_embed" || name == "pos_embed.pos_embed" || name == NULL_TEXT;
    let how = Fill { place: &place, ignored: &ignored, bf16, exact: &|_| false };
    fill(&mut model.params, source.as_ref(), device, &how)?;
    Ok(model)
}

/// Features of the empty text, which the original keeps for training.
const NULL_TEXT: &str = "y_embedder.y_embedding";

/// Sizes and operators of a model folder or file, without its weights.
///
/// # Errors
/// As [`load`].
pub fn describe(path: &Path) -> Result<PixArtConfig> {
    Ok(examine(path)?.0)
}

/// Whether the model at `path` is a PixArt transformer: by its configuration, else by its tensors.
///
/// # Errors
/// When it cannot be opened.
pub fn is_pixart(path: &Path) -> Result<bool> {
    let opened = open(path)?;
    let text = |key: &str| opened.config.as_ref().and_then(|(_, c)| c.get(key)).and_then(Value::as_str);
    Ok(match text("_class_name") {
        Some("PixArtTransformer2DModel") => true,
        Some("Transformer2DModel") => text("norm_type") == Some("ada_norm_single"),
        Some(_) => false,
        None => {
            let names = opened.source.names();
            let marks = ["scale_shift_table", "t_block.1.weight", "adaln_single.linear.weight"];
            names.iter().any(|name| marks.iter().any(|mark| name.ends_with(mark)))
        }
    })
}

fn examine(path: &Path) -> Result<(PixArtConfig, Layout, Box<dyn Source>)> {
    let Opened { source, config, metadata } = open(path)?;
    let source = Renamed::without(source, &PREFIXES);
    let layout = Layout::of(source.as_ref()).ok_or_else(|| {
        Error::failure(source.place(), "unknown layout")
            .is(format!("{} tensors", source.names().len()))
            .must("a PixArt transformer: tensors named blocks.* or transformer_blocks.*")
            .fix("give the folder of the transformer itself")
    })?;
    let shapes = layout.shapes(source.as_ref());
    let tensors = Tensors { place: source.place(), shapes: &shapes, metadata: &metadata, alpha: is_alpha(path)? };
    let config = config.as_ref().map(|(path, value)| Config { place: path.display().to_string(), value });
    if let Some(config) = &config {
        config.check_class()?;
    }
    let found = tensors.configure(config.as_ref(), source.as_ref())?;
    found.check().map_err(|e| e.context(&tensors.place))?;
    Ok((found, layout, source))
}

/// Shapes of a checkpoint, under our names.
struct Tensors<'a> {
    place: String,
    shapes: &'a Shapes,
    metadata: &'a BTreeMap<String, String>,
    /// Whether the pipeline around it is that of PixArt-α.
    alpha: bool,
}

/// Whether a `model_index.json` above a transformer's folder names the pipeline of PixArt-α, which reads shorter texts.
fn is_alpha(path: &Path) -> Result<bool> {
    let Some(index) = path.parent().map(|p| p.join("model_index.json")).filter(|p| p.is_file()) else {
        return Ok(false);
    };
    Ok(json::read(&index)?.get("_class_name").and_then(Value::as_str) == Some("PixArtAlphaPipeline"))
}

impl Tensors<'_> {
    /// The dims of a tensor that every model has.
    fn dims<const R: usize>(&self, name: &str) -> Result<[usize; R]> {
        let shape = self.shapes.get(name).ok_or_else(|| {
            Error::failure(format!("{}: {name}", self.place), "missing tensor")
                .must("present in a PixArt transformer")
                .fix("use the complete checkpoint")
        })?;
        shape.as_slice().try_into().map_err(|_| {
            Error::failure(format!("{}: {name}", self.place), "wrong rank")
                .is(format!("{shape:?}"))
                .must(format!("{R} dimensions"))
        })
    }

    fn configure(&self, config: Option<&Config<'_>>, source: &dyn Source) -> Result<PixArtConfig> {
        let [width, in_channels, patch, _] = self.dims("x_embedder.proj.weight")?;
        let [_, caption_channels] = self.dims("y_embedder.y_proj.fc1.weight")?;
        let [outputs] = self.dims("final_layer.linear.bias")?;
        let depth =
            (0..1000).take_while(|i| self.shapes.contains_key(&format!("blocks.{i}.scale_shift_table"))).count();
        let whole = |keys: &[&str]| -> Result<Option<usize>> { config.map_or(Ok(None), |c| c.whole(keys)) };
        let heads = match whole(&["num_attention_heads", "num_heads"])?.or_else(|| DitConfig::heads_of_width(width)) {
            Some(heads) if heads > 0 && width.is_multiple_of(heads) => heads,
            other => {
                return Err(Error::failure(&self.place, "the number of heads cannot be told from the file")
                    .is(other.map_or(format!("width {width}"), |h| format!("{h} heads for a width of {width}")))
                    .must("a divisor of the width, or a published width (384, 768, 1024, 1152)")
                    .fix("put a config.json with num_heads beside the checkpoint"));
            }
        };
        let stated = [("depth", whole(&["num_layers", "depth"])?, depth), ("width", whole(&["hidden_size"])?, width)];
        if let (Some(config), Some((what, is, found))) =
            (config, stated.iter().find(|(_, s, f)| s.is_some_and(|s| s != *f)))
        {
            return Err(Error::failure(&config.place, format!("states another {what} than the tensors have"))
                .is(is.unwrap_or(0))
                .must(found)
                .fix("use the config.json that belongs to the checkpoint"));
        }
        let positions = self.stored_positions(source, width)?;
        let sample_size = match (whole(&["sample_size", "input_size"])?, positions) {
            (Some(side), _) => side,
            (None, Some((side, _))) => side.saturating_mul(patch),
            (None, None) => {
                return Err(Error::failure(&self.place, "the size that positions are relative to is not stated")
                    .must("sample_size (32 for 256 pixels, 64 for 512, 128 for 1024, 256 for 2048)")
                    .fix("put a config.json with sample_size and interpolation_scale beside the checkpoint"));
            }
        };
        let stated = config.and_then(|c| c.number(&["interpolation_scale", "pe_interpolation"]));
        let interpolation = stated
            .or(positions.map(|(_, interpolation)| interpolation))
            .unwrap_or(PixArtConfig::usual_interpolation(sample_size));
        let mut found = PixArtConfig {
            patch,
            sample_size,
            interpolation,
            in_channels,
            out_channels: outputs / (patch * patch).max(1),
            caption_channels,
            max_tokens: self.max_tokens(config)?,
            micro_conditions: self.shapes.contains_key("csize_embedder.mlp.0.weight"),
            norm_eps: config.and_then(|c| c.number(&["norm_eps"])).unwrap_or(1e-6) as f32,
            ..PixArtConfig::plain(depth, width, heads)
        };
        // Before operators are built from the sizes.
        found.check().map_err(|e| e.context(&self.place))?;
        let dims = found.block_dims([found.base(); 2]);
        // What the tensors do not tell, such as the reach of a window, only metadata states.
        if !folder::stated_operators(&self.place, self.metadata, &mut found.blocks)? {
            found.blocks = (0..depth).map(|i| self.block(i, dims)).collect::<Result<_>>()?;
        }
        Ok(found)
    }

    fn max_tokens(&self, config: Option<&Config<'_>>) -> Result<usize> {
        if let Some(stated) = config.map_or(Ok(None), |c| c.whole(&["max_tokens", "model_max_length"]))? {
            return Ok(stated);
        }
        // The table of the empty text has a row per token; α, which is told its size, had 120.
        let null = self.shapes.get(NULL_TEXT).and_then(|shape| shape.first().copied());
        let alpha = self.alpha || self.shapes.contains_key("csize_embedder.mlp.0.weight");
        Ok(null.unwrap_or(if alpha { 120 } else { 300 }))
    }

    /// Side of the grid and density of a stored table of positions, told by its second token: at column 1/density.
    fn stored_positions(&self, source: &dyn Source, width: usize) -> Result<Option<(usize, f64)>> {
        let Some(tensor) = source.tensor("pos_embed") else { return Ok(None) };
        let &[1, tokens, columns] = tensor.shape() else { return Ok(None) };
        let side = tokens.isqrt();
        if side * side != tokens || tokens < 2 || columns != width {
            return Ok(None);
        }
        let values = tensor.values()?;
        let row = &values[width..2 * width];
        let coordinate = f64::from(row[0]).atan2(f64::from(row[width / 4]));
        // Rounded to what densities are: powers of two.
        let interpolation = (1.0 / coordinate).log2().round().exp2();
        Ok((coordinate > 0.0 && interpolation.is_finite()).then_some((side, interpolation)))
    }

    /// The operators of a block, told by its tensors.
    fn block(&self, index: usize, dims: BlockDims) -> Result<BlockSpec> {
        let site = |site: Site| {
            let prefix = format!("blocks.{index}.{site}.");
            let below = self.shapes.range(prefix.clone()..);
            let found: Shapes = below
                .map_while(|(name, shape)| Some((name.strip_prefix(&prefix)?.to_string(), shape.clone())))
                .collect();
            operators::recognise(site, &found, dims).map(|known| known.spec).ok_or_else(|| {
                let found: Vec<String> = found.iter().map(|(name, shape)| format!("{name} {shape:?}")).collect();
                Error::failure(format!("{}: blocks.{index}.{site}", self.place), "unknown operator")
                    .is(found.join(", "))
                    .must(format!("the tensors of {}", operators::recognisable(site).join(", ")))
            })
        };
        Ok(BlockSpec { attn: site(Site::Attn)?, mlp: site(Site::Mlp)? })
    }
}

/// A `config.json` in diffusers' or the original's vocabulary.
struct Config<'a> {
    place: String,
    value: &'a Value,
}

impl Config<'_> {
    fn check_class(&self) -> Result<()> {
        let text = |key: &str| self.value.get(key).and_then(Value::as_str);
        let class = text("_class_name");
        match (class, text("norm_type")) {
            (None | Some("PixArtTransformer2DModel"), _) | (Some("Transformer2DModel"), Some("ada_norm_single")) => {
                Ok(())
            }
            (Some(other), norm) => Err(Error::failure(format!("{}: _class_name", self.place), "no PixArt transformer")
                .is(format!("{other}{}", norm.map_or(String::new(), |n| format!(" with norm_type {n}"))))
                .must("PixArtTransformer2DModel, or Transformer2DModel with norm_type ada_norm_single")
                .fix("give the folder of the transformer itself")),
        }
    }

    fn whole(&self, keys: &[&str]) -> Result<Option<usize>> {
        for key in keys {
            match self.value.get(key) {
                None | Some(Value::Null) => {}
                Some(value) => {
                    let number = value.as_u64().and_then(|v| usize::try_from(v).ok()).filter(|v| *v <= 1 << 20);
                    return number.map(Some).ok_or_else(|| {
                        Error::failure(format!("{}: {key}", self.place), "not a whole number")
                            .is(value)
                            .must("0 to 1048576")
                    });
                }
            }
        }
        Ok(None)
    }

    fn number(&self, keys: &[&str]) -> Option<f64> {
        keys.iter().find_map(|key| self.value.get(key).and_then(json::number))
    }
}
