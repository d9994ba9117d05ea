//! AdamW with global-norm clipping and an exponential moving average of the parameters.

use crate::autograd::{Gradients, ParamId, ParamStore};
use crate::error::{Error, Result};
use crate::ops::{adamw, contracts, sum_squares};
use crate::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Settings of the optimiser.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWSettings {
    /// Learning rate after warm-up.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Steps over which the learning rate rises linearly from zero.
    pub warmup: u64,
    /// What the learning rate does after warm-up.
    pub schedule: LrSchedule,
    /// Largest global gradient norm; longer gradients are scaled down to it.
    pub clip: f64,
    /// Decay of the moving average; 0 keeps none. Early on it is at most (1 + step)/(10 + step), so that the average
    /// of a short run does not consist of its start.
    pub ema: f64,
}

/// What the learning rate does after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "ScheduleText", into = "ScheduleText")]
pub enum LrSchedule {
    /// It stays.
    Constant,
    /// It falls to zero at the last step along half a cosine.
    Cosine,
    /// It is multiplied by a factor at each milestone.
    Steps(Milestones),
}

/// Steps at which the learning rate is multiplied by a factor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Milestones {
    // Settings are passed by value everywhere: few places, no heap.
    at: [u64; Milestones::MOST],
    count: usize,
    factor: f64,
}

impl Milestones {
    /// Most milestones of a schedule.
    pub const MOST: usize = 8;

    /// Milestones in rising order, and the factor of each.
    ///
    /// # Errors
    /// None, too many, or not rising; a factor that is not in (0, 1].
    pub fn new(steps: &[u64], factor: f64) -> Result<Milestones> {
        let refuse = |is: String, must: &str| Error::usage("schedule", "not a schedule of steps").is(is).must(must);
        if steps.is_empty() || steps.len() > Self::MOST || steps.windows(2).any(|pair| pair[0] >= pair[1]) {
            return Err(refuse(format!("milestones {steps:?}"), "1 to 8 milestones in rising order"));
        }
        if !(factor > 0.0 && factor <= 1.0) {
            return Err(refuse(format!("factor {factor}"), "a factor above 0, at most 1"));
        }
        let mut at = [u64::MAX; Self::MOST];
        at[..steps.len()].copy_from_slice(steps);
        Ok(Milestones { at, count: steps.len(), factor })
    }

    fn factor_at(&self, step: u64) -> f64 {
        let passed = self.at[..self.count].iter().filter(|at| step >= **at).count();
        self.factor.powi(passed as i32)
    }
}

