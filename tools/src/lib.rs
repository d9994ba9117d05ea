//! Developer tools as a library, so that tests can call what `xtask` runs.

pub mod codegen;
pub mod cubins;
pub mod new_op;
pub mod nvcc;
pub mod parallel;
pub mod tidy;
