//! The training loop: one diffusion step after another, with checkpoints, a loss log and a word to the caller.

use super::batches::Batches;
use super::checkpoint::Home;
pub use super::checkpoint::{CHECKPOINT, LOSS_LOG};
use super::learner::{Learner, Step};
use super::optimizer::{AdamW, AdamWSettings};
use super::teacher::Terms;
use crate::autograd::{Graph, ParamStore, Precision};
use crate::error::{Error, Result};
use crate::models::dit::Dit;
use crate::sample::schedule::Schedule;
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
    /// Probability that a label or caption is replaced by the null label or the empty text.
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
pub struct Trainer<M: Learner = Dit> {
    /// The model; its parameters are the raw, not the averaged ones.
    pub model: M,
    /// Who adds terms to the loss.
    pub teacher: Option<M::Teacher>,
    /// One for each store of the model, all at the same step.
    optimisers: Vec<AdamW>,
    settings: LoopSettings,
    schedule: Schedule,
    home: Option<Home>,
}

impl<M: Learner> Trainer<M> {
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
        let stores = trainer.model.stores_mut();
        home.restore(&mut stores.into_iter().zip(&mut trainer.optimisers).collect::<Vec<_>>())?;
        Ok(Trainer { home: Some(home), ..trainer })
    }

    /// A trainer without a folder: it can take single updates and leaves nothing behind.
    ///
    /// # Errors
    /// Settings out of range, or too little memory.
    pub fn homeless(model: M, optimiser: AdamWSettings, settings: LoopSettings) -> Result<Trainer<M>> {
        let optimisers = model.stores().into_iter().map(|store| AdamW::new(optimiser, store));
        let optimisers = optimisers.collect::<Result<_>>()?;
        Ok(Trainer { model, teacher: None, optimisers, settings, schedule: Schedule::default(), home: None })
    }

    /// The optimiser of the first store with its state.
    pub fn optimiser(&self) -> &AdamW {
        &self.optimisers[0]
    }

    /// Updates done so far.
    pub fn step(&self) -> u64 {
        self.optimiser().step
    }

    /// Stores with their optimisers.
    fn parts(&self) -> impl Iterator<Item = (&ParamStore, &AdamW)> {
        self.model.stores().into_iter().zip(&self.optimisers)
    }

    /// Trains to the last step, or until `report` breaks; a checkpoint is written either way.
    ///
    /// # Errors
    /// A loss that is not finite (the last good checkpoint stays), or a full disk.
    pub fn run(&mut self, data: &M::Data, report: &mut dyn FnMut(&Progress) -> ControlFlow<()>) -> Result<()> {
        let mut batches = Batches::new(data, self.settings.batch, self.settings.seed)?;
        let mut log = match &self.home {
            Some(home) => home.loss_log(self.step())?,
            None => return Err(Error::failure("training", "no run folder").must("a trainer that was opened in one")),
        };
        while self.step() < self.settings.steps {
            let progress = self.update(&mut batches)?;
            log.append(&progress)?;
            let stop = report(&progress).is_break();
            if stop || progress.step % self.settings.checkpoint_every == 0 || progress.step == self.settings.steps {
                let home = self.home.as_ref();
                home.map_or(Ok(()), |home| home.save(self.parts()))?;
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
    /// A loss or gradient that is not finite, naming the step: nothing is changed then, but for the stores before the
    /// one with such a gradient.
    pub fn update(&mut self, batches: &mut Batches<'_, M::Data>) -> Result<Progress> {
        let start = Instant::now();
        let (s, step) = (&self.settings, self.step());
        let data = batches.data();
        let chosen = batches.chosen(step);
        let (loss, terms, grads) = {
            let g = Graph::training(s.precision);
            let place = Step { data, chosen, number: step, settings: s, schedule: &self.schedule };
            let (loss, terms) = self.model.loss(&g, &place, self.teacher.as_ref())?;
            let value = f64::from(loss.tensor().values()?[0]);
            if !value.is_finite() {
                return Err(Error::failure(format!("step {step}"), "the loss is not finite")
                    .is(value)
                    .must("a finite number")
                    .fix("lower the learning rate, or use f32 products; the last checkpoint is good"));
            }
            (value, terms, g.backward(&loss)?)
        };
        let lr = self.optimiser().settings.lr_at(step, s.steps);
        let mut squares = 0.0;
        for (store, optimiser) in self.model.stores_mut().into_iter().zip(&mut self.optimisers) {
            squares += optimiser.update(store, &grads, lr)?.powi(2);
        }
        let seconds = start.elapsed().as_secs_f64();
        Ok(Progress {
            step: step + 1,
            steps: s.steps,
            loss,
            grad_norm: squares.sqrt(),
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
        let mut model = self.model.duplicate()?;
        for (store, optimiser) in model.stores_mut().into_iter().zip(&self.optimisers) {
            for slot in optimiser.slots() {
                if let Some(ema) = &slot.ema {
                    let shape = store.get(slot.id).value.shape();
                    store.set(slot.id, ema.copy()?.into_shape(shape.dims())?)?;
                }
            }
        }
        Ok(model)
    }
}
