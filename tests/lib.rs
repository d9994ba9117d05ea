//! Test helpers.

pub mod mutate;
pub mod scratch;
