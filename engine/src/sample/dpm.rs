//! DPM-Solver++ 2M (arXiv 2211.01095): second-order multistep solver of the probability-flow ODE in the clean estimate.
//!
//! With α = √ᾱ, σ = √(1-ᾱ), λ = ln(α/σ), h = λ' - λ and r = (λ - λ_prev)/h, a step to (α', σ') is
//! `x' = (σ'/σ) x - α'(e^{-h} - 1) (x0 + (x0 - x0_prev)/(2r))`; the first and the last step drop the difference.

use crate::error::Result;
use crate::sample::respacing::check_count;
use crate::sample::schedule::Schedule;
use crate::sample::solver::{Coefs, Plan, Step};

/// Where a DPM-Solver++ trajectory ends, and with that which timesteps it visits. The released PixArt pipelines differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DpmEndPoint {
    /// As the diffusers scheduler with `final_sigmas_type` "zero": whole timesteps, and the last step returns the
    /// clean estimate.
    Zero,
    /// As the original PixArt code: equally spaced fractional timesteps, ending at the noise level of timestep 0.
    Official,
}

/// A point on the noise path.
struct Node {
    timestep: f64,
    alpha: f64,
    sigma: f64,
    lambda: f64,
}

impl Node {
    /// ln α between whole timesteps is interpolated linearly. `timestep` must lie in 0..=T-1.
    fn new(schedule: &Schedule, timestep: f64) -> Self {
        let last = schedule.len() - 1;
        let below = (timestep as usize).min(last);
        let fraction = timestep - below as f64;
        let (lo, hi) = (schedule.alpha_bar(below).ln(), schedule.alpha_bar((below + 1).min(last)).ln());
        let log_alpha = 0.5 * (lo + fraction * (hi - lo));
        let alpha = log_alpha.exp();
        // 1 - ᾱ without cancellation.
        let sigma = (-(2.0 * log_alpha).exp_m1()).sqrt();
        Node { timestep, alpha, sigma, lambda: log_alpha - sigma.ln() }
    }
}

impl Plan {
    /// DPM-Solver++ 2M with `steps` model evaluations.
    ///
    /// # Errors
    /// A usage error when `steps` is 0, or more than T-1: a further step could only repeat a timestep.
    pub fn dpm_plus_plus(schedule: &Schedule, steps: usize, end: DpmEndPoint) -> Result<Plan> {
        check_count("steps", steps, schedule.len() - 1)?;
        let spacing = (schedule.len() - 1) as f64 / steps as f64;
        let timestep = |i: usize| match end {
            DpmEndPoint::Zero => ((steps - i) as f64 * spacing).round_ties_even(),
            DpmEndPoint::Official => (steps - i) as f64 * spacing,
        };
        let nodes: Vec<Node> = (0..=steps).map(|i| Node::new(schedule, timestep(i))).collect();
        let step = |i: usize| {
            let here = &nodes[i];
            let before = i.checked_sub(1).map(|j| &nodes[j]);
            let coefs = match end {
                DpmEndPoint::Zero if i + 1 == steps => Coefs { c0: 1.0, ..Coefs::at(here.alpha, here.sigma) },
                _ => update(before.filter(|_| i + 1 < steps), here, &nodes[i + 1]),
            };
            Step { timestep: here.timestep, coefs }
        };
        Ok(Plan { steps: (0..steps).map(step).collect() })
    }
}

