//! Kernels.

pub mod rng;
