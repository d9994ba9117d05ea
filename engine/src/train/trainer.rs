//! The training loop: one diffusion step after another, with checkpoints, a loss log and a word to the caller.

use super::checkpoint::Home;
pub use super::checkpoint::{CHECKPOINT, LOSS_LOG};
use super::examples::{Draw, Examples, Stream};
use super::objective::diffusion_loss;
use super::optimizer::{AdamW, AdamWSettings};
use super::teacher::{Teacher, Terms, taught_loss};
use crate::autograd::{Graph, Precision};
use crate::error::{Error, Result};
use crate::models::sites::SiteModel;
use crate::sample::schedule::Schedule;
use crate::tensor::Device;
use serde::Serialize;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

/// What a loop does.
#[derive(Clone, Debug)]
pub struct LoopSettings {
    /// Updates in all.
    pub steps: u64,
    /// Images per update.
    pub batch: usize,
    /// Seed of data order, timesteps, dropout and noise.
    pub seed: u64,
    /// Probability that a label is replaced by the null label.
    pub label_dropout: f64,
    /// Arithmetic of products.
    pub precision: Precision,
    /// Updates between checkpoints.
    pub checkpoint_every: u64,
    /// Recompute blocks in the backward pass.
    pub activation_checkpointing: bool,
}

/// A line of the loss log.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Progress {
    /// Updates done.
    pub step: u64,
    /// Updates in all.
    pub steps: u64,
    /// Loss of the update.
    pub loss: f64,
    /// Norm of its gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Images per second of the update.
    pub images_per_second: f64,
    /// What the loss is the sum of, where there is a teacher.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub terms: Option<Terms>,
}

/// A model in training.
pub struct Trainer<M: SiteModel> {
    /// The model; its parameters are the raw, not the averaged ones.
    pub model: M,
    /// Who adds terms to the loss.
    pub teacher: Option<Teacher<M>>,
    optimiser: AdamW,
    settings: LoopSettings,
    schedule: Schedule,
    home: Option<Home>,
}

impl<M: SiteModel> Trainer<M> {
    /// A trainer in a run folder, resumed from its checkpoint where there is one. `fingerprint` tells runs apart.
    ///
    /// # Errors
    /// A folder that cannot be written or that another process uses, or a checkpoint of another run.
    pub fn open(
        model: M,
        optimiser: AdamWSettings,
        settings: LoopSettings,
        folder: &Path,
        fingerprint: String,
    ) -> Result<Trainer<M>> {
        let home = Home::open(folder, fingerprint)?;
        let mut trainer = Trainer::homeless(model, optimiser, settings)?;
        home.restore(&mut [(trainer.model.params_mut(), &mut trainer.optimiser)])?;
        Ok(Trainer { home: Some(home), ..trainer })
    }

    /// A trainer without a folder: it can take single updates and leaves nothing behind.
    ///
    /// # Errors
    /// Settings out of range, or too little memory.
    pub fn homeless(model: M, optimiser: AdamWSettings, settings: LoopSettings) -> Result<Trainer<M>> {
        let optimiser = AdamW::new(optimiser, model.params())?;
        Ok(Trainer { model, teacher: None, optimiser, settings, schedule: Schedule::default(), home: None })
    }

    /// The optimiser with its state.
    pub fn optimiser(&self) -> &AdamW {
        &self.optimiser
    }

    /// Updates done so far.
    pub fn step(&self) -> u64 {
        self.optimiser.step
    }

    /// Trains to the last step, or until `report` breaks; a checkpoint is written either way.
    ///
    /// # Errors
    /// A loss that is not finite (the last good checkpoint stays), or a full disk.
    pub fn run(&mut self, data: &dyn Examples<M>, report: &mut dyn FnMut(&Progress) -> ControlFlow<()>) -> Result<()> {
        let mut batches = data.stream(self.settings.batch, self.settings.seed)?;
        let mut log = match &self.home {
            Some(home) => home.loss_log(self.optimiser.step)?,
            None => return Err(Error::failure("training", "no run folder").must("a trainer that was opened in one")),
        };
        while self.optimiser.step < self.settings.steps {
            let progress = self.update(batches.as_mut())?;
            log.append(&progress)?;
            let stop = report(&progress).is_break();
            if stop || progress.step % self.settings.checkpoint_every == 0 || progress.step == self.settings.steps {
                let home = self.home.as_ref();
                home.map_or(Ok(()), |home| home.save([(self.model.params(), &self.optimiser)]))?;
            }
            if stop {
                break;
            }
        }
        Ok(())
    }

    /// One update.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, naming the step: nothing is changed then.
    pub fn update(&mut self, batches: &mut dyn Stream<M>) -> Result<Progress> {
        let start = Instant::now();
        let (s, step) = (&self.settings, self.optimiser.step);
        let (schedule, dropout) = (&self.schedule, s.label_dropout);
        let noised = batches.noised(&self.model, &Draw { schedule, dropout, seed: s.seed, place: step, step })?;
        let checkpoint = s.activation_checkpointing;
        let (loss, terms, grads) = {
            let g = Graph::training(s.precision);
            let (loss, terms) = match &self.teacher {
                Some(teacher) => {
                    taught_loss(&g, &self.model, &noised, checkpoint, teacher).map(|(l, terms)| (l, Some(terms)))
                }
                None => diffusion_loss(&g, &self.model, &noised, checkpoint).map(|loss| (loss, None)),
            }?;
            let value = f64::from(loss.tensor().values()?[0]);
            if !value.is_finite() {
                return Err(Error::failure(format!("step {step}"), "the loss is not finite")
                    .is(value)
                    .must("a finite number")
                    .fix("lower the learning rate, or use f32 products; the last checkpoint is good"));
            }
            (value, terms, g.backward(&loss)?)
        };
        let lr = self.optimiser.settings.lr_at(step, s.steps);
        let grad_norm = self.optimiser.update(self.model.params_mut(), &grads, lr)?;
        let seconds = start.elapsed().as_secs_f64();
        Ok(Progress {
            step: step + 1,
            steps: s.steps,
            loss,
            grad_norm,
            lr,
            images_per_second: s.batch as f64 / seconds,
            terms,
        })
    }

    /// The model with the averaged parameters (the raw ones where no average is kept), adapters included.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn averaged(&self) -> Result<M> {
        // Every parameter is replaced, so none needs memory of its own.
        let mut model = M::unset(self.model.config().clone(), &Device::dry())?;
        *model.params_mut() = self.model.params().duplicate();
        for slot in self.optimiser.slots() {
            if let Some(ema) = &slot.ema {
                let params = model.params_mut();
                let shape = params.get(slot.id).value.shape();
                params.set(slot.id, ema.copy()?.into_shape(shape.dims())?)?;
            }
        }
        Ok(model)
    }
}
