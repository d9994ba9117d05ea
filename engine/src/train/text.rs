//! Training of models that read text: a transformer with its text encoder from captions, or a transformer alone on
//! latents and features that were made before.

use super::batches::{Examples, images};
use super::learner::{Learner, Step};
use super::objective::{diffusion_loss, noise_batch};
use super::sites::Draw;
use super::teacher::Terms;
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::{Error, Result};
use crate::io::datasets::ImageSet;
use crate::models::pixart::{PixArt, Text, TextCondition};
use crate::models::t5::T5;
use crate::tensor::{Device, Tensor};

/// Pictures with the ids of their captions.
#[derive(Clone, Debug)]
pub struct Captioned {
    /// The pictures; their labels are not read.
    pub images: ImageSet,
    /// Ids of every picture's caption, the end token last.
    pub captions: Vec<Vec<u32>>,
    /// Ids of the empty text.
    pub null: Vec<u32>,
}

impl Examples for Captioned {
    fn count(&self) -> usize {
        self.images.n.min(self.captions.len())
    }
}

/// A transformer and the text encoder that it reads.
pub struct TextToImage {
    /// The transformer.
    pub transformer: PixArt,
    /// The encoder, with all blocks in memory.
    pub encoder: T5,
}

impl TextToImage {
    /// Features of texts given by their ids, padded to the longest.
    fn read<'m>(&'m self, g: &Graph<'m>, texts: &[&[u32]]) -> Result<Text> {
        let longest = texts.iter().map(|ids| ids.len()).max().unwrap_or(0);
        let padded = texts.iter().flat_map(|ids| {
            let ids = ids.iter().map(|&id| i32::try_from(id).unwrap_or(i32::MAX));
            ids.chain(std::iter::repeat(0)).take(longest)
        });
        let device = self.encoder.device();
        let ids = Tensor::from_i32(device, &[texts.len(), longest], &padded.collect::<Vec<i32>>())?;
        let counts: Vec<usize> = texts.iter().map(|ids| ids.len()).collect();
        let counted: Vec<i32> = counts.iter().map(|&count| count as i32).collect();
        let features = self.encoder.forward(g, &ids, &Tensor::from_i32(device, &[texts.len()], &counted)?)?;
        Ok(Text { features, counts, constant: false })
    }
}

impl Learner for TextToImage {
    type Data = Captioned;
    type Teacher = std::convert::Infallible;

    fn device(&self) -> &Device {
        self.transformer.device()
    }

    fn stores(&self) -> Vec<&ParamStore> {
        vec![&self.transformer.params, &self.encoder.params]
    }

    fn stores_mut(&mut self) -> Vec<&mut ParamStore> {
        vec![&mut self.transformer.params, &mut self.encoder.params]
    }

    fn loss<'m>(
        &'m self,
        g: &Graph<'m>,
        step: &Step<'_, Captioned>,
        _teacher: Option<&Self::Teacher>,
    ) -> Result<(Var, Option<Terms>)> {
        let batch = images(self.device(), &step.data.images, step.chosen)?;
        let s = step.settings;
        let draw = Draw { schedule: step.schedule, dropout: s.label_dropout, seed: s.seed, step: step.number };
        let noised = noise_batch(self.device(), &batch.images, &draw, |dropped| {
            let read = |(&index, dropped): (&u32, &bool)| match dropped {
                true => &step.data.null[..],
                false => &step.data.captions[index as usize],
            };
            let text = self.read(g, &step.chosen.iter().zip(dropped).map(read).collect::<Vec<_>>())?;
            Ok(TextCondition { text, micro: None })
        })?;
        Ok((diffusion_loss(g, &self.transformer, &noised, s.activation_checkpointing)?, None))
    }

    fn duplicate(&self) -> Result<TextToImage> {
        Ok(TextToImage { transformer: self.transformer.duplicate()?, encoder: self.encoder.duplicate()? })
    }
}

/// Features of several texts as one batch, `[B, L, C]` with zeros behind the shorter ones.
///
/// # Errors
/// No text, or features of different widths.
pub fn pad(device: &Device, texts: &[&Tensor]) -> Result<Text> {
    let width = texts.first().map_or(0, |text| text.dim(1));
    if let Some(other) = texts.iter().find(|text| text.dim(1) != width || text.dim(0) == 0) {
        return Err(Error::failure("texts", "features do not fit each other")
            .is(other.shape())
            .must(format!("[L, {width}]")));
    }
    let counts: Vec<usize> = texts.iter().map(|text| text.dim(0)).collect();
    let longest = counts.iter().copied().max().unwrap_or(1);
    let values = texts.iter().map(|text| text.values()).collect::<Result<Vec<_>>>()?;
    let mut features = device.empty(&[texts.len(), longest, width])?;
    features.edit(|to| {
        to.fill(0.0);
        for (to, from) in to.chunks_mut((longest * width).max(1)).zip(&values) {
            to[..from.len()].copy_from_slice(from);
        }
    })?;
    Ok(Text { features: Var::constant(features), counts, constant: false })
}
