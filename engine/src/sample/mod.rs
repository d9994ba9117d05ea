//! Noise schedules, samplers and the terms of the training loss.
//!
//! [`pipeline`] is the sampling loop over a model, [`cfg`](mod@cfg) its guidance. The rest is plain mathematics on
//! numbers and slices: [`schedule`] owns the betas, [`solver`] turns a sampler and a step count into the coefficients of
//! every step, [`update`] is the reference of the fused update that consumes them, [`vlb`] the reference of the fused
//! loss. Coefficients are always derived in f64.

pub mod ancestral;
pub mod cfg;
pub mod config;
pub mod dpm;
pub mod pipeline;
pub mod real;
pub mod respacing;
pub mod schedule;
pub mod solver;
pub mod update;
pub mod vlb;

pub use graft_kernels::rng;

#[cfg(test)]
pub(crate) mod golden;
