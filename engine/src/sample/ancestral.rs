//! DDPM (arXiv 2006.11239, learned-range variance of arXiv 2102.09672) and DDIM (arXiv 2010.02502).

use crate::error::{Error, Result};
use crate::sample::respacing::Respacing;
use crate::sample::schedule::{Respaced, Schedule};
use crate::sample::solver::{Coefs, NoiseScale, Plan, Step, Variance};

impl Plan {
    /// Ancestral sampling: x' = posterior mean of (x0, x) + scale·noise; the last step adds none.
    ///
    /// # Errors
    /// A usage error when the respacing does not fit the schedule.
    pub fn ddpm(schedule: &Schedule, respacing: &Respacing, variance: Variance) -> Result<Plan> {
        let respaced = schedule.respace(respacing)?;
        Ok(descend(&respaced, |s, k, coefs| {
            let log_lo = s.log_posterior_variance_clipped(k);
            (coefs.c0, coefs.cx) = s.posterior_mean_coefs(k);
            coefs.noise = match variance {
                _ if k == 0 => NoiseScale::None,
                Variance::Learned => NoiseScale::Learned { log_lo, log_hi: s.beta(k).ln() },
                Variance::FixedSmall => NoiseScale::Fixed((0.5 * log_lo).exp()),
            };
        }))
    }

    /// DDIM: with p the previous kept timestep, s = η √((1-ᾱ_p)/(1-ᾱ)) √(1-ᾱ/ᾱ_p),
    /// x' = √ᾱ_p x0 + √(1-ᾱ_p-s²) eps + s·noise; the last step adds none and returns x0.
    ///
    /// # Errors
    /// A usage error when the respacing does not fit the schedule or `eta` lies outside 0..=1.
    pub fn ddim(schedule: &Schedule, respacing: &Respacing, eta: f64) -> Result<Plan> {
        if !(0.0..=1.0).contains(&eta) {
            return Err(Error::usage("eta", "out of range").is(eta).must("0 to 1"));
        }
        let respaced = schedule.respace(respacing)?;
        Ok(descend(&respaced, |s, k, coefs| {
            let (here, prev) = (s.alpha_bar(k), s.alpha_bar_prev(k));
            let scale = eta * ((1.0 - prev) / (1.0 - here)).sqrt() * (1.0 - here / prev).sqrt();
            coefs.c0 = prev.sqrt();
            // Rounding may push the difference below zero where it is zero.
            coefs.ce = (1.0 - prev - scale * scale).max(0.0).sqrt();
            if k > 0 && scale > 0.0 {
                coefs.noise = NoiseScale::Fixed(scale);
            }
        }))
    }
}

/// Walks the kept timesteps from the noisiest down; `fill(schedule, k, coefs)` sets the weights of kept step `k`.
fn descend(respaced: &Respaced, fill: impl Fn(&Schedule, usize, &mut Coefs)) -> Plan {
    let Respaced { timesteps, schedule } = respaced;
    let steps = timesteps.iter().enumerate().rev().map(|(k, &timestep)| {
        let mut coefs = Coefs::at(schedule.alpha_bar(k).sqrt(), (1.0 - schedule.alpha_bar(k)).sqrt());
        fill(schedule, k, &mut coefs);
        Step { timestep: timestep as f64, coefs }
    });
    Plan { steps: steps.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::solver::tests::{check_f32, check_f64};

    #[test]
    fn golden_ddpm_respaced_250() {
        let plan = Plan::ddpm(&Schedule::default(), &"250".parse().unwrap(), Variance::Learned).unwrap();
        check_f64("samplers/ddpm_respaced_250", &plan);
        check_f32("samplers/ddpm_respaced_250", &plan, "final (f32)");
    }

    #[test]
    fn golden_ddim() {
        for (case, spec, eta) in [("ddim_n10_eta1.0", "ddim10", 1.0), ("ddim_n20_eta0.0", "ddim20", 0.0)] {
            let plan = Plan::ddim(&Schedule::default(), &spec.parse().unwrap(), eta).unwrap();
            let case = format!("samplers/{case}");
            check_f64(&case, &plan);
            check_f32(&case, &plan, "latents (f32)");
        }
    }

    #[test]
    fn ddim_with_full_noise_has_the_posterior_variance() {
        let schedule = Schedule::default();
        let spacing = "50".parse().unwrap();
        let ddim = Plan::ddim(&schedule, &spacing, 1.0).unwrap();
        let ddpm = Plan::ddpm(&schedule, &spacing, Variance::FixedSmall).unwrap();
        for (a, b) in ddim.steps.iter().zip(&ddpm.steps) {
            assert_eq!(a.timestep, b.timestep);
            match (a.coefs.noise, b.coefs.noise) {
                (NoiseScale::Fixed(x), NoiseScale::Fixed(y)) => assert!((x / y - 1.0).abs() < 1e-9, "{x} {y}"),
                (x, y) => assert_eq!((x, y, a.timestep), (NoiseScale::None, NoiseScale::None, 0.0)),
            }
        }
    }

    #[test]
    fn eta_out_of_range_is_refused() {
        for eta in [-0.1, 1.1, f64::NAN] {
            assert_eq!(Plan::ddim(&Schedule::default(), &Respacing::Stride(10), eta).unwrap_err().exit_code(), 2);
        }
    }
}
