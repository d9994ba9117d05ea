//! Samplers as data: a [`Plan`] lists, for every step, the timestep the model receives and the coefficients of one
//! linear update. Every sampler fits the same update, so one fused operator, `solver_step`, serves them all.
//!
//! The update of a step, from the latent `x`, the guided prediction `eps`, the variance channels `v` of the model and
//! the clean estimate `x0_prev` of the step before:
//! ```text
//! x0     = inv_alpha · (x - sigma · eps)
//! x_next = cx·x + ce·eps + c0·x0 + c1·x0_prev + scale · noise
//! scale  = 0, a constant, or exp(½(f·log_hi + (1-f)·log_lo)) with f = (v+1)/2
//! ```

use crate::error::{Error, Result};
use crate::ops::contracts::solver_step::Params;
use crate::sample::dpm::DpmEndPoint;
use crate::sample::respacing::{Respacing, check_count};
use crate::sample::schedule::Schedule;
use std::str::FromStr;

/// Standard deviation of the noise that a step adds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NoiseScale {
    /// The step is deterministic.
    None,
    /// The same for every element.
    Fixed(f64),
    /// Per element, from the variance channels: interpolates log variances between the two bounds.
    Learned {
        /// Log variance at v = -1 (the posterior's, clipped).
        log_lo: f64,
        /// Log variance at v = +1 (the forward process': ln β).
        log_hi: f64,
    },
}

/// What the channels of a model's output before the variance channels are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prediction {
    /// The noise in the latent.
    #[default]
    Noise,
    /// √ᾱ·noise − √(1−ᾱ)·clean, "v" (arXiv 2202.00512): well-posed at every noise level.
    Velocity,
}

/// Coefficients of one step; see the module for the formula.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coefs {
    /// 1/√ᾱ at this step's noise level.
    pub inv_alpha: f64,
    /// √(1-ᾱ) at this step's noise level.
    pub sigma: f64,
    /// Weight of the current latent.
    pub cx: f64,
    /// Weight of the noise prediction.
    pub ce: f64,
    /// Weight of the clean estimate of this step.
    pub c0: f64,
    /// Weight of the clean estimate of the previous step; 0 when there is none.
    pub c1: f64,
    /// Scale of fresh noise.
    pub noise: NoiseScale,
}

impl Coefs {
    /// Coefficients that only estimate the clean latent at the given ᾱ; a sampler fills in the weights it uses.
    pub(crate) fn at(alpha: f64, sigma: f64) -> Self {
        Coefs { inv_alpha: 1.0 / alpha, sigma, cx: 0.0, ce: 0.0, c0: 0.0, c1: 0.0, noise: NoiseScale::None }
    }

    /// The same step for a model that predicts something else than noise: all of it is linear in the latent and the
    /// output, so that only coefficients change.
    pub fn for_prediction(self, prediction: Prediction) -> Coefs {
        match prediction {
            Prediction::Noise => self,
            Prediction::Velocity => {
                // eps = √ᾱ·v + σ·x and x0 = √ᾱ·x − σ·v.
                let (alpha, sigma) = (1.0 / self.inv_alpha, self.sigma);
                Coefs {
                    inv_alpha: alpha,
                    sigma: sigma / alpha,
                    cx: self.cx + self.ce * sigma,
                    ce: self.ce * alpha,
                    ..self
                }
            }
        }
    }

    /// Parameters of the operator `solver_step`, rounded to f32 each on its own. `guidance` is the scale of
    /// classifier-free guidance, `guided_channels` how many leading channels of the model's output it applies to; both
    /// are unused where the operator gets no unconditional output.
    pub fn params(&self, guidance: f64, guided_channels: usize) -> Params {
        let (cn, learned, log_lo, log_hi) = match self.noise {
            NoiseScale::None => (0.0, false, 0.0, 0.0),
            NoiseScale::Fixed(scale) => (scale, false, 0.0, 0.0),
            NoiseScale::Learned { log_lo, log_hi } => (1.0, true, log_lo, log_hi),
        };
        Params {
            guidance: guidance as f32,
            guided_channels,
            inv_alpha: self.inv_alpha as f32,
            sigma: self.sigma as f32,
            cx: self.cx as f32,
            ce: self.ce as f32,
            c0: self.c0 as f32,
            c1: self.c1 as f32,
            cn: cn as f32,
            learned,
            log_hi: log_hi as f32,
            log_lo: log_lo as f32,
        }
    }
}

