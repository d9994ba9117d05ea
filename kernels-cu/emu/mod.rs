//! Kernels on the emulator: compiled by the host's C++ compiler, run through case files.
//!
//! The sources of `kernels-cu/**/*.cu` compile unchanged against `kernels-cu/emu`. Three builds see different faults:
//! the plain one runs many seeded schedules, the one with the address checker sees steps outside of memory, the one
//! with the race checker sees missing barriers and fences.

mod case;
pub mod process;
mod toolchain;

pub use case::{Argument, Case, Outcome};
pub use toolchain::{Build, Program, Toolchain};
