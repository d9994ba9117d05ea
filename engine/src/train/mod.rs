//! Training: data order, the diffusion objective, AdamW with EMA, crash-safe checkpoints, the loop.
//!
//! Every random choice of a step is a function of (seed, step), so that a resumed run draws what an unbroken one
//! would have drawn; the only state is in the checkpoint.

pub mod batches;
pub mod checkpoint;
pub mod config;
pub mod learner;
pub mod objective;
pub mod optimizer;
pub mod pairs;
pub mod sites;
pub mod teacher;
pub mod text;
pub mod trainer;
