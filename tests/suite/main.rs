//! The test suites.

mod fuzz;
mod golden_io;
mod golden_verify;
