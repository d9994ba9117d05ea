//! Ours and a peer in turns: the same inputs, weights and threads, outputs compared before times are.
//!
//! Each pair runs both once, and the order changes from pair to pair, so that a machine that grows slower or faster
//! favours neither. What is shorter than [`turns::LEAST_MS`] is called in a loop on either side until it is not.

pub mod models;
pub mod ops;
pub mod peer;
pub mod rows;
pub mod turns;

use crate::models::ModelCase;
use graft_engine::backend::cpu;
use graft_engine::error::{Error, Result};
use peer::{Program, could_not_run};
use serde_json::{Value, json};
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

impl Settings {
    /// Settings of a program, and that many threads for ours; rows go to the folder of this processor where no other is
    /// named.
    ///
    /// # Errors
    /// No pairs or no threads.
    pub fn new(rows: Option<&Path>, pairs: usize, threads: usize, dry_run: bool) -> Result<Settings> {
        if pairs == 0 || threads == 0 {
            return Err(Error::usage("--pairs, --threads", "nothing to run").must("at least 1"));
        }
        cpu::set_threads(threads)?;
        let root = root().to_path_buf();
        let rows = rows.map_or_else(|| rows::folder(&root), Path::to_path_buf);
        Ok(Settings { root, rows, pairs, threads, dry_run })
    }
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

/// File of the rows of operators.
pub const OPS: &str = "ops.jsonl";
/// File of the rows of models.
pub const MODELS: &str = "models.jsonl";

/// Hears every line that a person should read.
pub type Say<'s> = dyn FnMut(String) + 's;

/// Measures operators against each peer and keeps the rows. A peer that cannot run has a row that says why. Returns the
/// number of measurements that gave no row.
///
/// # Errors
/// No case fits, or a row cannot be written.
pub fn run_ops(settings: &Settings, choice: &ops::Choice, peers: &[Program], say: &mut Say<'_>) -> Result<usize> {
    let mut failed = 0;
    for program in peers {
        let measured = ops::measure(settings, choice, program, &mut |outcome| match outcome {
            Ok(row) => keep(settings, OPS, &row, say),
            Err((case, e)) => {
                failed += 1;
                say(format!("{case:<40} NO ROW: {e}"));
                Ok(())
            }
        });
        match measured {
            Ok(without) => {
                without
                    .iter()
                    .for_each(|(what, why)| say(format!("{what:<40} {} has no counterpart: {why}", program.name)));
            }
            Err(e) if e.kind() == graft_engine::error::Kind::Usage => return Err(e),
            Err(e) => {
                let row = rows::merged(could_not_run(program, &e), json!({ "op": "all" }));
                keep(settings, OPS, &rows::merged(row, rows::origin(&settings.root, settings.threads)), say)?;
            }
        }
    }
    Ok(failed)
}

/// Measures models against PyTorch and keeps the rows. Returns the number of measurements that gave no row.
///
/// # Errors
/// A row cannot be written.
pub fn run_models(
    settings: &Settings,
    cases: &[ModelCase],
    dtypes: &[String],
    ways: &[String],
    python: &Path,
    say: &mut Say<'_>,
) -> Result<usize> {
    let mut failed = 0;
    for case in cases {
        for (dtype, way) in dtypes.iter().flat_map(|dtype| ways.iter().map(move |way| (dtype, way))) {
            match models::measure(settings, *case, dtype, way, python) {
                Ok(row) => keep(settings, MODELS, &row, say)?,
                Err(e) => {
                    failed += 1;
                    say(format!("{:<40} {dtype} {way} NO ROW: {e}", case.name));
                }
            }
        }
    }
    Ok(failed)
}

fn keep(settings: &Settings, file: &str, row: &Value, say: &mut Say<'_>) -> Result<()> {
    say(rows::line(row));
    if settings.dry_run { Ok(()) } else { rows::put(&settings.rows.join(file), row) }
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
