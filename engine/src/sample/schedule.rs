//! The noise schedule of a diffusion model: betas and everything that follows from them.
//!
//! Notation as in DDPM (arXiv 2006.11239): β_t, α_t = 1 - β_t, ᾱ_t = Π α, and ᾱ of the step before the first is 1.
//! A noised latent is x_t = √ᾱ_t·x_0 + √(1-ᾱ_t)·ε. Timesteps count from 0 (almost clean) to T-1 (almost pure noise).

use crate::error::{Error, Result};
use crate::sample::respacing::Respacing;

/// Betas and cumulative products of a discrete diffusion process, in f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    betas: Vec<f64>,
    alpha_bars: Vec<f64>,
}

/// A shortened process: the kept timesteps of the original one and the schedule that joins them.
#[derive(Clone, Debug, PartialEq)]
pub struct Respaced {
    /// Original timestep of every kept step, ascending; this is what the model receives.
    pub timesteps: Vec<usize>,
    /// Schedule over the kept steps, with the same ᾱ at each of them.
    pub schedule: Schedule,
}

impl Default for Schedule {
    /// The schedule DiT and PixArt were trained with: 1000 betas, linear from 1e-4 to 0.02.
    fn default() -> Self {
        Self::from_valid(linspace(1e-4, 0.02, 1000))
    }
}

impl Schedule {
    /// Betas linear from `beta_start` to `beta_end`, both included, over `timesteps` steps.
    ///
    /// # Errors
    /// A usage error when there are no steps or a beta lies outside (0, 1).
    pub fn linear(beta_start: f64, beta_end: f64, timesteps: usize) -> Result<Self> {
        Self::from_betas(linspace(beta_start, beta_end, timesteps))
    }

    /// A schedule from its betas, β_0 first.
    ///
    /// # Errors
    /// A usage error when the list is empty, a beta lies outside (0, 1), or ᾱ underflows to zero.
    pub fn from_betas(betas: Vec<f64>) -> Result<Self> {
        if betas.is_empty() {
            return Err(Error::usage("schedule", "no timesteps").is(0).must("at least 1"));
        }
        if let Some((t, beta)) = betas.iter().enumerate().find(|(_, b)| !(**b > 0.0 && **b < 1.0)) {
            return Err(Error::usage("schedule", format!("beta of timestep {t} out of range"))
                .is(beta)
                .must("strictly between 0 and 1")
                .fix("check beta_start, beta_end or trained_betas"));
        }
        let schedule = Self::from_valid(betas);
        match schedule.alpha_bars.last() {
            Some(&last) if last > 0.0 => Ok(schedule),
            _ => Err(Error::usage("schedule", "the signal vanishes: the product of 1 - beta underflows")
                .is(0)
                .must("positive")
                .fix("use smaller betas or fewer timesteps")),
        }
    }

    fn from_valid(betas: Vec<f64>) -> Self {
        let mut product = 1.0;
        let mut alpha_bars = Vec::with_capacity(betas.len());
        for beta in &betas {
            product *= 1.0 - beta;
            alpha_bars.push(product);
        }
        Schedule { betas, alpha_bars }
    }

    /// Number of timesteps T, at least 1.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.betas.len()
    }

    /// β_t. Like all accessors by timestep, panics when `t >= len()`.
    pub fn beta(&self, t: usize) -> f64 {
        self.betas[t]
    }

    /// ᾱ_t.
    pub fn alpha_bar(&self, t: usize) -> f64 {
        self.alpha_bars[t]
    }

    /// ᾱ_{t-1}; 1 for t = 0.
    pub fn alpha_bar_prev(&self, t: usize) -> f64 {
        if t == 0 { 1.0 } else { self.alpha_bars[t - 1] }
    }

    /// Variance of q(x_{t-1} | x_t, x_0): β̃_t = β_t (1-ᾱ_{t-1}) / (1-ᾱ_t); 0 for t = 0.
    pub fn posterior_variance(&self, t: usize) -> f64 {
        self.betas[t] * (1.0 - self.alpha_bar_prev(t)) / (1.0 - self.alpha_bars[t])
    }

    /// ln β̃_t, where the infinite value at t = 0 is replaced by the one at t = 1 (by ln β_0 if T = 1).
    pub fn log_posterior_variance_clipped(&self, t: usize) -> f64 {
        if self.len() == 1 { self.betas[0].ln() } else { self.posterior_variance(t.max(1)).ln() }
    }

    /// Weights (of x_0, of x_t) in the mean of q(x_{t-1} | x_t, x_0):
    /// β_t √ᾱ_{t-1} / (1-ᾱ_t) and (1-ᾱ_{t-1}) √α_t / (1-ᾱ_t).
    pub fn posterior_mean_coefs(&self, t: usize) -> (f64, f64) {
        let (beta, prev, rest) = (self.betas[t], self.alpha_bar_prev(t), 1.0 - self.alpha_bars[t]);
        (beta * prev.sqrt() / rest, (1.0 - prev) * (1.0 - beta).sqrt() / rest)
    }

    /// Keeps only the timesteps that `respacing` selects.
    ///
    /// The new betas are `β'_k = 1 - ᾱ[map_k] / ᾱ[map_{k-1}]`, so that ᾱ is unchanged at every kept timestep
    /// (Improved DDPM, arXiv 2102.09672).
    ///
    /// # Errors
    /// A usage error when the respacing does not fit T steps.
    pub fn respace(&self, respacing: &Respacing) -> Result<Respaced> {
        let timesteps = respacing.timesteps(self.len())?;
        let mut previous = 1.0;
        let betas = timesteps
            .iter()
            .map(|&t| {
                let beta = 1.0 - self.alpha_bars[t] / previous;
                previous = self.alpha_bars[t];
                beta
            })
            .collect();
        Ok(Respaced { timesteps, schedule: Self::from_betas(betas)? })
    }
}

