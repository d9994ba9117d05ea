//! Stage 1, activation distillation: every grafted site learns to give what the operator gave that it replaces.
//!
//! One teacher pass over noised images shows input and output of every site; each site takes its update while the pass
//! goes by, so that no activation is stored, and no site sees another. Where a [`super::cache`] is asked for, the
//! passes are made once, before the first update. Labels are kept (the teacher predicts, it does not train). As in the
//! other loops, a step draws everything from (seed, step), so that a resumed run equals an unbroken one to the bit.

use super::cache::{Cache, Filling};
use super::plan::Assignment;
use super::settings::DistillConfig;
use super::student::{Lesson, ResidualSums, Student};
use super::{assemble, pair};
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::{Error, Result};
use crate::io::jsonl::{self, JsonLog};
use crate::models::sites::{Seen, SiteModel};
use crate::sample::schedule::Schedule;
use crate::train::batches::{Batches, Examples as _};
use crate::train::checkpoint::Home;
use crate::train::optimizer::AdamW;
use crate::train::sites::{Draw, SiteLearner};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

pub use super::student::Residual;

/// Residuals on held-out batches, before the first, after the last and after every so many updates: one line each.
pub const HELD_OUT_LOG: &str = "held_out.jsonl";

/// Steps from which held-out batches draw timesteps and noise: beyond every training step.
const HELD_OUT_STEPS: u64 = 1 << 39;

/// A line of the loss log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// Updates done.
    pub step: u64,
    /// Updates in all.
    pub steps: u64,
    /// Loss of every site before this update.
    pub losses: BTreeMap<String, f64>,
    /// Learning rate.
    pub lr: f64,
    /// Images per second of the update.
    pub images_per_second: f64,
}

impl Progress {
    /// Mean loss over the sites.
    pub fn mean_loss(&self) -> f64 {
        self.losses.values().sum::<f64>() / self.losses.len().max(1) as f64
    }
}

/// Residuals of every site after a number of updates.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct HeldOut {
    pub step: u64,
    pub sites: BTreeMap<String, Residual>,
}

/// The sites of a plan in training beside their teacher.
pub struct Distiller<'t, M: SiteLearner> {
    teacher: &'t M,
    assignments: Vec<Assignment>,
    pub(super) students: Vec<Student>,
    config: DistillConfig,
    schedule: Schedule,
    cache: Option<Cache>,
    pub(super) home: Option<Home>,
}

impl<'t, M: SiteLearner> Distiller<'t, M> {
    /// New sites in a folder, resumed from its checkpoint where there is one. `fingerprint` tells runs apart.
    ///
    /// # Errors
    /// An operator that does not fit the teacher, a folder that cannot be written or that another process uses, or a
    /// checkpoint of another run.
    pub fn open(
        teacher: &'t M,
        assignments: &[Assignment],
        config: &DistillConfig,
        folder: &Path,
        fingerprint: String,
    ) -> Result<Self> {
        let home = Home::open(folder, fingerprint)?;
        let mut distiller = Distiller::homeless(teacher, assignments, config)?;
        home.restore(&mut distiller.state_mut())?;
        Ok(Distiller { home: Some(home), ..distiller })
    }

    /// New sites without a folder: they can take single updates and leave nothing behind.
    ///
    /// # Errors
    /// An operator that does not fit the teacher, or too little memory.
    pub fn homeless(teacher: &'t M, assignments: &[Assignment], config: &DistillConfig) -> Result<Self> {
        let students = pair::students(teacher, assignments, config)?;
        let (assignments, config, schedule) = (assignments.to_vec(), config.clone(), Schedule::default());
        Ok(Distiller { teacher, assignments, students, config, schedule, cache: None, home: None })
    }

    /// What a checkpoint holds, to be changed.
    pub(super) fn state_mut(&mut self) -> Vec<(&mut ParamStore, &mut AdamW)> {
        self.students.iter_mut().map(|s| (&mut s.params, &mut s.optimiser)).collect()
    }

