//! Models with sites and what they train on: the same loss, teacher and noised batches for each kind.

use super::batches::images;
use super::learner::{Learner, Step};
use super::objective::{Noised, diffusion_loss, noise_batch};
use super::teacher::{Teacher, Terms, taught_loss};
use crate::autograd::{Graph, Var};
use crate::error::{Error, Result};
use crate::io::datasets::ImageSet;
use crate::io::hash;
use crate::models::dit::{Dit, DitConfig};
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
    /// Step that timesteps, dropout and noise are drawn from.
    pub step: u64,
}

/// A model with sites, as the loop and both stages of a graft train it.
pub trait SiteLearner: SiteModel + Learner<Teacher = Teacher<Self>> {
    /// Chosen examples, noised.
    ///
    /// # Errors
    /// Examples that cannot be read, or too little memory.
    fn noised(&self, data: &Self::Data, chosen: &[u32], draw: &Draw<'_>) -> Result<Noised<Self::Condition>>;

    /// Refuses data that was not made for the model.
    ///
    /// # Errors
    /// What it is and what the model needs.
    fn check(&self, data: &Self::Data) -> Result<()>;

    /// Bytes that data takes in memory.
    fn bytes(data: &Self::Data) -> usize;

    /// A digest of all data.
    fn digest(data: &Self::Data) -> String;

    /// As many blank examples as a batch needs, to rehearse with.
    fn blank(config: &Self::Config, n: usize) -> Self::Data;
}

/// The loss of a step of any model with sites.
pub(super) fn site_loss<'m, M: SiteLearner>(
    g: &Graph<'m>,
    model: &'m M,
    step: &Step<'_, M::Data>,
    teacher: Option<&Teacher<M>>,
) -> Result<(Var, Option<Terms>)> {
    let s = step.settings;
    let draw = Draw { schedule: step.schedule, dropout: s.label_dropout, seed: s.seed, step: step.number };
    let noised = model.noised(step.data, step.chosen, &draw)?;
    let checkpoint = s.activation_checkpointing;
    match teacher {
        Some(teacher) => taught_loss(g, model, &noised, checkpoint, teacher).map(|(loss, terms)| (loss, Some(terms))),
        None => diffusion_loss(g, model, &noised, checkpoint).map(|loss| (loss, None)),
    }
}

impl SiteLearner for Dit {
    fn noised(&self, data: &ImageSet, chosen: &[u32], draw: &Draw<'_>) -> Result<Noised<Tensor>> {
        let device = Dit::device(self);
        let batch = images(device, data, chosen)?;
        let null = self.config.classes as i32;
        noise_batch(device, &batch.images, draw, |dropped| {
            let labels = batch.labels.iter().zip(dropped).map(|(label, dropped)| if *dropped { null } else { *label });
            Tensor::from_i32(device, &[batch.labels.len()], &labels.collect::<Vec<_>>())
        })
    }

    fn check(&self, data: &ImageSet) -> Result<()> {
        let c = &self.config;
        let fits = (data.channels, data.height, data.width) == (c.in_channels, c.input_size, c.input_size)
            && data.class_names.len() <= c.classes;
        if fits {
            return Ok(());
        }
        let found = format!("{} channels, {}×{}", data.channels, data.height, data.width);
        Err(Error::usage("data", "the images do not fit the model")
            .is(format!("{found}, {} classes", data.class_names.len()))
            .must(format!(
                "{} channels, {}×{}, at most {} classes",
                c.in_channels, c.input_size, c.input_size, c.classes
            ))
            .fix("name the data set the base model was trained on"))
    }

    fn bytes(data: &ImageSet) -> usize {
        data.pixels.len() + data.labels.len()
    }

    fn digest(data: &ImageSet) -> String {
        hash::sha256(format!("{} {}", hash::sha256(&data.pixels), hash::sha256(&data.labels)).as_bytes())
    }

    fn blank(config: &DitConfig, n: usize) -> ImageSet {
        let (channels, side) = (config.in_channels, config.input_size);
        let pixels = vec![0; n * channels * side * side];
        ImageSet { n, channels, height: side, width: side, pixels, labels: vec![0; n], class_names: Vec::new() }
    }
}
