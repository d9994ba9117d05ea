//! Test helpers.

pub mod mutate;
