//! Models: forward passes over `nn` and `ops`, and the file layouts they are found in.
//!
//! A model never names a backend. `dit` is the class-conditional transformer, `pixart` the one that reads text; `open`
//! finds weights, `fill` puts them into a model.

pub mod dit;
mod fill;
mod open;
pub mod pixart;
mod positions;
mod source;

pub use open::{Opened, component, open};
pub(crate) use source::read_weight;
pub use source::{Source, StoredTensor};