/// A schedule as a file says it.
#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "must be \"constant\", \"cosine\" or { milestones = [STEP, ...], factor = F }")]
enum ScheduleText {
    Word(ScheduleWord),
    Steps(StepsText),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ScheduleWord {
    Constant,
    Cosine,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StepsText {
    milestones: Vec<u64>,
    factor: f64,
}

impl TryFrom<ScheduleText> for LrSchedule {
    type Error = Error;

    fn try_from(text: ScheduleText) -> Result<LrSchedule> {
        Ok(match text {
            ScheduleText::Word(ScheduleWord::Constant) => LrSchedule::Constant,
            ScheduleText::Word(ScheduleWord::Cosine) => LrSchedule::Cosine,
            ScheduleText::Steps(s) => LrSchedule::Steps(Milestones::new(&s.milestones, s.factor)?),
        })
    }
}

impl From<LrSchedule> for ScheduleText {
    fn from(schedule: LrSchedule) -> ScheduleText {
        match schedule {
            LrSchedule::Constant => ScheduleText::Word(ScheduleWord::Constant),
            LrSchedule::Cosine => ScheduleText::Word(ScheduleWord::Cosine),
            LrSchedule::Steps(m) => {
                ScheduleText::Steps(StepsText { milestones: m.at[..m.count].to_vec(), factor: m.factor })
            }
        }
    }
}

impl Default for AdamWSettings {
    fn default() -> Self {
        AdamWSettings {
            lr: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            warmup: 0,
            schedule: LrSchedule::Constant,
            clip: 10.0,
            ema: 0.9999,
        }
    }
}

impl AdamWSettings {
    /// The plain optimiser that every framework has, for measurements: no clipping, no averaging, no schedule.
    pub const PLAIN: AdamWSettings = AdamWSettings {
        lr: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        warmup: 0,
        schedule: LrSchedule::Constant,
        clip: f64::MAX,
        ema: 0.0,
    };

    /// Learning rate of a step (0-based) of `steps`.
    pub fn lr_at(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup {
            return self.lr * (step + 1) as f64 / self.warmup as f64;
        }
        match self.schedule {
            LrSchedule::Constant => self.lr,
            LrSchedule::Steps(milestones) => self.lr * milestones.factor_at(step),
            LrSchedule::Cosine => {
                let done = (step - self.warmup) as f64 / steps.saturating_sub(self.warmup).max(1) as f64;
                self.lr * 0.5 * (1.0 + (std::f64::consts::PI * done.min(1.0)).cos())
            }
        }
    }

    /// Decay of the moving average at an update (1-based).
    pub fn ema_at(&self, update: u64) -> f64 {
        self.ema.min((1 + update) as f64 / (10 + update) as f64)
    }

    /// Checks the ranges.
    ///
    /// # Errors
    /// Names the setting.
    pub fn check(&self) -> Result<()> {
        let rows = [
            ("lr", self.lr, self.lr >= 0.0 && self.lr.is_finite(), "a non-negative number"),
            ("beta1", self.beta1, (0.0..1.0).contains(&self.beta1), "in [0, 1)"),
            ("beta2", self.beta2, (0.0..1.0).contains(&self.beta2), "in [0, 1)"),
            ("eps", self.eps, self.eps > 0.0, "positive"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0.0, "non-negative"),
            ("clip", self.clip, self.clip > 0.0, "positive"),
            ("ema", self.ema, (0.0..1.0).contains(&self.ema), "in [0, 1)"),
        ];
        match rows.into_iter().find(|(_, _, ok, _)| !ok) {
            Some((name, value, _, must)) => Err(Error::usage(name, "out of range").is(value).must(must)),
            None => Ok(()),
        }
    }
}

/// Moments and moving average of one trainable parameter.
pub struct Slot {
    /// The parameter.
    pub id: ParamId,
    /// First moment, flat.
    pub m: Tensor,
    /// Second moment, flat.
    pub v: Tensor,
    /// Moving average, flat, where one is kept.
    pub ema: Option<Tensor>,
}

impl Slot {
    /// What a checkpoint keeps, by kind.
    pub fn states(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        [("m", Some(&self.m)), ("v", Some(&self.v)), ("ema", self.ema.as_ref())]
            .into_iter()
            .filter_map(|(kind, tensor)| Some((kind, tensor?)))
    }

    /// As [`Slot::states`], mutable.
    pub fn states_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Tensor)> {
        [("m", Some(&mut self.m)), ("v", Some(&mut self.v)), ("ema", self.ema.as_mut())]
            .into_iter()
            .filter_map(|(kind, tensor)| Some((kind, tensor?)))
    }
}

/// State of the optimiser for one store.
pub struct AdamW {
    /// Settings.
    pub settings: AdamWSettings,
    /// Updates done.
    pub step: u64,
    slots: Vec<Slot>,
}

impl AdamW {
    /// Zero moments, and a moving average that starts at the parameters.
    ///
    /// # Errors
    /// Settings out of range, or too little memory.
    pub fn new(settings: AdamWSettings, store: &ParamStore) -> Result<AdamW> {
        settings.check()?;
        let trainable = store.iter().filter(|(_, p)| p.trainable);
        let slots = trainable.map(|(id, p)| {
            let (device, len) = (p.value.device(), p.value.len());
            let ema = if settings.ema > 0.0 { Some(p.value.copy()?.into_shape(&[len])?) } else { None };
            Ok(Slot { id, m: Tensor::zeros(device, &[len])?, v: Tensor::zeros(device, &[len])?, ema })
        });
        Ok(AdamW { settings, step: 0, slots: slots.collect::<Result<_>>()? })
    }

    /// Per-parameter state, in the order of the store.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// As [`AdamW::slots`], mutable.
    pub fn slots_mut(&mut self) -> &mut [Slot] {
        &mut self.slots
    }

