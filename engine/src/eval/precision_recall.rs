//! Improved precision and recall (arXiv 1904.06991): how much of one set lies within the support of the other.
//!
//! The support of a set is the union of balls around its points, each reaching to the k-th nearest other point of the
//! same set. All comparisons are of squared distances, summed from differences in f64, so decisions are exact up to
//! the rounding of one sum and do not depend on the number of threads. Cost: O((n+m)²·D) operations, O(n+m) memory.

use crate::error::{Error, Result};
use crate::eval::Features;
use crate::eval::features::squared_distance;
use rayon::prelude::*;

/// Fidelity and coverage of a generated set, each in 0..=1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrecisionRecall {
    /// Fraction of generated points inside the support of the real ones.
    pub precision: f64,
    /// Fraction of real points inside the support of the generated ones.
    pub recall: f64,
}

/// Precision and recall with balls to the `k`-th nearest neighbour (the papers use 3).
///
/// # Errors
/// As [`Support::new`], and a failure when the widths differ.
pub fn precision_recall(real: &Features, generated: &Features, k: usize) -> Result<PrecisionRecall> {
    let fraction = |inside: Vec<bool>| inside.iter().filter(|&&x| x).count() as f64 / inside.len() as f64;
    Ok(PrecisionRecall {
        precision: fraction(Support::new(*real, k)?.contains(generated)?),
        recall: fraction(Support::new(*generated, k)?.contains(real)?),
    })
}

/// A set of points with the squared radius of the ball around each.
#[derive(Clone, Debug)]
pub struct Support<'a> {
    centres: Features<'a>,
    squared_radii: Vec<f64>,
}

impl<'a> Support<'a> {
    /// Finds each point's distance to its `k`-th nearest other point.
    ///
    /// # Errors
    /// A usage error unless 1 ≤ k < n.
    pub fn new(centres: Features<'a>, k: usize) -> Result<Self> {
        let n = centres.len();
        if k == 0 || k >= n {
            return Err(Error::usage("k", format!("wrong number of neighbours for {} {}", n, centres.name()))
                .is(k)
                .must(format!("1 to {}", n - 1)));
        }
        let squared_radius = |i: usize| {
            let others = (0..n).filter(|&j| j != i);
            let mut distances: Vec<f64> = others.map(|j| squared_distance(centres.row(i), centres.row(j))).collect();
            *distances.select_nth_unstable_by(k - 1, f64::total_cmp).1
        };
        let squared_radii = (0..n).into_par_iter().map(squared_radius).collect();
        Ok(Support { centres, squared_radii })
    }

    /// Distance from each point to its k-th nearest other point.
    pub fn radii(&self) -> Vec<f64> {
        self.squared_radii.iter().map(|r| r.sqrt()).collect()
    }

    /// For every query, whether some ball contains it (its surface included).
    ///
    /// # Errors
    /// A failure when the widths differ.
    pub fn contains(&self, queries: &Features) -> Result<Vec<bool>> {
        self.centres.check_same_dim(queries)?;
        let inside = |i: usize| {
            let row = queries.row(i);
            self.centres
                .rows()
                .zip(&self.squared_radii)
                .any(|(centre, &radius)| squared_distance(row, centre) <= radius)
        };
        Ok((0..queries.len()).into_par_iter().map(inside).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::golden::{Case, assert_close};

    #[test]
    fn golden_cases() {
        for case in ["metrics/precision_recall_k3", "metrics/precision_recall_k3_shifted"] {
            let case = Case::open(case);
            let config = case.json("case.json")["config"].clone();
            let number = |name: &str| config[name].as_u64().unwrap() as usize;
            let (real, generated) = (case.input_f32("real"), case.input_f32("generated"));
            let real = Features::new("real", &real, number("dim")).unwrap();
            let generated = Features::new("generated", &generated, number("dim")).unwrap();
            let k = number("k");
            for (centres, queries, radii, inside) in [
                (real, generated, "radii_real", "generated_inside"),
                (generated, real, "radii_generated", "real_inside"),
            ] {
                let support = Support::new(centres, k).unwrap();
                assert_close(radii, &support.radii(), &case.expected(radii), (1e-6, 1e-7));
                let got: Vec<f64> = support.contains(&queries).unwrap().into_iter().map(f64::from).collect();
                assert_eq!(got, case.expected(inside));
            }
            let want = case.json("expected.json");
            let got = precision_recall(&real, &generated, k).unwrap();
            assert_eq!(got.precision, want["precision"].as_f64().unwrap());
            assert_eq!(got.recall, want["recall"].as_f64().unwrap());
        }
    }

    #[test]
    fn boundary_is_inside_and_duplicates_have_no_extent() {
        let real = Features::new("real", &[0.0, 1.0, 3.0], 1).unwrap();
        let support = Support::new(real, 1).unwrap();
        assert_eq!(support.radii(), [1.0, 1.0, 2.0]);
        let queries = Features::new("generated", &[-1.0, -1.01, 5.0, 5.01], 1).unwrap();
        assert_eq!(support.contains(&queries).unwrap(), [true, false, true, false]);
        let twins = Features::new("twins", &[2.0, 2.0], 1).unwrap();
        let support = Support::new(twins, 1).unwrap();
        assert_eq!(support.contains(&real).unwrap(), [false; 3]);
        assert_eq!(support.contains(&twins).unwrap(), [true; 2]);
    }

    #[test]
    fn misuse_is_refused() {
        let a = Features::new("real", &[0.0, 1.0, 3.0], 1).unwrap();
        let b = Features::new("generated", &[0.0; 6], 2).unwrap();
        for k in [0, 3] {
            let e = precision_recall(&a, &a, k).unwrap_err();
            assert!(e.to_string().contains("must be 1 to 2"), "{e}");
        }
        assert!(precision_recall(&a, &b, 1).unwrap_err().to_string().contains("generated: width differs from real"));
    }
}
