//! Operators on tensors: generated entry points that check, allocate and dispatch, and what they share.
//!
//! `generated.rs` follows from the contracts in `kernels-cu/<op>/op.toml`; nothing else here is written per operator, but
//! for `working.rs`, where f32 meets the working type of a device.

mod cases;
pub mod check;
mod entry;
#[rustfmt::skip]
mod generated;
pub mod watch;
mod working;

pub use generated::*;
pub use graft_kernels::generated as contracts;
pub use working::{to_f32, to_working};

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
