//! Models: forward passes over `nn` and `ops`, and the file layouts they are found in.
//!
//! A model never names a backend. `dit` is here; PixArt-Σ, its text encoder and the autoencoders get rooms of their own
//! beside it.

pub mod dit;
mod source;

pub(crate) use source::read_weight;
pub use source::{Source, StoredTensor};
