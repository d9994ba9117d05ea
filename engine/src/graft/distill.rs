//! Stage 1, activation distillation: every grafted site learns to give what the operator gave that it replaces.
//!
//! One teacher pass over noised images shows input and output of every site; each site takes its update while the pass
//! goes by, so that no activation is stored, and no site sees another. Labels are kept (the teacher predicts, it does
//! not train). As in the other loops, a step draws everything from (seed, step), so that a resumed run equals an
//! unbroken one to the bit.

use super::plan::Assignment;
use super::settings::DistillConfig;
use super::student::{ResidualSums, Student};
use super::{assemble, pair};
use crate::autograd::{Graph, Var};
use crate::error::{Error, Result};
use crate::io::atomic::{RunLock, ensure_writable_dir};
use crate::io::datasets::ImageSet;
use crate::io::jsonl::{self, JsonLog};
use crate::models::dit::{Dit, Run};
use crate::nn::operators::Site;
use crate::sample::schedule::Schedule;
use crate::tensor::Tensor;
use crate::train::batches::Batches;
use crate::train::checkpoint;
use crate::train::objective::noise_batch;
use crate::train::trainer::{CHECKPOINT, LOSS_LOG};
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub use super::student::Residual;

/// Residuals on held-out batches, before the first and after the last update: one line each.
pub const HELD_OUT_LOG: &str = "held_out.jsonl";

/// Steps from which held-out batches draw timesteps and noise: beyond every training step.
const HELD_OUT_STEPS: u64 = 1 << 39;

/// A line of the loss log.
#[derive(Clone, Debug, Serialize)]
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
#[derive(Clone, Debug, Serialize)]
struct HeldOut {
    step: u64,
    sites: BTreeMap<String, Residual>,
}

/// The sites of a plan in training beside their teacher.
pub struct Distiller<'t> {
    teacher: &'t Dit,
    assignments: Vec<Assignment>,
    students: Vec<Student>,
    config: DistillConfig,
    schedule: Schedule,
    folder: PathBuf,
    fingerprint: String,
    // Held for as long as the distiller lives: no second process writes the same folder.
    _lock: RunLock,
}

impl<'t> Distiller<'t> {
    /// New sites in a folder, resumed from its checkpoint where there is one. `fingerprint` tells runs apart.
    ///
    /// # Errors
    /// An operator that does not fit the teacher, a folder that cannot be written or that another process uses, or a
    /// checkpoint of another run.
    pub fn open(
        teacher: &'t Dit,
        assignments: &[Assignment],
        config: &DistillConfig,
        folder: &Path,
        fingerprint: String,
    ) -> Result<Self> {
        ensure_writable_dir(folder)?;
        let lock = RunLock::acquire(folder)?;
        let mut students = pair::students(teacher, assignments, config)?;
        let mut parts: Vec<_> = students.iter_mut().map(|s| (&mut s.params, &mut s.optimiser)).collect();
        checkpoint::restore(&folder.join(CHECKPOINT), &mut parts, &fingerprint)?;
        let (assignments, config, folder) = (assignments.to_vec(), config.clone(), folder.to_path_buf());
        let schedule = Schedule::default();
        Ok(Distiller { teacher, assignments, students, config, schedule, folder, fingerprint, _lock: lock })
    }

    /// Updates done so far.
    pub fn step(&self) -> u64 {
        self.students.first().map_or(0, |s| s.optimiser.step)
    }