    /// One update at learning rate `lr`; returns the norm of the gradient before clipping.
    ///
    /// A parameter without a gradient is left alone.
    ///
    /// # Errors
    /// A gradient that is not finite: nothing is changed then.
    pub fn update(&mut self, store: &mut ParamStore, grads: &Gradients, lr: f64) -> Result<f64> {
        let square =
            |(_, grad): (_, &Tensor)| sum_squares(&grad.reshape(&[grad.len()])?, contracts::sum_squares::Params {});
        // All of them asked for before the first is read, which waits for the device.
        let squares = grads.of_store(store).map(square).collect::<Result<Vec<_>>>()?;
        let mut total = 0.0f64;
        for sum in &squares {
            total += f64::from(sum.values()?[0]);
        }
        let norm = total.sqrt();
        if !norm.is_finite() {
            return Err(Error::failure(format!("step {}", self.step), "the gradient is not finite").is(norm));
        }
        self.step += 1;
        let s = &self.settings;
        let steps = i32::try_from(self.step).unwrap_or(i32::MAX);
        let params = contracts::adamw::Params {
            lr: lr as f32,
            rate1: (1.0 - s.beta1) as f32,
            rate2: (1.0 - s.beta2) as f32,
            eps: s.eps as f32,
            weight_decay: s.weight_decay as f32,
            bias1: (1.0 - s.beta1.powi(steps)) as f32,
            bias2: (1.0 - s.beta2.powi(steps)) as f32,
            grad_scale: if norm > s.clip { (s.clip / norm) as f32 } else { 1.0 },
            ema_rate: (1.0 - s.ema_at(self.step)) as f32,
        };
        for slot in &mut self.slots {
            let Some(grad) = grads.param(store, slot.id) else { continue };
            let grad = grad.reshape(&[grad.len()])?;
            let held = &mut store.get_mut(slot.id).value;
            let shape = held.shape();
            let mut value = std::mem::replace(held, grad.clone()).into_shape(&[shape.len()])?;
            if !value.is_unique() {
                value = value.copy()?;
            }
            let outcome = adamw(&grad, &mut value, &mut slot.m, &mut slot.v, slot.ema.as_mut(), params);
            store.get_mut(slot.id).value = value.into_shape(shape.dims())?;
            outcome?;
        }
        Ok(norm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{Graph, Precision};
    use crate::nn::{Builder, Init, Scheme};
    use crate::ops::contracts::loss_regression;
    use crate::tensor::Device;

    #[test]
    fn learning_rate_warms_up_and_falls() {
        let s = AdamWSettings { lr: 1.0, warmup: 4, schedule: LrSchedule::Cosine, ..Default::default() };
        assert_eq!(s.lr_at(0, 12), 0.25);
        assert_eq!(s.lr_at(3, 12), 1.0);
        assert!((s.lr_at(8, 12) - 0.5).abs() < 1e-12);
        assert!(s.lr_at(12, 12) < 1e-12);
    }

    #[test]
    fn learning_rate_falls_at_milestones() {
        let read = |text: &str| toml::from_str::<AdamWSettings>(text);
        let text = "lr = 8.0\nwarmup = 2\nschedule = { milestones = [10, 20], factor = 0.5 }";
        let s = read(text).unwrap();
        assert_eq!([0, 1, 9, 10, 19, 20, 99].map(|step| s.lr_at(step, 100)), [4.0, 8.0, 8.0, 4.0, 4.0, 2.0, 2.0]);
        assert_eq!(read(&toml::to_string(&s).unwrap()).unwrap(), s);
        assert_eq!(read("schedule = \"cosine\"").unwrap().schedule, LrSchedule::Cosine);
        for (schedule, expected) in [
            ("{ milestones = [20, 10], factor = 0.5 }", "rising order"),
            ("{ milestones = [], factor = 0.5 }", "1 to 8 milestones"),
            ("{ milestones = [5], factor = 1.5 }", "a factor above 0"),
            ("{ milestones = [5] }", "\"constant\", \"cosine\" or { milestones"),
            ("\"linear\"", "\"constant\", \"cosine\" or { milestones"),
        ] {
            let error = read(&format!("schedule = {schedule}")).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn two_steps_by_hand() {
        // loss = (w − 3)²: gradient −6 at w = 0. The first Adam step moves by lr whatever the gradient's size.
        let device = Device::cpu();
        let mut store = ParamStore::default();
        let id = Builder::new(&mut store, &device, 0, Scheme::Torch).param("w", &[1, 1, 1], Init::Zeros).unwrap();
        let settings = AdamWSettings { lr: 0.1, ema: 0.5, clip: 100.0, ..Default::default() };
        let mut optimiser = AdamW::new(settings, &store).unwrap();
        let target = Tensor::from_f32(&device, &[1, 1, 1], &[3.0]).unwrap();
        let mut norms = Vec::new();
        for _ in 0..2 {
            let g = Graph::training(Precision::F32);
            let w = g.param(&store, id);
            let loss = g
                .loss_regression(
                    &w,
                    &crate::autograd::Var::constant(target.clone()),
                    loss_regression::Params { kind: 1, delta: 1.0 },
                )
                .unwrap();
            drop(w);
            let grads = g.backward(&loss).unwrap();
            norms.push(optimiser.update(&mut store, &grads, 0.1).unwrap());
        }
        let w = store.get(id).value.to_vec().unwrap()[0];
        assert!((norms[0] - 6.0).abs() < 1e-5 && (norms[1] - 5.8).abs() < 1e-4);
        assert!((w - 0.2).abs() < 1e-3, "two steps of about 0.1 each: {w}");
        let ema = optimiser.slots()[0].ema.as_ref().unwrap().to_vec().unwrap()[0];
        // Decays min(0.5, 2/11) and min(0.5, 3/12): the average starts short.
        assert!((ema - (0.25 * (9.0 / 11.0 * 0.1) + 0.75 * w)).abs() < 1e-4);
        assert_eq!((settings.ema_at(2), settings.ema_at(1000)), (0.25, 0.5));
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        let device = Device::cpu();
        let mut store = ParamStore::default();
        let id = Builder::new(&mut store, &device, 0, Scheme::Torch).param("w", &[1, 1, 1], Init::Ones).unwrap();
        let mut optimiser = AdamW::new(AdamWSettings::default(), &store).unwrap();
        let g = Graph::training(Precision::F32);
        let w = g.param(&store, id);
        let nan = Tensor::from_f32(&device, &[1, 1, 1], &[f32::NAN]).unwrap();
        let grads = g.backward_from(&w, nan).unwrap();
        assert!(optimiser.update(&mut store, &grads, 0.1).is_err());
        assert_eq!(store.get(id).value.to_vec().unwrap(), [1.0]);
        assert_eq!(optimiser.step, 0);
    }
}
