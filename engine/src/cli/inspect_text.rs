//! What `graft inspect` says of a model that reads text.

use crate::error::Result;
use crate::models::pipeline::{Components, Overrides};
use crate::models::pixart::{self, PixArt, PixArtConfig};
use crate::nn::operators::Site;
use crate::report::format::count;
use crate::tensor::Device;
use serde_json::{Value, json};
use std::path::Path;

/// Sizes, cost and parts of a PixArt model.
///
/// # Errors
/// When it cannot be read.
pub fn model(path: &Path) -> Result<(Value, String)> {
    let parts = Components::find(path, &Overrides::default())?;
    let config = pixart::describe(&parts.transformer)?;
    let twin = PixArt::unset(config.clone(), &Device::dry())?;
    let (c, parameters, flops) = (&config, twin.params.elements(), flops(&twin));
    let tokens = c.base() * c.base();
    let mut kinds: Vec<String> = c.blocks.iter().map(|b| b.attn.to_string()).collect();
    kinds.dedup();
    let found: Vec<(&str, &Path)> = [
        ("vae", parts.vae.as_deref()),
        ("text_encoder", parts.text_encoder.as_deref()),
        ("tokenizer", parts.tokenizer.as_deref()),
        ("scheduler", parts.scheduler.as_deref()),
    ]
    .into_iter()
    .filter_map(|(name, path)| Some((name, path?)))
    .collect();
    let text = format!(
        "{}: PixArt, {} blocks, width {}, {} heads, patch {}, latents {}x{}x{}, positions relative to {} at density {}, \
         {} tokens at that size, text of up to {} tokens of {}{}{}\n\
         self-attention: {}\n\
         {parameters} parameters\n\
         {}FLOP per image, half and step at that size\n\
         parts: {}\n",
        parts.transformer.display(),
        c.depth(),
        c.width,
        c.heads,
        c.patch,
        c.in_channels,
        c.sample_size,
        c.sample_size,
        c.base(),
        c.interpolation,
        tokens,
        c.max_tokens,
        c.caption_channels,
        if c.out_channels == 2 * c.in_channels { ", learned variance" } else { "" },
        if c.micro_conditions { ", told size and aspect ratio" } else { "" },
        kinds.join(", "),
        count(flops),
        if found.is_empty() {
            "none beside the transformer".to_string()
        } else {
            found.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
        },
    );
    let record = json!({
        "model": parts.transformer.display().to_string(), "class": "PixArt", "depth": c.depth(), "width": c.width,
        "heads": c.heads, "patch": c.patch, "sample_size": c.sample_size, "interpolation_scale": c.interpolation,
        "in_channels": c.in_channels, "out_channels": c.out_channels, "caption_channels": c.caption_channels,
        "max_tokens": c.max_tokens, "micro_conditions": c.micro_conditions, "tokens": tokens,
        "parameters": parameters, "flops": flops,
        "parts": found.iter().map(|(name, path)| (name.to_string(), json!(path.display().to_string()))).collect::<serde_json::Map<_, _>>(),
    });
    Ok((record, text))
}

/// Operations of one forward pass of one image at the size that positions are relative to, with the longest text.
fn flops(model: &PixArt) -> f64 {
    let c: &PixArtConfig = &model.config;
    let dims = c.block_dims([c.base(); 2]);
    let (n, d, t) = (dims.tokens() as f64, c.width as f64, c.max_tokens as f64);
    let sites: f64 = (0..c.depth())
        .flat_map(|i| [Site::Attn, Site::Mlp].map(|site| (i, site)))
        .filter_map(|(i, site)| Some(model.operator(i, site)?.flops(dims).total()))
        .sum();
    // Queries and output, keys and values, and the attention between them.
    let cross = c.depth() as f64 * (4.0 * n * d * d + 4.0 * t * d * d + 4.0 * n * t * d);
    let patch = (c.patch * c.patch) as f64;
    let ends = 2.0 * n * d * patch * (c.in_channels + c.out_channels) as f64;
    sites + cross + ends + 2.0 * t * d * (c.caption_channels as f64 + d)
}
