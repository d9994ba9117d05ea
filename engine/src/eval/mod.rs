//! Quality metrics on features and logits, all computed in f64.
//!
//! Features are rows of f32 numbers from one image network; [`Features`] checks them once for every metric.

pub mod classifier;
pub mod features;
pub mod frechet;
pub mod inception_score;
pub mod kid;
pub mod precision_recall;
pub mod score;

pub use features::Features;
