//! Kernel inception distance (arXiv 1801.01401): unbiased squared maximum mean discrepancy under a cubic kernel.
//!
//! k(x, y) = (x·y/D + 1)³. Being unbiased, the estimate may be negative when the sets agree.

use crate::error::{Error, Result};
use crate::eval::Features;
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, Par};
use graft_kernels::rng::Philox;
use rayon::prelude::*;

/// Mean and spread over random subsets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kid {
    /// Mean over the subsets.
    pub mean: f64,
    /// Population standard deviation over the subsets (denominator: their number).
    pub std: f64,
}

/// Which subsets to average over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subsets {
    /// Number of subsets (usually 100).
    pub count: usize,
    /// Rows of each set in a subset, drawn without replacement (usually 1000).
    pub size: usize,
    /// Seed of the draws; subset s uses random stream s.
    pub seed: u64,
}

/// Kernel inception distance averaged over random subsets; the result does not depend on the number of threads.
///
/// # Errors
/// A failure when the widths differ; a usage error when there is no subset, or its size is below 2 or exceeds a set.
pub fn kid(first: &Features, second: &Features, subsets: Subsets) -> Result<Kid> {
    first.check_same_dim(second)?;
    let most = first.len().min(second.len());
    if !(2..=most).contains(&subsets.size) {
        return Err(Error::usage("subset size", "out of range").is(subsets.size).must(format!("2 to {most}")));
    }
    if subsets.count == 0 {
        return Err(Error::usage("subsets", "too few").is(0).must("at least 1"));
    }
    let estimate = |s: usize| {
        let mut rng = Philox::new(subsets.seed, s as u64);
        let x = draw(&mut rng, first, subsets.size);
        let y = draw(&mut rng, second, subsets.size);
        mmd2_of_rows(&x, &y)
    };
    let values: Vec<f64> = (0..subsets.count).into_par_iter().map(estimate).collect();
    let count = subsets.count as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / count;
    Ok(Kid { mean, std: variance.sqrt() })
}

/// Unbiased squared maximum mean discrepancy of two whole sets.
///
/// # Errors
/// A failure when the widths differ.
pub fn mmd2(first: &Features, second: &Features) -> Result<f64> {
    first.check_same_dim(second)?;
    Ok(mmd2_of_rows(&first.rows().collect::<Vec<_>>(), &second.rows().collect::<Vec<_>>()))
}

/// `size` distinct rows of a set.
fn draw<'a>(rng: &mut Philox, set: &Features<'a>, size: usize) -> Vec<&'a [f32]> {
    let mut order: Vec<usize> = (0..set.len()).collect();
    rng.shuffle(&mut order);
    order[..size].iter().map(|&i| set.row(i)).collect()
}

/// Rows of one product: bounds the matrix of kernel values that exists at a time.
const BLOCK: usize = 256;

/// Both lists have at least two rows of one width.
fn mmd2_of_rows(x: &[&[f32]], y: &[&[f32]]) -> f64 {
    let (n, m) = (x.len() as f64, y.len() as f64);
    let (x, y) = (widened(x), widened(y));
    // The kernel of a row with itself is no estimate of anything.
    let within = |rows: &Mat<f64>| sum_blocks(rows, rows, |i, j| i != j);
    within(&x) / (n * (n - 1.0)) + within(&y) / (m * (m - 1.0)) - 2.0 * sum_blocks(&x, &y, |_, _| true) / (n * m)
}

/// Rows as the columns of a matrix, which faer keeps together.
fn widened(rows: &[&[f32]]) -> Mat<f64> {
    Mat::from_fn(rows[0].len(), rows.len(), |d, i| f64::from(rows[i][d]))
}