/// The step from `here` to `next`: second order with the node before, first order without.
fn update(before: Option<&Node>, here: &Node, next: &Node) -> Coefs {
    let h = next.lambda - here.lambda;
    let weight = -next.alpha * (-h).exp_m1();
    let half_inverse_r = before.map_or(0.0, |b| 0.5 * h / (here.lambda - b.lambda));
    Coefs {
        cx: next.sigma / here.sigma,
        c0: weight * (1.0 + half_inverse_r),
        // Written so that a first-order step gets +0, not -0.
        c1: 0.0 - weight * half_inverse_r,
        ..Coefs::at(here.alpha, here.sigma)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::solver::tests::{check_f32, check_f64, exact};

    #[test]
    fn golden_dpm_solver() {
        for steps in [10, 14, 20, 25] {
            let plan = Plan::dpm_plus_plus(&Schedule::default(), steps, DpmEndPoint::Zero).unwrap();
            let case = format!("samplers/dpm_solver_pp_2m_n{steps}");
            check_f64(&case, &plan);
            check_f32(&case, &plan, "latents (f32)");
        }
    }

    #[test]
    fn released_coefficients() {
        let plan = Plan::dpm_plus_plus(&Schedule::default(), 20, DpmEndPoint::Zero).unwrap();
        for (i, t, sigma, want) in [
            (0, 999.0, 157.407281, [0.99996613, 0.00404443, 0.0]),
            (1, 949.0, 96.176093, [0.99991643, 0.00913052, -0.00293735]),
            (10, 500.0, 3.442967, [0.97360414, 0.12331770, -0.04013818]),
            (18, 100.0, 0.342260, [0.53531549, 0.85530855, -0.37691968]),
            (19, 50.0, 0.176010, [0.0, 1.0, 0.0]),
        ] {
            let Step { timestep, coefs: c } = plan.steps[i];
            assert_eq!(timestep, t);
            assert!((c.inv_alpha * c.sigma / sigma - 1.0).abs() < 1e-5, "{i}");
            for (got, want) in [c.cx, c.c0, c.c1].iter().zip(want) {
                assert!((got - want).abs() < 1e-8, "{i}: {got} {want}");
            }
        }
    }

    #[test]
    fn official_end_point_visits_fractional_timesteps() {
        let plan = Plan::dpm_plus_plus(&Schedule::default(), 20, DpmEndPoint::Official).unwrap();
        for (i, t) in [(0, 999.0), (1, 949.05), (2, 899.1), (19, 49.95)] {
            assert!((plan.steps[i].timestep - t).abs() < 1e-9);
        }
        // First order at both ends, second in between.
        let orders: Vec<bool> = plan.steps.iter().map(|s| s.coefs.c1 != 0.0).collect();
        assert_eq!((orders[0], orders[19]), (false, false));
        assert!(orders[1..19].iter().all(|&second| second));
        let end = Node::new(&Schedule::default(), 0.0);
        assert!((end.sigma / end.alpha - 0.0100005).abs() < 1e-7);
        // A latent that is pure signal stays pure signal: the weights of x and x0 carry α·x0 to α'·x0.
        for (s, next) in
            plan.steps.iter().zip(plan.steps[1..].iter().map(|s| 1.0 / s.coefs.inv_alpha).chain([end.alpha]))
        {
            let c = s.coefs;
            assert!((c.cx / c.inv_alpha + c.c0 + c.c1 - next).abs() < 1e-12);
        }
    }

    /// For Gaussian data of standard deviation s the exact prediction is eps = σx/(α²s²+σ²), and the exact solution
    /// keeps x/√(α²s²+σ²) constant; the error must fall with the square of the step size.
    #[test]
    fn official_variant_converges_with_second_order() {
        let (schedule, s) = (Schedule::default(), 0.5f64);
        let end = Node::new(&schedule, 0.0);
        let spread = |alpha: f64, sigma: f64| (alpha * alpha * s * s + sigma * sigma).sqrt();
        let error = |steps: usize| {
            let plan = Plan::dpm_plus_plus(&schedule, steps, DpmEndPoint::Official).unwrap();
            let (mut x, mut x0) = (1.0, 0.0);
            for step in &plan.steps {
                let (alpha, sigma) = (1.0 / step.coefs.inv_alpha, step.coefs.sigma);
                let eps = sigma * x / spread(alpha, sigma).powi(2);
                (x, x0) = exact(&step.coefs, x, [eps, 0.0], x0, 0.0);
            }
            let start = Node::new(&schedule, 999.0);
            (x - spread(end.alpha, end.sigma) / spread(start.alpha, start.sigma)).abs()
        };
        let (coarse, fine) = (error(400), error(800));
        // A first-order solver would only halve the error.
        assert!(fine < 5e-5 && coarse / fine > 3.4, "{coarse:e} {fine:e}");
    }

    #[test]
    fn too_many_steps_are_refused() {
        for end in [DpmEndPoint::Zero, DpmEndPoint::Official] {
            for (steps, timesteps) in [(0, 1000), (1000, 1000), (1, 1)] {
                let schedule = Schedule::linear(1e-4, 0.02, timesteps).unwrap();
                assert_eq!(Plan::dpm_plus_plus(&schedule, steps, end).unwrap_err().exit_code(), 2);
            }
        }
    }
}
