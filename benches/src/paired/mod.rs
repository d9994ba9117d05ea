//! Ours and a peer in turns: the same inputs, weights and threads, outputs compared before times are.
//!
//! Each pair runs both once, and the order changes from pair to pair, so that a machine that grows slower or faster
//! favours neither. What is shorter than [`turns::LEAST_MS`] is called in a loop on either side until it is not.

pub mod models;
pub mod ops;
pub mod peer;
pub mod rows;
pub mod turns;

use graft_engine::error::{Error, Result};
use std::path::{Path, PathBuf};

/// What every measurement is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Root of the repository.
    pub root: PathBuf,
    /// Folder of the rows.
    pub rows: PathBuf,
    /// Pairs of runs.
    pub pairs: usize,
    /// Threads of both sides.
    pub threads: usize,
    /// Print rows but write no file, and measure on a busy machine too.
    pub dry_run: bool,
}

/// Largest relative RMS difference of outputs, by arithmetic. Two frameworks sum in different orders; in bf16 the
/// peer also rounds every activation.
const AGREEMENT: [(&str, f64); 2] = [("f32", 1e-4), ("bf16", 5e-2)];

/// Refuses outputs that differ.
///
/// # Errors
/// A difference beyond the bound of the arithmetic; NaN is one.
pub fn agree(what: &str, dtype: &str, difference: f64) -> Result<()> {
    let bound = AGREEMENT.iter().find(|(name, _)| *name == dtype).map_or(0.0, |(_, bound)| *bound);
    if difference <= bound {
        return Ok(());
    }
    Err(Error::failure(format!("{what} {dtype}"), "outputs disagree; no time is reported")
        .is(format!("relative difference {difference:.2e}"))
        .must(format!("at most {bound:.0e}")))
}

/// Relative RMS difference of two outputs; absolute where the second is zero, NaN where their lengths differ.
pub fn difference(ours: &[f32], theirs: &[f32]) -> f64 {
    if ours.len() != theirs.len() {
        return f64::NAN;
    }
    let (mut error, mut total) = (0.0, 0.0);
    for (&a, &b) in ours.iter().zip(theirs) {
        error += (f64::from(a) - f64::from(b)).powi(2);
        total += f64::from(b).powi(2);
    }
    if total > 0.0 { (error / total).sqrt() } else { error.sqrt() }
}

/// The repository that this program was built in.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_relative_and_nan_disagrees() {
        assert_eq!(difference(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(difference(&[0.0, 6.0], &[0.0, 4.0]), 0.5);
        assert!(difference(&[1.0], &[1.0, 2.0]).is_nan());
        assert!(agree("x", "f32", f64::NAN).is_err() && agree("x", "f32", 2e-4).is_err());
        assert!(agree("x", "f32", 1e-5).is_ok() && agree("x", "bf16", 1e-2).is_ok());
    }
}