    /// Writes the checkpoint.
    pub(super) fn save(&self) -> Result<()> {
        let home = self.home.as_ref();
        home.map_or(Ok(()), |home| home.save(self.students.iter().map(|s| (&s.params, &s.optimiser))))
    }

    /// Updates done so far.
    pub fn step(&self) -> u64 {
        self.students.first().map_or(0, |s| s.optimiser.step)
    }

    /// The teacher with the sites as they are now.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn model(&self) -> Result<M> {
        self.assembled(self.students.iter().map(|s| (&s.assignment, &s.params)))
    }

    /// The teacher with the sites as they were initialised.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn initial_model(&self) -> Result<M> {
        // Without optimisers: nothing is trained here.
        let fresh = pair::start(self.teacher, &self.assignments, &self.config)?;
        self.assembled(fresh.iter().map(|(assignment, params, _)| (assignment, params)))
    }

    fn assembled<'s>(&self, sites: impl IntoIterator<Item = (&'s Assignment, &'s ParamStore)>) -> Result<M> {
        let config = assemble::grafted_config(self.teacher.config(), &self.assignments)?;
        assemble::graft(self.teacher, config, sites)
    }

    /// Makes the cache of activations that the settings ask for complete, where they ask for one: `report` sees its
    /// size before anything is written and then every batch. From then on updates read it. Returns whether it is
    /// complete; `report` may break.
    ///
    /// # Errors
    /// Images that do not fit the teacher; a disk that is too small or full; a cache of something else.
    pub fn fill_cache(&mut self, data: &M::Data, report: &mut dyn FnMut(&Filling) -> ControlFlow<()>) -> Result<bool> {
        self.teacher.check(data)?;
        let sites: Vec<String> = self.students.iter().map(|s| s.assignment.to_string()).collect();
        let Some(mut cache) = Cache::open(&self.config, self.teacher, data, &sites)? else { return Ok(true) };
        let mut batches = Batches::new(data, self.config.batch, self.config.seed)?;
        for (shard, missing) in cache.missing(&sites)? {
            if report(&cache.filling(shard)).is_break() {
                return Ok(false);
            }
            self.teach(&mut batches, shard, &mut |student, lesson| {
                let site = student.assignment.to_string();
                if missing.contains(&site) { cache.store(&site, shard, lesson) } else { Ok(()) }
            })?;
        }
        cache.unlock();
        self.cache = Some(cache);
        Ok(true)
    }

    /// Trains to the last step, or until `report` breaks; a checkpoint is written either way. Residuals on `held_out`
    /// are measured before the first step, after every `held_out_every` and after the last.
    ///
    /// # Errors
    /// Images that do not fit the teacher; a loss that is not finite, naming site and step (the last good checkpoint
    /// stays); a full disk.
    pub fn run(
        &mut self,
        data: &M::Data,
        held_out: &M::Data,
        report: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<()> {
        self.teacher.check(data)?;
        self.teacher.check(held_out)?;
        let mut batches = Batches::new(data, self.config.batch, self.config.seed)?;
        let mut losses = match &self.home {
            Some(home) => home.loss_log(self.step())?,
            None => return Err(Error::failure("stage 1", "no run folder").must("a distiller that was opened in one")),
        };
        self.log_residuals(held_out)?;
        while self.step() < self.config.steps {
            let progress = self.update(&mut batches)?;
            losses.append(&progress)?;
            // Before the checkpoint: who resumes there finds the line.
            self.log_residuals(held_out)?;
            let stop = report(&progress).is_break();
            if stop || progress.step % self.config.checkpoint_every == 0 || progress.step == self.config.steps {
                self.save()?;
            }
            if stop {
                break;
            }
        }
        Ok(())
    }

    /// One update of every site.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, naming site and step: that site is not changed then.
    pub fn update(&mut self, batches: &mut Batches<'_, M::Data>) -> Result<Progress> {
        let start = Instant::now();
        let (step, steps) = (self.step(), self.config.steps);
        let lr = self.config.optimizer.lr_at(step, steps);
        let mut losses = BTreeMap::new();
        let mut learn = |student: &mut Student, lesson: &Lesson<'_>| -> Result<()> {
            losses.insert(student.assignment.to_string(), student.learn(lesson, lr)?);
            Ok(())
        };
        match &mut self.cache {
            None => self.teach(batches, step, &mut learn)?,
            Some(cache) => {
                let samples = cache.samples(step).to_vec();
                for student in &mut self.students {
                    let kept =
                        cache.recall(SiteModel::device(self.teacher), &student.assignment.to_string(), &samples)?;
                    learn(student, &kept.lesson())?;
                }
            }
        }
        let images_per_second = self.config.batch as f64 / start.elapsed().as_secs_f64();
        Ok(Progress { step: step + 1, steps, losses, lr, images_per_second })
    }

    /// One teacher pass over the batch of a step that shows every student its lesson.
    pub(super) fn teach(
        &mut self,
        batches: &mut Batches<'_, M::Data>,
        step: u64,
        show: &mut dyn FnMut(&mut Student, &Lesson<'_>) -> Result<()>,
    ) -> Result<()> {
        let (teacher, students) = (self.teacher, &mut self.students);
        // Held-out steps begin far out; the data order only needs their position among themselves.
        let (data, chosen) = (batches.data(), batches.chosen(step % HELD_OUT_STEPS));
        let draw = Draw { schedule: &self.schedule, dropout: 0.0, seed: self.config.seed, step };
        let noised = teacher.noised(data, chosen, &draw)?;
        let g = Graph::inference(self.config.dtype.into());
        let mut observer = |seen: &Seen<'_>| match students
            .iter_mut()
            .find(|s| s.assignment.block == seen.block && s.assignment.site == seen.site)
        {
            Some(student) => show(student, &Lesson::from(seen)),
            None => Ok(()),
        };
        let x = Var::constant(noised.x_t.clone());
        teacher.predict(&g, &x, &noised.t, &noised.condition, false, Some(&mut observer))?;
        Ok(())
    }

    /// Residual of every site on the held-out batches, which are the same at every call.
    ///
    /// # Errors
    /// Images that do not fit, or too little memory.
    pub fn residuals(&mut self, held_out: &M::Data) -> Result<BTreeMap<String, Residual>> {
        let mut batches = Batches::new(held_out, self.config.batch.min(held_out.count()), self.config.seed)?;
        let mut sums: BTreeMap<String, ResidualSums> = BTreeMap::new();
        for i in 0..self.config.held_out {
            self.teach(&mut batches, HELD_OUT_STEPS + i, &mut |student, lesson| {
                student.measure(lesson, sums.entry(student.assignment.to_string()).or_default())
            })?;
        }
        Ok(sums.into_iter().map(|(site, sums)| (site, sums.residual())).collect())
    }

    /// Measures and writes the residuals where they are due at this step and not yet written.
    fn log_residuals(&mut self, held_out: &M::Data) -> Result<()> {
        let (step, every) = (self.step(), self.config.held_out_every);
        let due = step == 0 || step == self.config.steps || every > 0 && step.is_multiple_of(every);
        let Some(home) = self.home.as_ref().filter(|_| due) else { return Ok(()) };
        let path = home.folder.join(HELD_OUT_LOG);
        let known = step > 0 && path.is_file() && jsonl::read(&path)?.iter().any(|l| l["step"].as_u64() == Some(step));
        if known {
            return Ok(());
        }
        let mut log = if step == 0 { JsonLog::create(&path)? } else { JsonLog::resume(&path, step)? };
        let sites = self.residuals(held_out)?;
        log.append(&HeldOut { step, sites })
    }
}
