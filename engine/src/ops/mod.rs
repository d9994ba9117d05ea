//! Operators on tensors: generated entry points that check, allocate and dispatch, and what they share.
//!
//! `generated.rs` follows from the contracts in `kernels-cu/<op>/op.toml`; nothing here is written per operator.

mod cases;
pub mod check;
mod entry;
#[rustfmt::skip]
mod generated;
pub mod watch;

pub use generated::*;
pub use graft_kernels::generated as contracts;

/// Activation codes of the contracts.
pub mod act {
    /// Identity.
    pub const NONE: usize = 0;
    /// GELU, tanh approximation.
    pub const GELU: usize = 1;
    /// SiLU.
    pub const SILU: usize = 2;
    /// Sine.
    pub const SINE: usize = 3;
}
