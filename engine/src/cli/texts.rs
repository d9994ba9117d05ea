//! Texts and the parts of a text-to-image model on the command line: prompts to features, by the text encoder or from a
//! file of features.

use super::Dtype;
use super::model_args::RunArgs;
use crate::autograd::Precision;
use crate::error::{Error, Result};
use crate::io::files;
use crate::io::safetensors::TensorFile;
use crate::models::pipeline::{Components, Overrides};
use crate::models::pixart::PixArtConfig;
use crate::models::t5::{self, Residence, Tokenizer, Tokens};
use crate::models::vae::Decoder;
use crate::sample::captions;
use crate::tensor::{Device, Tensor};
use std::path::{Path, PathBuf};

/// Where the parts of a model are.
#[derive(Default, clap::Args)]
pub struct PartArgs {
    /// Folder with the parts that the model's folder has not: vae, text_encoder, tokenizer, scheduler.
    #[arg(long, value_name = "DIR")]
    components: Option<PathBuf>,
    /// Transformer instead of the model's.
    #[arg(long, value_name = "DIR|FILE")]
    transformer: Option<PathBuf>,
    /// Autoencoder, or small decoder, instead of the model's.
    #[arg(long, value_name = "DIR|FILE")]
    vae: Option<PathBuf>,
    /// Text encoder instead of the model's; the word stream reads its layers from disk as they run, in little memory.
    #[arg(long, value_name = "stream|DIR|FILE")]
    text_encoder: Vec<PathBuf>,
    /// Tokenizer instead of the model's: a folder, spiece.model or tokenizer.json.
    #[arg(long, value_name = "DIR|FILE")]
    tokenizer: Option<PathBuf>,
}

impl PartArgs {
    /// Whether a transformer is named.
    pub fn names_transformer(&self) -> Option<&Path> {
        self.transformer.as_deref()
    }

    /// Finds the parts.
    ///
    /// # Errors
    /// As [`Components::find`].
    pub fn find(&self, model: &Path) -> Result<Components> {
        let paths: Vec<&PathBuf> = self.text_encoder.iter().filter(|p| p.as_os_str() != "stream").collect();
        if let [_, second, ..] = paths.as_slice() {
            return Err(Error::usage("--text-encoder", "given twice")
                .is(second.display())
                .must("stream, and one path"));
        }
        let overrides = Overrides {
            components: self.components.clone(),
            transformer: self.transformer.clone(),
            vae: self.vae.clone(),
            text_encoder: paths.first().map(|p| (*p).clone()),
            tokenizer: self.tokenizer.clone(),
        };
        Components::find(model, &overrides)
    }

    /// Where the blocks of the text encoder stay.
    pub fn residence(&self) -> Residence {
        match self.text_encoder.iter().any(|p| p.as_os_str() == "stream") {
            true => Residence::Stream,
            false => Residence::Memory,
        }
    }
}

/// Whose behaviour to follow where the released programs differ: the mask of the null text, the cleaning of prompts, and
/// where DPM-Solver++ ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Compat {
    /// Diffusers: the null text's own tokens, prompts cleaned as web captions, an end without noise.
    #[default]
    Diffusers,
    /// The original code: the null text under the prompt's mask, prompts as they are, an end at the last noise level.
    Official,
}

impl Compat {
    /// Name, for records.
    pub fn name(self) -> &'static str {
        match self {
            Compat::Diffusers => "diffusers",
            Compat::Official => "official",
        }
    }

    /// A prompt as it is encoded.
    pub fn clean(self, prompt: &str) -> String {
        match self {
            Compat::Diffusers => captions::clean(prompt),
            Compat::Official => {
                let (text, flag) = captions::original(prompt);
                if let Some(flag) = flag {
                    eprintln!("note: {flag} in the prompt is not read; the size is given by --size");
                }
                text
            }
        }
    }
}

/// Features of prompts, and of what each is guided away from.
pub struct Texts {
    /// `[L, C]` each.
    pub prompts: Vec<Tensor>,
    /// `[L, C]` each; as many as prompts.
    pub nulls: Vec<Tensor>,
}

/// What to encode, and how.
pub struct Encoding<'e> {
    /// Parts of the model.
    pub components: &'e Components,
    /// Where the blocks of the encoder stay.
    pub residence: Residence,
    /// Most tokens of a text.
    pub most: usize,
    /// Whose behaviour.
    pub compat: Compat,
    /// Backend and arithmetic.
    pub run: &'e RunArgs,
}

impl Encoding<'_> {
    /// Loads tokenizer and text encoder.
    ///
    /// # Errors
    /// A part that is missing or does not load, or parts that do not belong together.
    pub fn open(&self) -> Result<Encoder> {
        let (encoder, tokenizer) = self.components.text()?;
        let tokenizer = Tokenizer::open(tokenizer)?;
        let bf16 = self.run.dtype == Dtype::Bf16;
        let model = t5::load(encoder, &self.run.device()?, bf16, self.residence)?;
        if tokenizer.size() > model.config.vocabulary {
            return Err(Error::failure("text encoder", "smaller than the tokenizer's vocabulary")
                .is(model.config.vocabulary)
                .must(format!("at least {}", tokenizer.size()))
                .fix("use the tokenizer that belongs to it"));
        }
        let precision = if bf16 { Precision::Bf16 } else { Precision::F32 };
        Ok(Encoder { tokenizer, model, most: self.most, compat: self.compat, precision })
    }

    /// As [`Encoder::encode`], with an encoder that is forgotten afterwards.
    ///
    /// # Errors
    /// As [`Encoding::open`] and [`Encoder::encode`].
    pub fn encode(&self, prompts: &[String], negatives: &[String]) -> Result<Texts> {
        self.open()?.encode(prompts, negatives)
    }
}

