//! The distances of one set of features to another that every feature space shares.

use crate::error::Result;
use crate::eval::Features;
use crate::eval::frechet::{Moments, frechet_distance};
use crate::eval::kid::{Subsets, kid};
use crate::eval::precision_recall::precision_recall;
use graft_kernels::rng::Philox;

/// Neighbours that bound the support in precision and recall.
pub const NEIGHBOURS: usize = 3;
/// Random stream: which reference images stand against the samples in precision and recall.
const REFERENCE_STREAM: u64 = 5 << 40;

/// Distances of samples to a reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distances {
    /// Squared Fréchet distance.
    pub frechet: f64,
    /// Kernel distance, unbiased: mean over subsets.
    pub kid: f64,
    /// Its standard deviation over the subsets.
    pub kid_sd: f64,
    /// Fraction of the samples inside the support of as many reference points.
    pub precision: f64,
    /// Fraction of as many reference points inside the support of the samples.
    pub recall: f64,
}

/// All distances of `samples` to `reference`, whose moments are `moments`.
///
/// Precision and recall take equal numbers of both, drawn by the seed of `subsets`, so that neither is favoured.
///
/// # Errors
/// Sets of different widths, of fewer than 5 rows, or smaller than a subset.
pub fn distances(reference: &Features, moments: &Moments, samples: &Features, subsets: Subsets) -> Result<Distances> {
    let n = samples.len().min(reference.len());
    let gather = |set: &Features| -> Vec<f32> {
        if set.len() == n {
            return set.data().to_vec();
        }
        order(set.len(), subsets.seed, REFERENCE_STREAM)[..n]
            .iter()
            .flat_map(|&i| set.row(i as usize))
            .copied()
            .collect()
    };
    let (real, generated) = (gather(reference), gather(samples));
    let real = Features::new(reference.name(), &real, reference.dim())?;
    let generated = Features::new(samples.name(), &generated, samples.dim())?;
    let support = precision_recall(&real, &generated, NEIGHBOURS)?;
    let kernel = kid(reference, samples, subsets)?;
    Ok(Distances {
        frechet: frechet_distance(moments, &Moments::from_features(samples))?.distance,
        kid: kernel.mean,
        kid_sd: kernel.std,
        precision: support.precision,
        recall: support.recall,
    })
}

/// A random order of `0..n`.
pub fn order(n: usize, seed: u64, stream: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..n as u32).collect();
    Philox::new(seed, stream).shuffle(&mut order);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_sets_coincide_and_a_shift_shows_in_every_number() {
        let mut data = vec![0.0; 60 * 4];
        Philox::new(1, 0).fill_normal(&mut data);
        let shifted: Vec<f32> = data.iter().map(|v| v + 4.0).collect();
        let (real, far) = (Features::new("real", &data, 4).unwrap(), Features::new("far", &shifted, 4).unwrap());
        let subsets = Subsets { count: 5, size: 40, seed: 3 };
        let moments = Moments::from_features(&real);
        let same = distances(&real, &moments, &real, subsets).unwrap();
        assert!(same.frechet < 1e-9 && (same.precision, same.recall) == (1.0, 1.0), "{same:?}");
        let apart = distances(&real, &moments, &far, subsets).unwrap();
        // Means differ by 4 in four dimensions, covariances agree.
        assert!((apart.frechet - 64.0).abs() < 1e-4, "{apart:?}");
        assert!(apart.kid > 50.0 && apart.kid_sd > 0.0 && (apart.precision, apart.recall) == (0.0, 0.0), "{apart:?}");
    }

    #[test]
    fn a_smaller_reference_bounds_the_support() {
        let mut data = vec![0.0; 50 * 2];
        Philox::new(2, 0).fill_normal(&mut data);
        let (many, few) = (Features::new("a", &data, 2).unwrap(), Features::new("b", &data[..20], 2).unwrap());
        let subsets = Subsets { count: 2, size: 10, seed: 0 };
        assert!(distances(&few, &Moments::from_features(&few), &many, subsets).is_ok());
        assert!(distances(&few, &Moments::from_features(&few), &many, Subsets { size: 11, ..subsets }).is_err());
    }
}
