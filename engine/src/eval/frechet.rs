//! Fréchet distance between two sets of features (FID, arXiv 1706.08500; sFID with spatial features).
//!
//! For Gaussians with means m and covariances S the squared distance is
//! |m1-m2|² + tr S1 + tr S2 - 2 tr (S1 S2)^½. The last trace is taken from symmetric eigenvalue problems only: with
//! S1 = U Λ Uᵀ and W = U Λ^½ it is Σ √eig(Wᵀ S2 W). Directions whose eigenvalue is rounding noise are left out of W, so
//! covariances of fewer images than dimensions need no regularisation.

use crate::error::{Error, Result};
use crate::eval::Features;
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par, Side};

/// Mean and covariance of features of width D.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    mean: Vec<f64>,
    covariance: Vec<f64>,
}

/// The distance and its parts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Frechet {
    /// The squared Fréchet distance, the number reported as FID; never negative.
    pub distance: f64,
    /// |m1-m2|².
    pub mean_term: f64,
    /// tr S1.
    pub trace_1: f64,
    /// tr S2.
    pub trace_2: f64,
    /// tr (S1 S2)^½.
    pub trace_sqrt: f64,
}

/// Rows that one matrix product takes: bounds the f64 copy of a block of features.
const BLOCK: usize = 512;
/// Asymmetry of a given covariance, relative to its largest entry, above which it is taken for damaged.
const ASYMMETRY: f64 = 1e-6;

impl Moments {
    /// Mean and unbiased covariance (denominator n-1) of features.
    pub fn from_features(features: &Features) -> Self {
        let (n, dim) = (features.len() as f64, features.dim());
        let mut mean = vec![0.0; dim];
        for row in features.rows() {
            mean.iter_mut().zip(row).for_each(|(m, &x)| *m += f64::from(x));
        }
        mean.iter_mut().for_each(|m| *m /= n);

        let mut sum = Mat::<f64>::zeros(dim, dim);
        let mut centred = Vec::with_capacity(BLOCK * dim);
        for block in features.data().chunks(BLOCK * dim) {
            centred.clear();
            for row in block.chunks_exact(dim) {
                centred.extend(row.iter().zip(&mean).map(|(&x, m)| f64::from(x) - m));
            }
            let rows = MatRef::from_row_major_slice(&centred, block.len() / dim, dim);
            matmul(sum.as_mut(), Accum::Add, rows.transpose(), rows, 1.0 / (n - 1.0), Par::Seq);
        }
        // The lower triangle serves both, so that the result is symmetric to the bit.
        let covariance = (0..dim * dim).map(|i| sum[((i / dim).max(i % dim), (i / dim).min(i % dim))]).collect();
        Moments { mean, covariance }
    }

    /// Moments from stored numbers: `mean` of D values, `covariance` of D·D, row-major.
    ///
    /// # Errors
    /// A failure when the sizes do not fit, a value is not finite, a variance is negative or the covariance is not
    /// symmetric; `name` says which statistics these are.
    pub fn new(name: &str, mean: Vec<f64>, covariance: Vec<f64>) -> Result<Self> {
        let dim = mean.len();
        if dim == 0 || covariance.len() != dim * dim {
            return Err(Error::failure(name, "covariance does not fit the mean")
                .is(format!("{} and {dim} values", covariance.len()))
                .must("D·D and D values, D at least 1"));
        }
        if let Some(x) = mean.iter().chain(&covariance).find(|x| !x.is_finite()) {
            return Err(Error::failure(name, "value is not finite").is(x).must("finite"));
        }
        if let Some(i) = (0..dim).find(|i| covariance[i * dim + i] < 0.0) {
            return Err(Error::failure(name, format!("variance {i} is negative"))
                .is(covariance[i * dim + i])
                .must("at least 0"));
        }
        let largest = covariance.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let skewed =
            |i: usize, j: usize| (covariance[i * dim + j] - covariance[j * dim + i]).abs() > ASYMMETRY * largest;
        if let Some((i, j)) = (0..dim).flat_map(|i| (0..i).map(move |j| (i, j))).find(|&(i, j)| skewed(i, j)) {
            return Err(Error::failure(name, format!("covariance is not symmetric at ({i}, {j})"))
                .is(format!("{} and {}", covariance[i * dim + j], covariance[j * dim + i]))
                .must("equal"));
        }
        Ok(Moments { mean, covariance })
    }

    /// The mean: D values.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// The covariance: D·D values, row-major.
    pub fn covariance(&self) -> &[f64] {
        &self.covariance
    }

    /// Width D.
    pub fn dim(&self) -> usize {
        self.mean.len()
    }

    fn matrix(&self) -> MatRef<'_, f64> {
        MatRef::from_row_major_slice(&self.covariance, self.dim(), self.dim())
    }

    fn trace(&self) -> f64 {
        (0..self.dim()).map(|i| self.covariance[i * self.dim() + i]).sum()
    }
}

/// Squared Fréchet distance of two Gaussians.
///
/// # Errors
/// A failure when the widths differ or an eigenvalue problem does not converge.
pub fn frechet_distance(first: &Moments, second: &Moments) -> Result<Frechet> {
    if first.dim() != second.dim() {
        return Err(Error::failure("Fréchet distance", "the sets have different widths")
            .is(format!("{} and {}", first.dim(), second.dim()))
            .must("equal")
            .fix("compute both with the same feature network"));
    }
    let mean_term = first.mean.iter().zip(&second.mean).map(|(a, b)| (a - b) * (a - b)).sum();
    let (trace_1, trace_2) = (first.trace(), second.trace());
    let trace_sqrt = trace_sqrt_product(first.matrix(), second.matrix())?;
    // Equal sets may come out below zero by rounding.
    let distance = f64::max(mean_term + trace_1 + trace_2 - 2.0 * trace_sqrt, 0.0);
    Ok(Frechet { distance, mean_term, trace_1, trace_2, trace_sqrt })
}

