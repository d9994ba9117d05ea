//! What `graft inspect` says of a model that reads text.

use super::layers;
use crate::error::Result;
use crate::graft::cost::Counter;
use crate::models::pipeline::{Components, Overrides};
use crate::models::pixart::{self, PixArt};
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
    let (c, parameters, flops) = (&config, twin.params.elements(), Counter::new(&config).model()?.flops);
    let tokens = c.base() * c.base();
    let rows = layers::rows(c, &[], &[])?;
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
         {parameters} parameters\n\
         {}FLOP per image, half and step at that size (one layer of each line below)\n\
         parts: {}\n{}",
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
        count(flops),
        if found.is_empty() {
            "none beside the transformer".to_string()
        } else {
            found.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
        },
        layers::table(&rows),
    );
    let record = json!({
        "model": parts.transformer.display().to_string(), "class": "PixArt", "depth": c.depth(), "width": c.width,
        "heads": c.heads, "patch": c.patch, "sample_size": c.sample_size, "interpolation_scale": c.interpolation,
        "in_channels": c.in_channels, "out_channels": c.out_channels, "caption_channels": c.caption_channels,
        "max_tokens": c.max_tokens, "micro_conditions": c.micro_conditions, "tokens": tokens,
        "parameters": parameters, "flops": flops, "sites": layers::json(&rows),
        "parts": found.iter().map(|(name, path)| (name.to_string(), json!(path.display().to_string()))).collect::<serde_json::Map<_, _>>(),
    });
    Ok((record, text))
}
