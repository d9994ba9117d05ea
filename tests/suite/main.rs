//! The test suites.

mod fuzz;
mod golden_io;
mod properties;
mod graft;
mod golden_verify;
mod tidy;