/// tr (S1 S2)^½ of two symmetric positive semi-definite matrices.
fn trace_sqrt_product(first: MatRef<f64>, second: MatRef<f64>) -> Result<f64> {
    let failed = |e| Error::failure("Fréchet distance", format!("eigenvalue problem did not converge: {e:?}"));
    let eigen = first.self_adjoint_eigen(Side::Lower).map_err(failed)?;
    let (vectors, values) = (eigen.U(), eigen.S().column_vector());
    let floor = noise_floor(values.iter().copied());
    let kept: Vec<usize> = (0..values.nrows()).filter(|&i| values[i] > floor).collect();
    let root = Mat::from_fn(first.nrows(), kept.len(), |i, j| vectors[(i, kept[j])] * values[kept[j]].sqrt());
    let product = root.transpose() * second * &root;
    let values = product.self_adjoint_eigenvalues(Side::Lower).map_err(failed)?;
    let floor = noise_floor(values.iter().copied());
    Ok(values.iter().filter(|&&v| v > floor).map(|v| v.sqrt()).sum())
}

/// Eigenvalues up to this are indistinguishable from zero: D·ε times the largest.
fn noise_floor(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let scale = values.len() as f64 * f64::EPSILON;
    scale * values.fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::golden::{Case, assert_close};

    fn golden(path: &str) {
        let case = Case::open(path);
        let dim = case.json("case.json")["config"]["dim"].as_u64().unwrap() as usize;
        let tolerance = case.json("case.json")["tolerance"]["frechet (float64)"]["rel"].as_f64().unwrap();
        let moments = [1, 2].map(|i| {
            let data = case.input_f32(&format!("features_{i}"));
            let moments = Moments::from_features(&Features::new("features", &data, dim).unwrap());
            for (name, got) in [("mean", moments.mean()), ("cov", moments.covariance())] {
                assert_close(name, got, &case.expected(&format!("{name}_{i}")), (1e-6, 1e-7));
            }
            Moments::new("stored", moments.mean.clone(), moments.covariance.clone()).unwrap()
        });
        let want = case.json("expected.json");
        for (a, b) in [(0, 1), (1, 0)] {
            let got = frechet_distance(&moments[a], &moments[b]).unwrap();
            let (first, second) = (["trace_1", "trace_2"][a], ["trace_1", "trace_2"][b]);
            for (name, got) in [
                ("frechet", got.distance),
                ("mean_term", got.mean_term),
                (first, got.trace_1),
                (second, got.trace_2),
                ("trace_sqrt", got.trace_sqrt),
            ] {
                let want = want[name].as_f64().unwrap();
                assert!((got - want).abs() <= tolerance * want, "{path} {name}: {got} {want}");
            }
        }
        let same = frechet_distance(&moments[0], &moments[0]).unwrap();
        assert!((0.0..1e-9 * same.trace_1).contains(&same.distance), "{same:?}");
    }

    #[test]
    fn golden_full_rank() {
        golden("metrics/frechet_full_rank");
    }

    #[test]
    fn golden_rank_deficient() {
        golden("metrics/frechet_rank_deficient");
    }

    #[test]
    fn blocks_of_rows_add_up() {
        let n = 2 * BLOCK + 5;
        let data: Vec<f32> =
            (0..2 * n).map(|i| if i % 2 == 0 { (i / 2) as f32 } else { -3.0 * (i / 2) as f32 }).collect();
        let moments = Moments::from_features(&Features::new("ramp", &data, 2).unwrap());
        let n = n as f64;
        let variance = n * (n + 1.0) / 12.0;
        let want = [variance, -3.0 * variance, -3.0 * variance, 9.0 * variance];
        assert_eq!(moments.mean(), [(n - 1.0) / 2.0, -3.0 * (n - 1.0) / 2.0]);
        assert_close("covariance", moments.covariance(), &want, (1e-6, 1e-13));
    }

    #[test]
    fn commuting_and_constant_sets() {
        let diagonal = |a: f64, b: f64| Moments::new("d", vec![0.0, 1.0], vec![a, 0.0, 0.0, b]).unwrap();
        let got = frechet_distance(&diagonal(4.0, 9.0), &diagonal(1.0, 16.0)).unwrap();
        assert!((got.distance - 2.0).abs() < 1e-12); // (2-1)² + (3-4)²
        let still = frechet_distance(&diagonal(0.0, 0.0), &diagonal(1.0, 16.0)).unwrap();
        assert_eq!(still.distance, 17.0);
        assert_eq!(frechet_distance(&diagonal(0.0, 0.0), &diagonal(0.0, 0.0)).unwrap().distance, 0.0);
    }

    #[test]
    fn bad_statistics_are_explained() {
        let message = |mean: &[f64], cov: &[f64]| Moments::new("ref", mean.into(), cov.into()).unwrap_err().to_string();
        assert!(message(&[0.0; 2], &[0.0; 3]).contains("does not fit"));
        assert!(message(&[], &[]).contains("does not fit"));
        assert!(message(&[f64::NAN], &[1.0]).contains("not finite"));
        assert!(message(&[0.0], &[-1.0]).contains("variance 0 is negative"));
        assert!(message(&[0.0; 2], &[1.0, 0.5, 0.4, 1.0]).contains("not symmetric at (1, 0)"));
        let one = Moments::new("a", vec![0.0], vec![1.0]).unwrap();
        let two = Moments::new("b", vec![0.0; 2], vec![0.0; 4]).unwrap();
        assert!(frechet_distance(&one, &two).unwrap_err().to_string().contains("is 1 and 2"));
    }
}
