//! The test suites.

mod demo;
mod fuzz;
mod golden_io;
mod golden_verify;
mod graft;
mod plans;
mod properties;
mod science;
mod tidy;
