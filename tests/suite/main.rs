//! The test suites.

mod checkpoints;
mod demo;
mod devices;
mod distill;
mod fuzz;
mod golden_io;
mod golden_verify;
mod graft;
mod malicious;
mod mixed;
mod plans;
mod properties;
mod science;
mod stage2;
mod tidy;
mod torch_file;
