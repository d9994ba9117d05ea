//! Samplers as data: a [`Plan`] lists, for every step, the timestep the model receives and the coefficients of one
//! linear update. Every sampler fits the same update, so a single fused kernel serves them all.
//!
//! The update of a step, from the latent `x`, the guided prediction `eps`, the variance channels `v` of the model and
//! the clean estimate `x0_prev` of the step before:
//! ```text
//! x0     = inv_alpha · (x - sigma · eps)
//! x_next = cx·x + ce·eps + c0·x0 + c1·x0_prev + scale · noise
//! scale  = 0, a constant, or exp(½(f·log_hi + (1-f)·log_lo)) with f = (v+1)/2
//! ```

use crate::error::{Error, Result};
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
            _ => Err(Error::usage("sampler", "unknown name").is(format!("{name:?}")).must("ddpm, ddim or dpm++ (dpm-solver++)")),
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
mod tests {
    use super::*;

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
