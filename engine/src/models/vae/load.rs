//! Loading an autoencoder: sizes are read off its tensors, what they do not tell off the configuration beside them.

use super::names::{diffusers_name, levels, parts};
use super::{Vae, VaeConfig};
use crate::error::{Error, Result};
use crate::io::json;
use crate::models::fill::{Fill, Place, fill};
use crate::models::open::{Opened, Renamed, open};
use crate::models::source::Source;
use crate::nn::Scheme;
use crate::tensor::{DType, Device};
use serde_json::Value;
use std::path::Path;

/// What other programs put before every name.
const PREFIXES: [&str; 3] = ["first_stage_model.", "vae.", "model."];
/// Groups of a norm where nothing else is said.
const GROUPS: usize = 32;

/// What a file without a configuration does not tell.
#[derive(Clone, Copy, Debug, Default)]
pub struct Given {
    /// Groups of every norm.
    pub groups: Option<usize>,
    /// Factor between the network's latents and those of the transformer; it goes before that of a configuration.
    pub scaling: Option<f64>,
}

/// Loads a KL autoencoder from a folder or a file of diffusers, or a single file of latent diffusion, which may hold
/// other networks beside it.
///
/// # Errors
/// One line that names the file, the tensor, what it is and what it must be.
pub fn load(path: &Path, device: &Device, given: Given) -> Result<Vae> {
    let (config, source) = examine(path, given)?;
    let attends = ["encoder", "decoder"]
        .map(|half| source.tensor(&format!("{half}.mid_block.attentions.0.to_q.weight")).is_some());
    let mut vae =
        Vae::build(config, &Device::dry(), 0, Scheme::Unset, attends).map_err(|e| e.context(source.place()))?;
    let ranks: Vec<(String, usize)> =
        vae.params.iter().map(|(_, p)| (p.name.clone(), p.value.shape().dims().len())).collect();
    let place = |name: &str| {
        let filters = ranks.iter().any(|(known, rank)| known == name && *rank == 4);
        Place { parts: parts(name), filters }
    };
    let how = Fill { place: &place, ignored: &|_| false, bf16: device.element() == DType::BF16, exact: &|_| true };
    fill(&mut vae.params, source.as_ref(), device, &how)?;
    Ok(vae)
}

/// Sizes of an autoencoder, without its weights.
///
/// # Errors
/// As [`load`].
pub fn describe(path: &Path, given: Given) -> Result<VaeConfig> {
    Ok(examine(path, given)?.0)
}

fn examine(path: &Path, given: Given) -> Result<(VaeConfig, Box<dyn Source>)> {
    let Opened { source, config, .. } = open(path)?;
    let source = Renamed::without(source, &PREFIXES);
    let count = levels(source.names().iter().map(String::as_str));
    let source = Renamed::under(source, |name| diffusers_name(name, count));
    if let Some((path, class)) =
        config.as_ref().and_then(|(p, c)| Some((p, c.get("_class_name").and_then(Value::as_str)?)))
        && class != "AutoencoderKL"
    {
        return Err(Error::failure(format!("{}: _class_name", path.display()), "no KL autoencoder")
            .is(class)
            .must("AutoencoderKL"));
    }
    let config = sizes(source.as_ref(), config.as_ref().map(|(_, value)| value), count, given)?;
    Ok((config, source))
}

/// Pixels along a side of a latent's pixel, by the levels of the decoder.
///
/// # Errors
/// When the file cannot be opened or has no decoder.
pub(super) fn factor_of(path: &Path) -> Result<usize> {
    let source = Renamed::without(open(path)?.source, &PREFIXES);
    match levels(source.names().iter().map(String::as_str)) {
        count @ 1..=8 => Ok(1 << (count - 1)),
        count => Err(Error::failure(source.place(), "no KL autoencoder")
            .is(format!("{count} levels in its decoder"))
            .must("1 to 8")
            .fix("give the folder vae of the model")),
    }
}

fn sizes(source: &dyn Source, config: Option<&Value>, levels: usize, given: Given) -> Result<VaeConfig> {
    let place = source.place();
    let shape = |name: &str| source.tensor(name).map(|t| t.shape().to_vec());
    let axis = |name: &str, axis: usize| {
        shape(name).and_then(|s| s.get(axis).copied()).ok_or_else(|| {
            Error::failure(format!("{place}: {name}"), "missing tensor")
                .must("present in a KL autoencoder")
                .fix("give the folder vae of the model, or a file with a whole autoencoder")
        })
    };
    let channels = (0..levels).rev().map(|i| axis(&format!("decoder.up_blocks.{i}.resnets.0.conv1.weight"), 0));
    let channels = channels.collect::<Result<Vec<_>>>()?;
    let counted = (0..64).take_while(|j| shape(&format!("decoder.up_blocks.0.resnets.{j}.conv1.weight")).is_some());
    let field = |key: &str| config.and_then(|c| c.get(key)).filter(|v| !v.is_null());
    let stated_groups = field("norm_num_groups").and_then(Value::as_u64).map(|g| g as usize);
    Ok(VaeConfig {
        channels,
        layers: counted.count().saturating_sub(1),
        latent: axis("decoder.conv_in.weight", 1)?,
        colours: axis("decoder.conv_out.weight", 0)?,
        groups: given.groups.or(stated_groups).unwrap_or(GROUPS),
        scaling: given.scaling.or(field("scaling_factor").and_then(json::number)),
        shift: field("shift_factor").and_then(json::number).unwrap_or(0.0),
        quant: ["quant_conv.weight", "post_quant_conv.weight"].map(|name| shape(name).is_some()),
        encodes: shape("encoder.conv_in.weight").is_some(),
    })
}
