//! The program from the outside: what it prints, writes and answers, run as a user would run it.

mod emoji;
mod errors;
mod evaluation;
mod gpu;
mod help;
mod plans;
mod reports;
mod sampling;
#[path = "../scratch.rs"]
mod scratch;
mod support;
mod text;
mod text_faults;
mod text_graft;
mod training;
