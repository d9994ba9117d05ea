//! Models: forward passes over `nn` and `ops`, and the file layouts they are found in.
//!
//! A model never names a backend. `dit` is the class-conditional transformer, `pixart` the one that reads text, which
//! `t5` encodes; `vae` turns latents into pictures; `open` finds weights, `fill` puts them into a model; `sites`
//! is what grafting sees of both transformers.

pub mod adapter;
pub mod dit;
mod fill;
mod folder;
pub mod lora;
mod open;
pub mod pipeline;
pub mod pixart;
mod positions;
pub mod sites;
mod source;
pub mod t5;
pub mod vae;

pub use open::{Opened, PLAN, STAGES, component, last_stage, open};
pub(crate) use source::read_weight;
pub use source::{Source, StoredTensor};
