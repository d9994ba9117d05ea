//! Pictures of a model that reads text, looked up among the real ones that their captions ask for.

use super::plan::Plan;
use crate::error::{Error, Result};
use crate::eval::retrieval::{Retrieval, of_drawn, of_set, retrieve};
use crate::io::captioned;
use crate::io::datasets::Split;
use crate::models::pipeline::{Components, Overrides};
use crate::models::pixart::{PixArt, PixArtConfig};
use crate::models::sites::{SiteConfig, SiteModel};
use crate::models::t5::{self, Residence, Tokenizer, Tokens};
use crate::sample::captions;
use crate::tensor::{Device, Tensor};
use std::path::Path;

/// Captions that no training has seen, encoded, and the real pictures.
pub(super) struct Lookup {
    /// Features `[L, C]` of the captions.
    pub prompts: Vec<Tensor>,
    /// Features of the empty text.
    pub null: Tensor,
    /// Coarse features and style of every real picture.
    real: Vec<(Vec<f32>, u8)>,
    /// Number of the real picture of the first caption.
    first: usize,
}

impl Lookup {
    /// Reads the pictures in `folder` and encodes as many captions as the plan compares samples.
    ///
    /// # Errors
    /// Pictures or an encoder that cannot be read, or a base that does not draw such pictures.
    pub fn new(plan: &Plan, folder: &Path, device: &Device) -> Result<Lookup> {
        let (seen, unseen) = (captioned::emoji(folder, Split::Train)?, captioned::emoji(folder, Split::Test)?);
        let parts = Components::find(&plan.base, &Overrides::default())?;
        let config = PixArt::describe(&plan.base)?;
        fits(&config, [unseen.images.channels, unseen.images.height])?;
        let (encoder, tokenizer) = parts.text()?;
        let (tokenizer, encoder) = (Tokenizer::open(tokenizer)?, t5::load(encoder, device, false, Residence::Memory)?);
        let count = plan.eval.samples.min(unseen.captions.len());
        let texts = unseen.captions[..count].iter().map(String::as_str).chain([""]);
        let tokens =
            texts.map(|text| Tokens::whole(tokenizer.encode_at_most(&captions::clean(text), config.max_tokens).ids));
        let mut prompts = encoder.encode(&tokens.collect::<Vec<_>>(), plan.distill.dtype.into())?;
        let null = prompts.pop().ok_or_else(|| Error::failure("captions", "none").must("at least one"))?;
        let mut real = of_set(&seen)?;
        let first = real.len();
        real.extend(of_set(&unseen)?);
        Ok(Lookup { prompts, null, real, first })
    }

    /// Looks up samples `[n, C, S, S]` of the captions in their order.
    ///
    /// # Errors
    /// Values that are not finite.
    pub fn find(&self, samples: &Tensor) -> Result<Retrieval> {
        retrieve(&of_drawn(samples, self.first..)?, &self.real)
    }
}

fn fits(config: &PixArtConfig, pictures: [usize; 2]) -> Result<()> {
    match config.picture() == pictures {
        true => Ok(()),
        false => Err(Error::usage("eval: captions", "the base does not draw pictures of this kind")
            .is(format!("{:?} channels and side", config.picture()))
            .must(format!("{pictures:?}, without an autoencoder"))),
    }
}