/// Σ k(x_i, y_j) over the pairs to be counted: blocks in parallel, added up in order so that the result is always the
/// same.
fn sum_blocks(x: &Mat<f64>, y: &Mat<f64>, counts: impl Fn(usize, usize) -> bool + Sync) -> f64 {
    let width = x.nrows() as f64;
    let block = |index: usize| {
        let start = index * BLOCK;
        let rows = x.subcols(start, BLOCK.min(x.ncols() - start));
        let mut products = Mat::<f64>::zeros(rows.ncols(), y.ncols());
        matmul(products.as_mut(), Accum::Replace, rows.transpose(), y.as_ref(), 1.0, Par::Seq);
        let column = |j: usize| {
            let kernels = products.col(j).iter().enumerate().filter(|(i, _)| counts(start + i, j));
            kernels.map(|(_, product)| (product / width + 1.0).powi(3)).sum::<f64>()
        };
        (0..y.ncols()).map(column).sum::<f64>()
    };
    (0..x.ncols().div_ceil(BLOCK)).into_par_iter().map(block).collect::<Vec<f64>>().iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Features of standard normal numbers plus a shift.
    fn noise(n: usize, dim: usize, seed: u64, shift: f32) -> Vec<f32> {
        let mut data = vec![0.0; n * dim];
        Philox::new(seed, 0).fill_normal(&mut data);
        data.iter_mut().for_each(|x| *x += shift);
        data
    }

    #[test]
    fn small_example_by_hand() {
        // D = 1, x = {0, 1}, y = {1, 2}: k(0,1) = 1, k(1,2) = 27, across: 1, 1, 8, 27.
        let x = Features::new("x", &[0.0, 1.0], 1).unwrap();
        let y = Features::new("y", &[1.0, 2.0], 1).unwrap();
        assert_eq!(mmd2(&x, &y).unwrap(), 1.0 + 27.0 - 2.0 * (1.0 + 1.0 + 8.0 + 27.0) / 4.0);
    }

    #[test]
    fn matches_a_naive_loop() {
        let (n, m, dim) = (9, 7, 11);
        let (a, b) = (noise(n, dim, 1, 0.0), noise(m, dim, 2, 0.3));
        let k = |p: &[f32], i: usize, q: &[f32], j: usize| {
            let dot: f64 = (0..dim).map(|d| f64::from(p[i * dim + d]) * f64::from(q[j * dim + d])).sum();
            let s = dot / dim as f64 + 1.0;
            s * s * s
        };
        let (mut xx, mut yy, mut xy) = (0.0, 0.0, 0.0);
        for i in 0..n {
            for j in 0..n {
                xx += if i == j { 0.0 } else { k(&a, i, &a, j) / (n * (n - 1)) as f64 };
            }
            for j in 0..m {
                xy += k(&a, i, &b, j) / (n * m) as f64;
            }
        }
        for i in 0..m {
            for j in 0..m {
                yy += if i == j { 0.0 } else { k(&b, i, &b, j) / (m * (m - 1)) as f64 };
            }
        }
        let (x, y) = (Features::new("x", &a, dim).unwrap(), Features::new("y", &b, dim).unwrap());
        assert!((mmd2(&x, &y).unwrap() - (xx + yy - 2.0 * xy)).abs() < 1e-12);
    }

    #[test]
    fn subsets_are_reproducible_and_centred() {
        let (a, b, c) = (noise(200, 6, 1, 0.0), noise(220, 6, 2, 0.0), noise(200, 6, 3, 0.5));
        let [a, b, c] = [&a, &b, &c].map(|data| Features::new("set", data, 6).unwrap());
        let subsets = Subsets { count: 40, size: 60, seed: 5 };
        let same = kid(&a, &b, subsets).unwrap();
        assert_eq!(same, kid(&a, &b, subsets).unwrap());
        assert_ne!(same, kid(&a, &b, Subsets { seed: 6, ..subsets }).unwrap());
        let apart = kid(&a, &c, subsets).unwrap();
        assert!(same.std > 0.0 && same.mean.abs() < 0.1 && apart.mean > 0.5, "{same:?} {apart:?}");
        // A subset of everything is the whole set, in any order.
        let whole = kid(&a, &c, Subsets { count: 3, size: 200, seed: 1 }).unwrap();
        assert!((whole.mean - mmd2(&a, &c).unwrap()).abs() < 1e-12 && whole.std < 1e-12);
    }

    #[test]
    fn misuse_is_refused() {
        let (a, b) = (noise(5, 2, 1, 0.0), noise(4, 2, 2, 0.0));
        let (a, b) = (Features::new("a", &a, 2).unwrap(), Features::new("b", &b, 2).unwrap());
        for (count, size) in [(1, 5), (1, 1), (0, 3)] {
            assert_eq!(kid(&a, &b, Subsets { count, size, seed: 0 }).unwrap_err().exit_code(), 2);
        }
        let c = Features::new("c", &[0.0; 6], 3).unwrap();
        assert!(mmd2(&a, &c).is_err() && kid(&a, &c, Subsets { count: 1, size: 2, seed: 0 }).is_err());
    }
}