/// One evaluation of the model and the update that follows it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Timestep the model receives; fractional for some samplers. Never round it to a 16-bit type.
    pub timestep: f64,
    /// The update.
    pub coefs: Coefs,
}

/// A whole trajectory. It starts from standard normal noise and ends with the latent of the last step.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Steps in the order of execution, noisiest first.
    pub steps: Vec<Step>,
}

impl Plan {
    /// Whether any step needs fresh noise.
    pub fn needs_noise(&self) -> bool {
        self.steps.iter().any(|s| s.coefs.noise != NoiseScale::None)
    }

    /// Whether any step reads the variance channels of the model.
    pub fn needs_variance(&self) -> bool {
        self.steps.iter().any(|s| matches!(s.coefs.noise, NoiseScale::Learned { .. }))
    }

    /// Whether the clean estimate must be kept from one step to the next.
    pub fn needs_x0(&self) -> bool {
        self.steps.iter().any(|s| s.coefs.c1 != 0.0)
    }
}

/// Where DDPM takes the variance of its steps from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variance {
    /// The model has variance channels (learned range).
    Learned,
    /// The model has none: the posterior variance is used ("fixed small").
    FixedSmall,
}

/// A sampler with its own settings, by the names of the command line: `ddpm`, `ddim`, `dpm++`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampler {
    /// Ancestral sampling on a respaced schedule.
    Ddpm,
    /// DDIM; `eta` from 0 (deterministic) to 1 (as noisy as DDPM).
    Ddim {
        /// Share of the posterior's standard deviation that is added as noise.
        eta: f64,
    },
    /// DPM-Solver++ 2M: second order, multistep, deterministic.
    DpmPlusPlus {
        /// Where the trajectory ends.
        end: DpmEndPoint,
    },
}

impl FromStr for Sampler {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "ddpm" => Ok(Sampler::Ddpm),
            "ddim" => Ok(Sampler::Ddim { eta: 0.0 }),
            "dpm++" | "dpm-solver++" => Ok(Sampler::DpmPlusPlus { end: DpmEndPoint::Zero }),
            _ => Err(Error::usage("sampler", "unknown name")
                .is(format!("{name:?}"))
                .must("ddpm, ddim or dpm++ (dpm-solver++)")),
        }
    }
}

