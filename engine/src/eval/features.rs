//! A validated set of feature vectors.

use crate::error::{Error, Result};

/// `n` feature vectors of one width D, row-major [n, D]; at least two, all values finite.
#[derive(Clone, Copy, Debug)]
pub struct Features<'a> {
    name: &'a str,
    data: &'a [f32],
    dim: usize,
}

impl<'a> Features<'a> {
    /// Checks `data` as rows of `dim` numbers; `name` says in errors which set it is.
    ///
    /// # Errors
    /// A failure when there are fewer than two rows, the length is no multiple of `dim`, or a value is not finite.
    pub fn new(name: &'a str, data: &'a [f32], dim: usize) -> Result<Self> {
        if dim == 0 || !data.len().is_multiple_of(dim) {
            return Err(Error::failure(name, "values do not form rows")
                .is(format!("{} values", data.len()))
                .must(format!("a multiple of the width {dim}, which must not be 0")));
        }
        if data.len() / dim < 2 {
            return Err(Error::failure(name, "too few rows").is(data.len() / dim).must("at least 2"));
        }
        if let Some(i) = data.iter().position(|x| !x.is_finite()) {
            return Err(Error::failure(name, "value is not finite")
                .is(format!("{} in row {}, column {}", data[i], i / dim, i % dim))
                .must("finite")
                .fix("check the images and the precision of the feature network"));
        }
        Ok(Features { name, data, dim })
    }

    /// Name of the set in errors.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Number of rows n, at least 2.
    pub fn len(&self) -> usize {
        self.data.len() / self.dim
    }

    /// Never true; present because a length is.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Width D, at least 1.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// All values, row-major.
    pub fn data(&self) -> &'a [f32] {
        self.data
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.dim..(i + 1) * self.dim]
    }

    /// Rows in order.
    pub fn rows(&self) -> impl Iterator<Item = &'a [f32]> {
        self.data.chunks_exact(self.dim)
    }

    /// Error unless both sets have one width.
    pub(crate) fn check_same_dim(&self, other: &Features) -> Result<()> {
        if self.dim == other.dim {
            return Ok(());
        }
        Err(Error::failure(other.name, format!("width differs from {}", self.name)).is(other.dim).must(self.dim))
    }
}

/// Lanes of the sums below: wide enough for the processor, fixed so that results never depend on it.
const LANES: usize = 8;

/// Σ f(a_i, b_i) in f64, over two rows of one length, in a fixed order.
fn sum_pairs(a: &[f32], b: &[f32], f: impl Fn(f64, f64) -> f64) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (heads_a, tail_a) = a.as_chunks::<LANES>();
    let (heads_b, tail_b) = b.as_chunks::<LANES>();
    for (a, b) in heads_a.iter().zip(heads_b) {
        for i in 0..LANES {
            lanes[i] += f(f64::from(a[i]), f64::from(b[i]));
        }
    }
    let tail: f64 = tail_a.iter().zip(tail_b).map(|(&a, &b)| f(f64::from(a), f64::from(b))).sum();
    lanes.iter().sum::<f64>() + tail
}

/// Squared Euclidean distance of two rows.
pub(crate) fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    sum_pairs(a, b, |a, b| (a - b) * (a - b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_sums() {
        let data: Vec<f32> = (0..22).map(|i| i as f32).collect();
        let f = Features::new("set", &data, 11).unwrap();
        assert_eq!((f.len(), f.dim(), f.row(1)[0], f.rows().count()), (2, 11, 11.0, 2));
        assert_eq!(squared_distance(f.row(0), f.row(1)), 11.0 * 121.0);
    }

    #[test]
    fn bad_sets_are_explained() {
        let message = |data: &[f32], dim| Features::new("real", data, dim).unwrap_err().to_string();
        assert!(message(&[1.0; 5], 2).contains("real: values do not form rows; is 5 values"));
        assert!(message(&[1.0; 5], 0).contains("must not be 0"));
        assert!(message(&[1.0; 3], 3).contains("is 1; must be at least 2"));
        assert!(message(&[], 3).contains("is 0"));
        assert!(message(&[1.0, 2.0, 3.0, f32::NAN], 2).contains("NaN in row 1, column 1"));
    }
}
