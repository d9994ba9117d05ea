//! Recorded cases with known results: runs every one found below a folder and compares.
//!
//! A case is a folder with a `case.json`. Its `family` picks one of [`FAMILIES`], each a file here; [`case`] reads the
//! folder, [`checks`] holds results against expectations. A family, operator or expected tensor that nobody computes is
//! a failure. A case is skipped, and said to be, only where it needs a network that is no part of the repository. A new
//! family is one file and one line.

mod case;
mod checks;
mod dit;
mod lora;
mod metrics;
mod operators;
mod pixart;
mod refusals;
mod samplers;
mod t5;
mod vae;

pub use checks::{Row, Verdict};

use crate::autograd::Precision;
use crate::error::{Error, Result};
use crate::io::files;
use crate::tensor::Device;
use case::Case;
use checks::Checks;
use std::path::{Path, PathBuf};

type Family = fn(&Case, &mut Checks<'_>) -> Result<()>;

/// Every family that can be computed.
const FAMILIES: &[(&str, Family)] = &[
    ("dit_original", dit::original),
    ("dit_diffusers", dit::diffusers),
    ("pixart_original", pixart::original),
    ("pixart_diffusers", pixart::diffusers),
    ("lora", lora::run),
    ("t5", t5::run),
    ("vae", vae::run),
    ("samplers", samplers::run),
    ("operators", operators::run),
    ("metrics", metrics::run),
    ("safetensors_bad", refusals::run),
];

/// Results of one case.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Folder of the case.
    pub folder: PathBuf,
    /// `family/case`.
    pub name: String,
    /// One row per comparison, at least one.
    pub rows: Vec<Row>,
}

impl Outcome {
    /// Whether every comparison passed.
    pub fn passed(&self) -> bool {
        !self.rows.is_empty() && self.rows.iter().all(|row| row.verdict == Verdict::Pass)
    }

    /// What is missing here, where the case was not computed because of it.
    pub fn skipped(&self) -> Option<&str> {
        match self.rows.as_slice() {
            [Row { verdict: Verdict::Skip(why), .. }] => Some(why),
            _ => None,
        }
    }

    /// Whether some comparison failed: neither passed nor skipped.
    pub fn failed(&self) -> bool {
        !self.passed() && self.skipped().is_none()
    }
}

/// Runs every case below `folders` on the CPU, in order of their paths; `report` sees each as it is done.
///
/// # Errors
/// As [`run_on`].
pub fn run(folders: &[PathBuf], precision: Precision, report: &mut dyn FnMut(&Outcome)) -> Result<Vec<Outcome>> {
    run_on(&Device::cpu(), folders, precision, report)
}

/// As [`run`], with the models of transformers, text encoders and autoencoders on `device`; what has no model, and
/// single operators, stay on the CPU.
///
/// With [`Precision::Bf16`], results that have a bf16 tolerance are computed with bf16 products, the rest in f32.
///
/// # Errors
/// A folder that is missing or unreadable, or no case at all. A case that cannot be read or computed is a failed
/// outcome, not an error.
pub fn run_on(
    device: &Device,
    folders: &[PathBuf],
    precision: Precision,
    report: &mut dyn FnMut(&Outcome),
) -> Result<Vec<Outcome>> {
    let mut found = Vec::new();
    for folder in folders {
        if !folder.is_dir() {
            return Err(
                Error::failure(folder.display().to_string(), "no such folder").must("a folder with recorded cases")
            );
        }
        find(folder, 0, &mut found)?;
    }
    if found.is_empty() {
        let places: Vec<String> = folders.iter().map(|f| f.display().to_string()).collect();
        return Err(Error::failure(places.join(", "), "no recorded case")
            .is("no case.json at any depth")
            .must("at least one case: a check of nothing proves nothing"));
    }
    Ok(found
        .iter()
        .map(|folder| {
            let outcome = run_case(device, folder, precision);
            report(&outcome);
            outcome
        })
        .collect())
}

/// Deepest nesting that is searched, so that a link to a parent folder ends.
const DEEPEST: usize = 12;

