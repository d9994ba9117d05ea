//! Whatever turns a transformer's latents into pictures: the KL autoencoder or the small decoder.

use super::load::{Given, factor_of};
use super::{Tiny, Vae, load};
use crate::autograd::Precision;
use crate::error::Result;
use crate::models::open::open;
use crate::tensor::{Device, Tensor};
use serde_json::Value;
use std::path::Path;

/// A decoder of a transformer's latents.
#[derive(Debug)]
pub enum Decoder {
    /// The KL autoencoder.
    Kl(Box<Vae>),
    /// The small decoder, whose latents are the transformer's.
    Tiny(Box<Tiny>),
}

impl Decoder {
    /// Loads either kind, told by the configuration or the tensors.
    ///
    /// # Errors
    /// As [`load()`] and [`Tiny::load`].
    pub fn load(path: &Path, device: &Device, given: Given) -> Result<Decoder> {
        match is_tiny(path)? {
            true => Ok(Decoder::Tiny(Box::new(Tiny::load(path, device)?))),
            false => Ok(Decoder::Kl(Box::new(load(path, device, given)?))),
        }
    }

    /// Pixels along a side of a latent's pixel, without loading the weights.
    ///
    /// # Errors
    /// When the files cannot be opened.
    pub fn factor_of(path: &Path) -> Result<usize> {
        match is_tiny(path)? {
            // Its weights are a few megabytes.
            true => Ok(Tiny::load(path, &Device::cpu())?.factor()),
            false => factor_of(path),
        }
    }

    /// Pictures `[B, 3, f·h, f·w]` in −1..1 of the transformer's latents `[B, C, h, w]`; `report` is told the number of
    /// steps done and of all.
    ///
    /// # Errors
    /// Latents of another shape, an unknown scale, too little memory, or a picture that is not finite.
    pub fn decode(
        &self,
        latents: &Tensor,
        precision: Precision,
        report: &mut (dyn FnMut(usize, usize) + Send),
    ) -> Result<Tensor> {
        match self {
            Decoder::Kl(vae) => vae.decode(&vae.config.unscale(latents)?, precision, report),
            Decoder::Tiny(tiny) => tiny.decode(latents, precision),
        }
    }
}

/// Whether a folder or file holds the small decoder: by the configuration, else by the names of the tensors.
///
/// # Errors
/// When it cannot be opened.
pub fn is_tiny(path: &Path) -> Result<bool> {
    let opened = open(path)?;
    let class = opened.config.as_ref().and_then(|(_, c)| c.get("_class_name")).and_then(Value::as_str);
    Ok(match class {
        Some(class) => class == "AutoencoderTiny",
        None => {
            let names = opened.source.names();
            let numbered = |name: &String| {
                let rest = name.strip_prefix("decoder.layers.").or(name.strip_prefix("decoder.")).unwrap_or(name);
                rest.starts_with(|c: char| c.is_ascii_digit())
            };
            names.iter().any(numbered)
        }
    })
}
