//! The test suites.

mod checkpoints;
mod demo;
mod fuzz;
mod golden_io;
mod golden_verify;
mod graft;
mod malicious;
mod plans;
mod properties;
mod science;
mod tidy;
mod torch_file;