/// A text encoder with its tokenizer.
pub struct Encoder {
    tokenizer: Tokenizer,
    model: t5::T5,
    most: usize,
    compat: Compat,
    precision: Precision,
}

impl Encoder {
    /// Encodes prompts and their negative prompts, where an empty one is the null text; each different text once. Says
    /// what did not fit.
    ///
    /// # Errors
    /// When memory runs out, or a layer that streams cannot be read.
    pub fn encode(&self, prompts: &[String], negatives: &[String]) -> Result<Texts> {
        let mut jobs: Vec<Tokens> = Vec::new();
        let mut job = |text: &str, padded: bool| -> usize {
            let encoded = self.tokenizer.encode_at_most(&self.compat.clean(text), self.most);
            if let Some(cut) = &encoded.cut {
                eprintln!("note: the prompt is longer than {} tokens; not read: {cut:?}", self.most);
            }
            let tokens = if padded { Tokens::padded(encoded.ids, self.most) } else { Tokens::whole(encoded.ids) };
            jobs.iter().position(|known| *known == tokens).unwrap_or_else(|| {
                jobs.push(tokens);
                jobs.len() - 1
            })
        };
        let of_prompts: Vec<usize> = prompts.iter().map(|text| job(text, false)).collect();
        // The original trained with the null text under the prompt's mask: features at the places of padding.
        let masked = |text: &String| self.compat == Compat::Official && text.is_empty();
        let of_nulls: Vec<(usize, bool)> =
            negatives.iter().map(|text| (job(text, masked(text)), masked(text))).collect();
        let features = self.model.encode(&jobs, self.precision)?;
        let prompts: Vec<Tensor> = of_prompts.iter().map(|&job| features[job].clone()).collect();
        let nulls = of_nulls.iter().zip(&prompts).map(|(&(job, masked), prompt)| match masked {
            false => Ok(features[job].clone()),
            true => first_rows(&features[job], prompt.dim(0)),
        });
        let nulls = nulls.collect::<Result<_>>()?;
        Ok(Texts { prompts, nulls })
    }
}

fn first_rows(features: &Tensor, count: usize) -> Result<Tensor> {
    let width = features.dim(1);
    let count = count.min(features.dim(0));
    Tensor::from_f32(features.device(), &[count, width], &features.values()?[..count * width])
}

/// The texts of a file, one on every line; empty lines are left out.
///
/// # Errors
/// A file that cannot be read, or without a text.
pub fn lines(path: &Path) -> Result<Vec<String>> {
    let text = files::read_text(path)?;
    let found: Vec<String> = text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_string).collect();
    match found.is_empty() {
        true => Err(Error::usage(path.display().to_string(), "no text").must("a text on every line")),
        false => Ok(found),
    }
}

/// Pixels along a side of a latent's pixel: those of the autoencoder; 1 where the latents of three channels are pictures
/// themselves. Where nothing decodes, latents are as those of the released autoencoder.
///
/// # Errors
/// An autoencoder that cannot be described.
pub fn factor(components: &Components, config: &PixArtConfig) -> Result<usize> {
    match components.vae.as_deref() {
        Some(vae) => Decoder::factor_of(vae),
        None if config.in_channels == 3 => Ok(1),
        None => Ok(8),
    }
}

/// Reads features that `graft encode` wrote: those of the prompts, and of what they are guided away from.
///
/// # Errors
/// A tensor that is missing or of another shape.
pub fn read(path: &Path, device: &Device) -> Result<Texts> {
    let file = TensorFile::open(path)?;
    let rows = |name: &str| -> Result<Vec<Tensor>> {
        let place = || format!("{}: {name}", path.display());
        let Some(view) = file.get(name) else {
            return Err(Error::failure(place(), "missing tensor")
                .must("present, [n, L, C]")
                .fix("write it with graft encode"));
        };
        let &[n, l, c] = view.shape else {
            return Err(Error::failure(place(), "wrong rank").is(format!("{:?}", view.shape)).must("[n, L, C]"));
        };
        let mask = match file.get(&format!("{name}_mask")) {
            None => vec![1; n * l],
            Some(mask) if mask.shape == [n, l] => mask.to_i64()?,
            Some(mask) => {
                return Err(Error::failure(format!("{}_mask", place()), "wrong shape")
                    .is(format!("{:?}", mask.shape))
                    .must(format!("[{n}, {l}]")));
            }
        };
        let values = view.to_f32()?;
        let text = |i: usize| {
            let kept = (0..l).filter(|j| mask[i * l + j] != 0);
            let kept: Vec<f32> = kept.flat_map(|j| values[(i * l + j) * c..][..c].iter().copied()).collect();
            match kept.is_empty() {
                true => Err(Error::failure(place(), "a text without tokens").is(i).must("at least one")),
                false => Tensor::from_f32(device, &[kept.len() / c, c], &kept),
            }
        };
        (0..n).map(text).collect()
    };
    Ok(Texts { prompts: rows("text")?, nulls: rows("negative")? })
}
