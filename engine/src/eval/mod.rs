//! Quality of models: distances of samples to real images, and what a model can do with images it has not seen.
//!
//! | module | for |
//! |---|---|
//! | [`score`] | scores in the feature space of the small [`classifier`] |
//! | [`standard`] | scores in the feature space of the [`inception`] network: FID, sFID, KID and so on |
//! | [`frechet`], [`kid`], [`precision_recall`], [`inception_score`], [`distances`] | the metrics, in f64 |
//! | [`samples`] | samples in a folder, made in parts by any number of processes |
//! | [`retrieval`] | pictures from captions, looked up among the real ones |
//! | [`loss`], [`inpaint`] | denoising loss and filled holes, on held-out images |
//!
//! Features are rows of f32 numbers from one image network; [`Features`] checks them once for every metric.

pub mod classifier;
pub mod distances;
pub mod features;
pub mod frechet;
pub mod inception;
pub mod inception_score;
pub mod inpaint;
pub mod kid;
pub mod loss;
pub mod precision_recall;
pub mod retrieval;
pub mod samples;
pub mod score;
pub mod standard;

pub use features::Features;
