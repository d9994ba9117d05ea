//! What models train on: sets of examples, and streams of noised batches from them.

use super::batches::Batches;
use super::objective::{Noised, noise_batch};
use crate::error::{Error, Result};
use crate::io::datasets::ImageSet;
use crate::io::hash;
use crate::models::dit::Dit;
use crate::models::sites::SiteModel;
use crate::sample::schedule::Schedule;
use crate::tensor::Tensor;

/// How a batch is drawn.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'s> {
    /// Noise schedule.
    pub schedule: &'s Schedule,
    /// Probability that a condition is replaced by the null label or text.
    pub dropout: f64,
    /// Seed of timesteps, dropout and noise.
    pub seed: u64,
    /// Place in the order of the examples.
    pub place: u64,
    /// Step that timesteps, dropout and noise are drawn from.
    pub step: u64,
}

/// Noised batches, addressed by step: the same seeds give the same ones, whatever ran before.
pub trait Stream<M: SiteModel> {
    /// The batch of a step for `model`.
    ///
    /// # Errors
    /// Examples that cannot be read, or too little memory.
    fn noised(&mut self, model: &M, draw: &Draw<'_>) -> Result<Noised<M::Condition>>;
}

/// A set of examples for models of a kind.
pub trait Examples<M: SiteModel>: Sync {
    /// How many there are.
    fn count(&self) -> usize;

    /// Bytes that they take in memory.
    fn bytes(&self) -> usize;

    /// A digest of all of them.
    ///
    /// # Errors
    /// When they cannot be read.
    fn digest(&self) -> Result<String>;

    /// Refuses a model that they were not made for.
    ///
    /// # Errors
    /// What they are and what the model needs.
    fn check(&self, model: &M) -> Result<()>;

    /// Shuffled passes over them in batches.
    ///
    /// # Errors
    /// Fewer examples than a batch, or an empty batch.
    fn stream(&self, batch: usize, seed: u64) -> Result<Box<dyn Stream<M> + '_>>;
}

impl Stream<Dit> for Batches<'_> {
    fn noised(&mut self, model: &Dit, draw: &Draw<'_>) -> Result<Noised<Tensor>> {
        let device = model.device();
        let batch = self.get(device, draw.place)?;
        let null = model.config.classes as i32;
        noise_batch(device, &batch.images, draw, |dropped| {
            let labels = batch.labels.iter().zip(dropped).map(|(label, dropped)| if *dropped { null } else { *label });
            Tensor::from_i32(device, &[batch.labels.len()], &labels.collect::<Vec<_>>())
        })
    }
}

impl Examples<Dit> for ImageSet {
    fn count(&self) -> usize {
        self.n
    }

    fn bytes(&self) -> usize {
        self.pixels.len() + self.labels.len()
    }

    fn digest(&self) -> Result<String> {
        Ok(hash::sha256(format!("{} {}", hash::sha256(&self.pixels), hash::sha256(&self.labels)).as_bytes()))
    }

    fn check(&self, model: &Dit) -> Result<()> {
        let c = &model.config;
        let fits = (self.channels, self.height, self.width) == (c.in_channels, c.input_size, c.input_size)
            && self.class_names.len() <= c.classes;
        if fits {
            return Ok(());
        }
        let found = format!("{} channels, {}×{}", self.channels, self.height, self.width);
        Err(Error::usage("data", "the images do not fit the model")
            .is(format!("{found}, {} classes", self.class_names.len()))
            .must(format!(
                "{} channels, {}×{}, at most {} classes",
                c.in_channels, c.input_size, c.input_size, c.classes
            ))
            .fix("name the data set the base model was trained on"))
    }

    fn stream(&self, batch: usize, seed: u64) -> Result<Box<dyn Stream<Dit> + '_>> {
        Ok(Box::new(Batches::new(self, batch, seed)?))
    }
}

/// As many blank images as a batch needs, to rehearse with.
pub fn blank_images(channels: usize, side: usize, n: usize) -> ImageSet {
    let pixels = vec![0; n * channels * side * side];
    ImageSet { n, channels, height: side, width: side, pixels, labels: vec![0; n], class_names: Vec::new() }
}
