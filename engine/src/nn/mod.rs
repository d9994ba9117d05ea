//! Building blocks of networks: parameters with their initialisation, linear layers, and the operators that can sit
//! at a block's `attn` or `mlp` site.

mod builder;
mod linear;
pub mod lora;
pub mod operators;
mod rows;

pub use builder::{Builder, Init, Scheme};
pub use linear::{Epilogue, Linear};
pub use rows::{Rows, Rule};
