//! Noise schedules, samplers and the coefficients of the training loss.
//!
//! [`pipeline`] is the sampling loop over a model that reads labels, [`text`] over one that reads text, whose sizes
//! [`bins`] lists and whose prompts [`captions`] cleans; [`cfg`](mod@cfg) is their guidance, [`inpaint`] what they do
//! with pixels that are known. The rest is plain mathematics:
//! [`schedule`] owns the betas; [`solver`] turns a sampler and a step count into the coefficients of every step, which
//! the operator `solver_step` consumes; [`vlb`] the coefficients of a timestep for the operator `loss_diffusion`.
//! Coefficients are always derived in f64 and rounded where they enter an operator.

pub mod ancestral;
pub mod bins;
pub mod captions;
pub mod cfg;
pub mod config;
pub mod dpm;
pub mod inpaint;
mod pattern;
pub mod pipeline;
mod repair;
pub mod respacing;
pub mod schedule;
pub mod solver;
pub mod text;
pub mod vlb;

pub use graft_kernels::rng;

#[cfg(test)]
pub(crate) mod golden;
