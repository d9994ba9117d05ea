//! Shapes of up to six dims, held by value so that making one never allocates.

use crate::error::{Error, Result};
use std::fmt;

const MAX_RANK: usize = 6;

/// Dims of a tensor, outermost first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    rank: u8,
    dims: [usize; MAX_RANK],
}

impl Shape {
    /// A shape from its dims.
    ///
    /// # Errors
    /// More than six dims, or a product that overflows.
    pub fn new(dims: &[usize]) -> Result<Shape> {
        let product = dims.iter().try_fold(4usize, |p, &d| p.checked_mul(d));
        if dims.len() > MAX_RANK || product.is_none_or(|p| p > isize::MAX as usize) {
            return Err(Error::failure("shape", "too large")
                .is(format!("{dims:?}"))
                .must(format!("at most {MAX_RANK} dims and {} bytes", isize::MAX)));
        }
        let mut held = [1; MAX_RANK];
        held[..dims.len()].copy_from_slice(dims);
        Ok(Shape { rank: dims.len() as u8, dims: held })
    }

    /// The dims.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..usize::from(self.rank)]
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims().iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