impl Sampler {
    /// The trajectory of `steps` model evaluations. DDPM spreads them over the whole range ("250"), DDIM uses an
    /// integer stride ("ddim50", which is the "leading" spacing of diffusers where `steps` divides T); for other
    /// respacings see [`Plan::ddpm`] and [`Plan::ddim`].
    ///
    /// # Errors
    /// A usage error when `steps` is 0 or more than the schedule offers this sampler, or `eta` is out of range.
    pub fn plan(&self, schedule: &Schedule, steps: usize, variance: Variance) -> Result<Plan> {
        check_count("steps", steps, schedule.len())?;
        match *self {
            Sampler::Ddpm => Plan::ddpm(schedule, &Respacing::Sections(vec![steps]), variance),
            Sampler::Ddim { eta } => Plan::ddim(schedule, &Respacing::Stride(steps), eta),
            Sampler::DpmPlusPlus { end } => Plan::dpm_plus_plus(schedule, steps, end),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The step is the same whichever of the two a model predicts.
    #[test]
    fn a_velocity_gives_the_step_of_its_noise() {
        for sampler in ["ddim", "dpm++", "ddpm"] {
            let sampler: Sampler = sampler.parse().unwrap();
            let plan = sampler.plan(&Schedule::default(), 7, Variance::FixedSmall).unwrap();
            for step in &plan.steps {
                let c = step.coefs;
                let (alpha, sigma, x, eps, previous) = (1.0 / c.inv_alpha, c.sigma, 0.7, -1.3, 0.2);
                let update = |c: Coefs, out: f64| {
                    let x0 = c.inv_alpha * (x - c.sigma * out);
                    [x0, c.cx * x + c.ce * out + c.c0 * x0 + c.c1 * previous]
                };
                let want = update(c, eps);
                let velocity = alpha * eps - sigma * want[0];
                let found = update(c.for_prediction(Prediction::Velocity), velocity);
                for (found, want) in found.into_iter().zip(want) {
                    assert!((found - want).abs() < 1e-9 * want.abs().max(1.0), "{found} {want}");
                }
                assert_eq!(c.for_prediction(Prediction::Noise), c);
            }
        }
    }

    use crate::ops::solver_step;
    use crate::sample::golden::{Case, assert_close};
    use crate::tensor::{Device, Tensor};

    /// The module's formula for one element, `output` being eps and v; returns the next latent and the clean estimate.
    ///
    /// Plans are checked against it because the operator takes coefficients in f32: through it a plan could be wrong by
    /// 1e-7, times a hundred where x0 is extrapolated from noise, and nobody would see.
    pub fn exact(c: &Coefs, x: f64, [eps, v]: [f64; 2], x0_prev: f64, noise: f64) -> (f64, f64) {
        let x0 = c.inv_alpha * (x - c.sigma * eps);
        let f = (v + 1.0) / 2.0;
        let scale = match c.noise {
            NoiseScale::None => 0.0,
            NoiseScale::Fixed(scale) => scale,
            NoiseScale::Learned { log_lo, log_hi } => (0.5 * (f * log_hi + (1.0 - f) * log_lo)).exp(),
        };
        (c.cx * x + c.ce * eps + c.c0 * x0 + c.c1 * x0_prev + scale * noise, x0)
    }

    /// The latents, clean estimates, model outputs and noise of one step; absent ones are empty.
    struct State {
        x: Vec<f64>,
        eps: Vec<f64>,
        v: Vec<f64>,
        x0: Vec<f64>,
        noise: Vec<f64>,
    }

    /// The operator on a device, values rounded to f32.
    fn fused(device: &Device, c: &Coefs, s: &State) -> (Vec<f64>, Vec<f64>) {
        let tensor = |channels: usize, values: &[f64]| {
            let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
            Tensor::from_f32(device, &[1, channels, values.len() / channels], &values).unwrap()
        };
        let optional = |values: &[f64]| (!values.is_empty()).then(|| tensor(1, values));
        let (x, output) = (tensor(1, &s.x), tensor(2, &[&s.eps[..], &s.v].concat()));
        let params = c.params(1.0, 0);
        let out =
            solver_step(&x, &output, None, optional(&s.noise).as_ref(), optional(&s.x0).as_ref(), params).unwrap();
        let wide = |t: &Tensor| t.f32s().unwrap().iter().map(|&v| f64::from(v)).collect();
        (wide(&out.x_next), wide(&out.x0))
    }

    /// Runs the closed-form model of a golden case through a plan; returns the latents (start included), x0s, times.
    fn trajectory(
        case: &Case,
        plan: &Plan,
        step: impl Fn(&Coefs, &State) -> (Vec<f64>, Vec<f64>),
    ) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let config = case.json("case.json")["config"]["model"].clone();
        let parameter = |name: &str| config[name].as_f64().unwrap();
        let (a, b, c, d) = (parameter("a"), parameter("b"), parameter("c"), parameter("d"));
        let (mut x, mut x0) = (case.input("x"), vec![]);
        let noise = if plan.needs_noise() { case.input("noise") } else { vec![] };
        let (mut latents, mut x0s, mut times) = (x.clone(), vec![], vec![]);
        for (i, Step { timestep, coefs }) in plan.steps.iter().enumerate() {
            let model =
                |scale: f64, shift: f64| x.iter().map(|x| (scale * x + shift * timestep / 1000.0).tanh()).collect();
            let (eps, v) = (model(a, b), model(c, d));
            let noise = if noise.is_empty() { vec![] } else { noise[i * x.len()..(i + 1) * x.len()].to_vec() };
            (x, x0) = step(coefs, &State { x, eps, v, x0, noise });
            latents.extend(&x);
            x0s.extend(&x0);
            times.push(*timestep);
        }
        (latents, x0s, times)
    }

    /// In f64 every latent must agree with the stored f32 values up to their rounding.
    pub fn check_f64(path: &str, plan: &Plan) {
        let case = Case::open(path);
        let (latents, x0s, times) = trajectory(&case, plan, |c, s| {
            let at = |values: &[f64], i: usize| values.get(i).copied().unwrap_or(0.0);
            let each = |i| exact(c, s.x[i], [s.eps[i], s.v[i]], at(&s.x0, i), at(&s.noise, i));
            (0..s.x.len()).map(each).unzip()
        });
        assert_eq!(times, case.expected("timesteps"), "{path}");
        let exact = |values: &[f64]| (values.iter().fold(0.0f64, |m, x| m.max(x.abs())) * 6e-8 + 1e-9, 6e-8);
        let want = case.expected("latents");
        assert_close(path, &latents, &want, exact(&want));
        let last = case.expected("final");
        assert_close(path, &latents[latents.len() - last.len()..], &last, exact(&last));
        if plan.needs_x0() {
            let want = case.expected("x0_predictions");
            assert_close(path, &x0s, &want, exact(&want));
        }
    }

    /// Through the operator the latents must meet the tolerance of the case, named `latents (f32)` or `final (f32)`.
    pub fn check_f32(path: &str, plan: &Plan, entry: &str) {
        let case = Case::open(path);
        let want = case.expected(entry.split(' ').next().unwrap());
        for device in [Device::cpu(), Device::oracle()] {
            let (latents, _, _) = trajectory(&case, plan, |c, s| fused(&device, c, s));
            assert_close(path, &latents[latents.len() - want.len()..], &want, case.tolerance(entry));
        }
    }

    const COEFS: Coefs =
        Coefs { inv_alpha: 2.0, sigma: 0.5, cx: 1.0, ce: 10.0, c0: 100.0, c1: 1000.0, noise: NoiseScale::None };

    #[test]
    fn every_term_counts() {
        for device in [Device::cpu(), Device::oracle()] {
            let run = |noise: NoiseScale, v: f64| {
                let state = State { x: vec![3.0], eps: vec![2.0], v: vec![v], x0: vec![7.0], noise: vec![5.0] };
                let (next, x0) = fused(&device, &Coefs { noise, ..COEFS }, &state);
                assert!((exact(&Coefs { noise, ..COEFS }, 3.0, [2.0, v], 7.0, 5.0).0 - next[0]).abs() < 1e-3);
                (next[0], x0[0])
            };
            // x0 = 2·(3 - 0.5·2) = 4; 3 + 20 + 400 + 7000.
            assert_eq!(run(NoiseScale::None, 0.0), (7423.0, 4.0));
            assert_eq!(run(NoiseScale::Fixed(4.0), 0.0), (7443.0, 4.0));
            let learned = NoiseScale::Learned { log_lo: 0.0, log_hi: 4f64.ln() };
            assert_eq!(run(learned, -1.0).0, 7428.0);
            assert!((run(learned, 1.0).0 - 7433.0).abs() < 1e-3);
            assert!((run(learned, 0.0).0 - (7423.0 + 5.0 * 2f64.sqrt())).abs() < 1e-3);
        }
    }

    #[test]
    fn missing_inputs_are_named() {
        let device = Device::cpu();
        let zeros = |channels: usize| Tensor::zeros(&device, &[1, channels, 2]).unwrap();
        let run = |coefs: &Coefs, channels: usize, noise: Option<&Tensor>, previous: Option<&Tensor>| {
            let outcome = solver_step(&zeros(1), &zeros(channels), None, noise, previous, coefs.params(1.0, 0));
            outcome.map(|_| ()).unwrap_err().to_string()
        };
        let (one, learned) = (zeros(1), NoiseScale::Learned { log_lo: 0.0, log_hi: 1.0 });
        let learned = Coefs { noise: learned, ..COEFS };
        assert!(run(&COEFS, 2, None, None).contains("the previous clean estimate where its factor is not zero"));
        assert!(run(&learned, 1, Some(&one), Some(&one)).contains("output channels where the variance is learned"));
        assert!(run(&learned, 2, None, Some(&one)).contains("noise where its factor is not zero"));
        assert!(run(&learned, 2, Some(&zeros(3)), Some(&one)).contains("noise"));
    }

    #[test]
    fn guidance_reaches_the_operator() {
        let device = Device::oracle();
        let tensor = |values: &[f32]| Tensor::from_f32(&device, &[1, values.len(), 1], values).unwrap();
        let (x, cond, uncond) = (tensor(&[3.0, 3.0]), tensor(&[2.0, 2.0]), tensor(&[1.0, 1.0]));
        let params = Coefs { c1: 0.0, ..COEFS }.params(4.0, 1);
        let out = solver_step(&x, &cond, Some(&uncond), None, None, params).unwrap();
        // eps = 1 + 4·(2 - 1) in the guided channel, 2 in the other; x0 = 2x - eps.
        assert_eq!(out.x0.f32s().unwrap(), [1.0, 4.0]);
    }

    #[test]
    fn names_and_counts() {
        let schedule = Schedule::default();
        for (name, most) in [("ddpm", 1000), ("ddim", 1000), ("dpm++", 999)] {
            let sampler: Sampler = name.parse().unwrap();
            for steps in [1, 2, 10, 20, 50, 250, most] {
                let plan = sampler.plan(&schedule, steps, Variance::Learned).unwrap();
                assert_eq!(plan.steps.len(), steps, "{name}");
                assert!(plan.steps.windows(2).all(|w| w[0].timestep > w[1].timestep));
                for Step { coefs: c, .. } in &plan.steps {
                    assert!([c.inv_alpha, c.sigma, c.cx, c.ce, c.c0, c.c1].iter().all(|x| x.is_finite()), "{name}");
                }
                // Every one of these samplers ends on its clean estimate.
                let last = plan.steps[steps - 1].coefs;
                assert_eq!((last.cx, last.ce, last.c0, last.c1), (0.0, 0.0, 1.0, 0.0), "{name} {steps}");
                assert_eq!(last.noise, NoiseScale::None);
            }
            for steps in [0, most + 1, 1001] {
                let e = sampler.plan(&schedule, steps, Variance::Learned).unwrap_err();
                assert_eq!(e.exit_code(), 2, "{name} {steps}");
            }
        }
        assert_eq!("euler".parse::<Sampler>().unwrap_err().exit_code(), 2);
    }

    #[test]
    fn needs_follow_the_sampler() {
        let needs = |name: &str, variance| {
            let p = name.parse::<Sampler>().unwrap().plan(&Schedule::default(), 10, variance).unwrap();
            (p.needs_noise(), p.needs_variance(), p.needs_x0())
        };
        assert_eq!(needs("ddpm", Variance::Learned), (true, true, false));
        assert_eq!(needs("ddpm", Variance::FixedSmall), (true, false, false));
        assert_eq!(needs("ddim", Variance::Learned), (false, false, false));
        assert_eq!(needs("dpm++", Variance::Learned), (false, false, true));
    }
}