fn find(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    if folder.join("case.json").is_file() {
        found.push(folder.to_path_buf());
        return Ok(());
    }
    if depth == DEEPEST {
        return Ok(());
    }
    for entry in files::list(folder)? {
        if entry.is_dir() {
            find(&entry, depth + 1, found)?;
        }
    }
    Ok(())
}

fn run_case(device: &Device, folder: &Path, precision: Precision) -> Outcome {
    let failed = |name: String, what: &str, error: &Error| Outcome {
        folder: folder.to_path_buf(),
        rows: vec![Row::failure(what, error.to_string())],
        name,
    };
    let case = match Case::open(folder, device) {
        Ok(case) => case,
        Err(e) => return failed(folder.display().to_string(), "case.json", &e),
    };
    let name = format!("{}/{}", case.family, case.name);
    let Some((_, family)) = FAMILIES.iter().find(|(family, _)| *family == case.family) else {
        let known: Vec<&str> = FAMILIES.iter().map(|(name, _)| *name).collect();
        let unknown = Error::failure("family", "unknown family").is(&case.family).must(known.join(", "));
        return failed(name, "family", &unknown);
    };
    let mut checks = Checks::new(&case, precision);
    let result = family(&case, &mut checks);
    Outcome { folder: folder.to_path_buf(), name, rows: checks.finish(result) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::{golden, test_dir};

    fn outcomes(folder: PathBuf) -> Vec<Outcome> {
        run(&[folder], Precision::F32, &mut |_| {}).unwrap()
    }

    fn write_case(name: &str, json: &str) -> PathBuf {
        let dir = test_dir(name);
        std::fs::write(dir.join("case.json"), json).unwrap();
        dir
    }

    #[test]
    fn an_empty_set_and_a_missing_folder_are_errors() {
        let empty = test_dir("verify_empty");
        let run = |folder: PathBuf| run(&[folder], Precision::F32, &mut |_| {}).unwrap_err();
        assert!(run(empty.clone()).to_string().contains("no recorded case"));
        assert!(run(empty.join("none")).to_string().contains("no such folder"));
    }

    #[test]
    fn what_nobody_can_compute_fails() {
        for (name, json, word) in [
            ("verify_family", r#"{"family": "weather", "case": "a"}"#, "unknown family"),
            ("verify_operator", r#"{"family": "operators", "case": "telepathy_3"}"#, "unknown operator"),
            ("verify_sampler", r#"{"family": "samplers", "case": "euler_n3"}"#, "unknown sampler"),
            ("verify_json", "{", "not valid json"),
            ("verify_nothing", "{}", "family"),
        ] {
            let outcomes = outcomes(write_case(name, json));
            assert_eq!(outcomes.len(), 1);
            assert!(!outcomes[0].passed());
            assert!(format!("{:?}", outcomes[0].rows).contains(word), "{:?}", outcomes[0].rows);
        }
    }

    /// Each recorded case must fail once its expected values are another's: the comparison sees them.
    #[test]
    fn a_wrong_expectation_fails() {
        let dir = test_dir("verify_wrong");
        for (family, case) in [("dit_original", "head_dim_72_guided"), ("operators", "mha")] {
            let from = golden(&format!("{family}/{case}"));
            let to = dir.join(case);
            std::fs::create_dir_all(to.join("model")).unwrap();
            for file in ["case.json", "inputs.safetensors", "expected.safetensors"] {
                std::fs::copy(from.join(file), to.join(file)).unwrap();
            }
            for file in files::list(&from.join("model")).unwrap() {
                std::fs::copy(&file, to.join("model").join(file.file_name().unwrap())).unwrap();
            }
            assert!(outcomes(to.clone())[0].passed(), "{case}");
            let path = to.join("expected.safetensors");
            let mut bytes = std::fs::read(&path).unwrap();
            let at = bytes.len() - 4;
            bytes[at..].copy_from_slice(&1000f32.to_le_bytes());
            std::fs::write(&path, bytes).unwrap();
            let rows = &outcomes(to)[0].rows;
            assert!(rows.iter().any(|r| r.verdict != Verdict::Pass), "{case}: {rows:?}");
        }
    }
}