/// `n` equidistant numbers, both ends included; only `start` when n = 1.
fn linspace(start: f64, end: f64, n: usize) -> Vec<f64> {
    let step = (end - start) / n.saturating_sub(1).max(1) as f64;
    (0..n).map(|i| if i > 0 && i + 1 == n { end } else { start + i as f64 * step }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::golden::{Case, numbers};

    #[track_caller]
    fn assert_rel(name: &str, got: f64, want: f64, tolerance: f64) {
        assert!((got - want).abs() <= tolerance * want.abs(), "{name}: {got:e} is not {want:e}");
    }

    #[test]
    fn default_matches_published_values() {
        let s = Schedule::default();
        assert_eq!(s, Schedule::linear(1e-4, 0.02, 1000).unwrap());
        assert_eq!((s.len(), s.beta(0), s.beta(999)), (1000, 1e-4, 0.02));
        assert_eq!(s.alpha_bar(0), 0.9999);
        assert_rel("abar 499", s.alpha_bar(499), 0.0785872429, 1e-9);
        assert_rel("abar 999", s.alpha_bar(999), 4.0358297654e-5, 1e-10);
        assert_rel("weight of x0", s.posterior_mean_coefs(0).0, 1.0, 1e-12);
        assert_eq!(s.posterior_mean_coefs(0).1, 0.0);
        assert_eq!(s.posterior_variance(0), 0.0);
    }

    #[test]
    fn golden_respacing_tables() {
        let case = Case::open("samplers/respacing_tables");
        let tables = case.json("tables.json");
        let tolerance = case.json("case.json")["tolerance"]["float64 tables"]["rel"].as_f64().unwrap();
        let base = Schedule::default();
        assert_eq!(tables.as_object().unwrap().len(), 10);
        let mut compared = 0;
        for (spec, table) in tables.as_object().unwrap() {
            let respaced = base.respace(&spec.parse().unwrap()).unwrap();
            let map: Vec<f64> = respaced.timesteps.iter().map(|&t| t as f64).collect();
            assert_eq!(map, numbers(&table["timestep_map"]), "{spec}");
            let s = &respaced.schedule;
            let columns: [(&str, &dyn Fn(usize) -> f64); 3] = [
                ("beta", &|k| s.beta(k)),
                ("alpha_bar", &|k| s.alpha_bar(k)),
                ("log_posterior_variance_clipped", &|k| s.log_posterior_variance_clipped(k)),
            ];
            for (column, value) in columns {
                let Some(want) = table.get(column).map(numbers) else { continue };
                assert_eq!(want.len(), s.len());
                for (k, want) in want.into_iter().enumerate() {
                    assert_rel(&format!("{spec} {column}[{k}]"), value(k), want, tolerance);
                    compared += 1;
                }
            }
        }
        assert_eq!(compared, 3 * (250 + 100 + 50 + 10 + 25 + 50 + 250 + 45));
    }

    #[test]
    fn respaced_250_matches_published_values() {
        let s = Schedule::default().respace(&"250".parse().unwrap()).unwrap().schedule;
        assert_rel("beta 1", s.beta(1), 5.990655645e-4, 1e-9);
        assert_rel("beta 249", s.beta(249), 0.07751934499, 1e-9);
        assert_rel("log var 0", s.log_posterior_variance_clipped(0), -9.364628160, 1e-9);
        assert_eq!(s.log_posterior_variance_clipped(0), s.log_posterior_variance_clipped(1));
        assert_rel("log var 249", s.log_posterior_variance_clipped(249), -2.557231153, 1e-9);
    }

    #[test]
    fn single_step_is_finite() {
        let s = Schedule::linear(0.5, 0.9, 1).unwrap();
        assert_eq!((s.beta(0), s.alpha_bar(0), s.log_posterior_variance_clipped(0)), (0.5, 0.5, 0.5f64.ln()));
    }

    #[test]
    fn bad_schedules_are_refused() {
        for betas in [vec![], vec![0.0], vec![0.1, 1.0], vec![-0.1], vec![f64::NAN], vec![0.999; 200]] {
            assert_eq!(Schedule::from_betas(betas).unwrap_err().exit_code(), 2);
        }
    }
}