    /// The teacher with the sites as they are now.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn model(&self) -> Result<Dit> {
        self.assembled(&self.students)
    }

    /// The teacher with the sites as they were initialised.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn initial_model(&self) -> Result<Dit> {
        self.assembled(&pair::students(self.teacher, &self.assignments, &self.config)?)
    }

    fn assembled(&self, students: &[Student]) -> Result<Dit> {
        let config = assemble::grafted_config(&self.teacher.config, &self.assignments)?;
        assemble::graft(self.teacher, config, students.iter().map(|s| (&s.assignment, &s.params)))
    }

    /// Trains to the last step, or until `report` breaks; a checkpoint is written either way. Residuals on `held_out`
    /// are measured before the first and after the last step.
    ///
    /// # Errors
    /// Images that do not fit the teacher; a loss that is not finite, naming site and step (the last good checkpoint
    /// stays); a full disk.
    pub fn run(
        &mut self,
        data: &ImageSet,
        held_out: &ImageSet,
        report: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<()> {
        check_images(self.teacher, data)?;
        check_images(self.teacher, held_out)?;
        let mut batches = Batches::new(data, self.config.batch, self.config.seed)?;
        let mut losses = JsonLog::resume(&self.folder.join(LOSS_LOG), self.step())?;
        if self.step() == 0 {
            self.log_residuals(held_out)?;
        }
        while self.step() < self.config.steps {
            let progress = self.update(&mut batches)?;
            losses.append(&progress)?;
            let stop = report(&progress).is_break();
            if stop || progress.step % self.config.checkpoint_every == 0 || progress.step == self.config.steps {
                let parts = self.students.iter().map(|s| (&s.params, &s.optimiser));
                checkpoint::save(&self.folder.join(CHECKPOINT), parts, &self.fingerprint)?;
            }
            if stop && progress.step < self.config.steps {
                return Ok(());
            }
        }
        self.log_residuals(held_out)
    }

    fn update(&mut self, batches: &mut Batches<'_>) -> Result<Progress> {
        let start = Instant::now();
        let (step, steps) = (self.step(), self.config.steps);
        let lr = self.config.optimizer.lr_at(step, steps);
        let mut losses = BTreeMap::new();
        self.teach(batches, step, &mut |student, input, target| {
            losses.insert(student.assignment.to_string(), student.learn(input, target, lr)?);
            Ok(())
        })?;
        let images_per_second = self.config.batch as f64 / start.elapsed().as_secs_f64();
        Ok(Progress { step: step + 1, steps, losses, lr, images_per_second })
    }

    /// One teacher pass over the batch of a step that shows every student its input and target.
    fn teach(
        &mut self,
        batches: &mut Batches<'_>,
        step: u64,
        lesson: &mut dyn FnMut(&mut Student, &Tensor, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let (teacher, students) = (self.teacher, &mut self.students);
        let device = teacher.device();
        // Held-out steps begin far out; the data order only needs their position among themselves.
        let batch = batches.get(device, step % HELD_OUT_STEPS)?;
        let null = teacher.config.classes as i32;
        let noised = noise_batch(device, &self.schedule, &batch, null, 0.0, self.config.seed, step)?;
        let g = Graph::inference(self.config.dtype.into());
        if students.iter_mut().any(|s| s.pair().is_some()) {
            let condition = teacher.condition(&g, &noised.t, &noised.y, Run::default().semantics)?;
            students.iter_mut().filter_map(Student::pair).for_each(|pair| pair.condition(condition.tensor()));
        }
        let mut observer = |block: usize, site: Site, input: &Tensor, output: &Tensor| match students
            .iter_mut()
            .find(|s| s.assignment.block == block && s.assignment.site == site)
        {
            Some(student) => lesson(student, input, output),
            None => Ok(()),
        };
        let x = Var::constant(noised.x_t.clone());
        teacher.forward_observed(&g, &x, &noised.t, &noised.y, Run::default(), Some(&mut observer))?;
        Ok(())
    }

    /// Residual of every site on the held-out batches, which are the same at every call.
    ///
    /// # Errors
    /// Images that do not fit, or too little memory.
    pub fn residuals(&mut self, held_out: &ImageSet) -> Result<BTreeMap<String, Residual>> {
        let mut batches = Batches::new(held_out, self.config.batch.min(held_out.n), self.config.seed)?;
        let mut sums: BTreeMap<String, ResidualSums> = BTreeMap::new();
        for i in 0..self.config.held_out {
            self.teach(&mut batches, HELD_OUT_STEPS + i, &mut |student, input, target| {
                student.measure(input, target, sums.entry(student.assignment.to_string()).or_default())
            })?;
        }
        Ok(sums.into_iter().map(|(site, sums)| (site, sums.residual())).collect())
    }

    fn log_residuals(&mut self, held_out: &ImageSet) -> Result<()> {
        let path = self.folder.join(HELD_OUT_LOG);
        let step = self.step();
        let known = step > 0 && path.exists() && jsonl::read(&path)?.iter().any(|l| l["step"].as_u64() == Some(step));
        if known {
            return Ok(());
        }
        let mut log = if step == 0 { JsonLog::create(&path)? } else { JsonLog::resume(&path, step)? };
        let sites = self.residuals(held_out)?;
        log.append(&HeldOut { step, sites })
    }
}

/// Refuses images that a model was not made for.
pub(super) fn check_images(model: &Dit, data: &ImageSet) -> Result<()> {
    let c = &model.config;
    let fits = (data.channels, data.height, data.width) == (c.in_channels, c.input_size, c.input_size)
        && data.class_names.len() <= c.classes;
    if fits {
        return Ok(());
    }
    Err(Error::usage("data", "the images do not fit the model")
        .is(format!("{} channels, {}×{}, {} classes", data.channels, data.height, data.width, data.class_names.len()))
        .must(format!("{} channels, {}×{}, at most {} classes", c.in_channels, c.input_size, c.input_size, c.classes))
        .fix("name the data set the base model was trained on"))
}
