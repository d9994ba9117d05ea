//! What a request says of itself: the memory it will hold, stage by stage, and the record in its pictures.

use super::{DECODER, Job, TEXT, TRANSFORMER};
use crate::cli::Dtype;
use crate::cli::sample_sources::Sources;
use crate::cli::stages::Planned;
use crate::cli::texts::Texts;
use crate::cli::{model_args, sample, sample_sources};
use crate::error::{Error, Result};
use crate::models::pixart::PixArt;
use crate::models::t5::{self, Residence, T5Config};
use crate::models::vae::{self, Vae, VaeConfig};
use crate::sample::text::{self, Request};
use crate::tensor::Device;
use serde_json::{Value, json};
use std::path::PathBuf;

impl Job<'_> {
    /// Of the released model, whose files need not be here: the memory of its text encoder, and what the files take.
    pub(super) fn released(&self) -> Result<Vec<String>> {
        if self.components.is_some() {
            return Ok(Vec::new());
        }
        let gib = |bytes: usize| format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30));
        let bf16 = self.args.run.dtype == Dtype::Bf16;
        let encoder = |bf16, residence| Ok::<_, Error>(gib(t5::memory_of(&T5Config::xxl(), bf16, residence)?));
        let transformer = 4 * PixArt::unset(self.config.clone(), &Device::dry())?.params.elements();
        let vae = 4 * Vae::new(VaeConfig::released(0.13025), &Device::dry(), 0)?.params.elements();
        Ok(vec![
            format!(
                "text encoder of the released model: {}, or {} with --text-encoder stream",
                encoder(bf16, Residence::Memory)?,
                encoder(bf16, Residence::Stream)?
            ),
            format!(
                "files in f32: transformer {}, text encoder {}, autoencoder {}; in 16 bits half",
                gib(transformer),
                encoder(false, Residence::Memory)?,
                gib(vae)
            ),
        ])
    }

    /// The memory that every stage will hold.
    pub(super) fn planned(&self) -> Result<Vec<Planned>> {
        let args = self.args;
        let bf16 = args.run.dtype == Dtype::Bf16;
        let mut stages = Vec::new();
        if let (Some(components), None) = (&self.components, &args.text.embeddings) {
            let bytes = t5::plan_memory(components.text()?.0, bf16, args.text.parts.residence())?;
            stages.push(Planned { name: TEXT, bytes, parts: None });
        }
        let count = self.prompts.len().max(1) * args.n;
        let texts = Texts {
            prompts: vec![Device::dry().empty(&[self.config.max_tokens, self.config.caption_channels])?; count],
            nulls: vec![Device::dry().empty(&[1, self.config.caption_channels])?; count],
        };
        let request = Request { latents: None, ..self.request(texts, &Sources::default())? };
        stages.push(Planned::of(TRANSFORMER, text::plan_memory(&self.config, &self.device, &request)?));
        if !self.pixels && (args.output_latents.is_none() || args.output.is_some()) {
            let config = match &self.components {
                None => Some(VaeConfig::released(0.13025)),
                // The small decoder needs a fraction of what the transformer does.
                Some(components) => vae::describe(components.vae()?, self.given()).ok(),
            };
            if let Some(config) = config {
                let plan = vae::plan_memory(&config, &self.device, self.latent_size(), count, args.run.dtype.into())?;
                stages.push(Planned::of(DECODER, plan));
            }
        }
        Ok(stages)
    }

    /// Everything that is needed to make the same pictures again.
    pub(super) fn record(&self, request: &Request) -> Result<Value> {
        let (args, text) = (self.args, &self.args.text);
        let (sampler, eta) = sample::sampler_name(request.sampler);
        let mut record = json!({
            "program": concat!("graft ", env!("CARGO_PKG_VERSION")),
            "prompts": self.prompts,
            "negative_prompt": text.negative_prompt,
            "seed": self.seed,
            "images_per_prompt": args.n,
            "width": self.wanted[1],
            "height": self.wanted[0],
            "drawn": [self.drawn[1], self.drawn[0]],
            "sampler": sampler,
            "steps": request.steps,
            "guidance_scale": request.guidance,
            "cfg_channels": request.guided,
            "compat": text.compat.name(),
            "dtype": args.run.dtype_name(),
            "semantics": args.run.semantics_name(),
        });
        if let Some(eta) = eta {
            record["eta"] = json!(eta);
        }
        match &self.components {
            None => record["model"] = json!("random weights"),
            Some(components) => {
                record["model"] =
                    json!(model_args::short_name(args.model.as_deref().unwrap_or(&components.transformer)));
                record["transformer_sha256"] = json!(sample_sources::digest(&components.transformer)?);
                if let Some(vae) = &components.vae {
                    record["vae_sha256"] = json!(sample_sources::digest(vae)?);
                }
                record["text_encoder"] = json!(components.text_encoder.as_deref().map(model_args::short_name));
            }
        }
        let file = |path: &Option<PathBuf>| path.as_deref().map(crate::io::hash::sha256_file).transpose();
        for (key, path) in [
            ("embeddings_sha256", &text.embeddings),
            ("latents_sha256", &args.latents),
            ("init_image_sha256", &text.init_image),
            ("inpaint_sha256", &args.inpaint),
            ("mask_sha256", &args.mask),
        ] {
            if let Some(digest) = file(path)? {
                record[key] = json!(digest);
            }
        }
        if text.init_image.is_some() {
            record["strength"] = json!(text.strength);
        }
        if args.inpaint.is_some() {
            record["rounds"] = json!(args.rounds);
        }
        if !text.lora.is_empty() {
            let all = self.loras()?;
            let digests = all.iter().map(|(path, weight)| Ok(json!([sample_sources::digest(path)?, weight])));
            record["lora_sha256"] = json!(digests.collect::<Result<Vec<_>>>()?);
        }
        if let Some(scale) = text.vae_scale {
            record["vae_scale"] = json!(scale);
        }
        Ok(record)
    }
}
