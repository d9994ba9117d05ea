//! The one error type of the engine.
//!
//! Every message answers five questions in one line: where (a file, tensor, operator or flag), what is wrong,
//! what it is, what it must be, and how to fix it. `Kind` decides the exit code: 2 for wrong usage, 1 for the rest.

use std::fmt;

/// Result of everything in the engine that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// Class of an error; decides the exit code of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The command line or a configuration asks for something that cannot be: exit code 2.
    Usage,
    /// A file, model, device or computation failed: exit code 1.
    Failure,
}

/// A complete, single-line explanation of a failure.
///
/// Build it from its two required parts and add what is known:
/// ```
/// use graft_engine::error::Error;
/// let e = Error::failure("model.safetensors", "data truncated")
///     .is("96 bytes").must("100 bytes").fix("download the file again");
/// assert_eq!(e.to_string(), "model.safetensors: data truncated; is 96 bytes; must be 100 bytes; fix: download the file again");
/// ```
#[derive(Clone, Debug)]
pub struct Error(Box<Parts>);

#[derive(Clone, Debug)]
struct Parts {
    kind: Kind,
    place: String,
    problem: String,
    is: Option<String>,
    must: Option<String>,
    fix: Option<String>,
}

impl Error {
    fn new(kind: Kind, place: impl Into<String>, problem: impl Into<String>) -> Self {
        Error(Box::new(Parts { kind, place: place.into(), problem: problem.into(), is: None, must: None, fix: None }))
    }

    /// An error of the command line or a configuration: `place` is the flag or field.
    pub fn usage(place: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::new(Kind::Usage, place, problem)
    }

    /// Any other error: `place` is the file, tensor, operator or device.
    pub fn failure(place: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::new(Kind::Failure, place, problem)
    }

    /// An operating-system error on a path.
    pub fn io(path: &std::path::Path, action: &str, source: &std::io::Error) -> Self {
        let fix = match source.kind() {
            std::io::ErrorKind::NotFound => "check the path",
            std::io::ErrorKind::PermissionDenied => "choose a place you may access, or change its permissions",
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::FileTooLarge => {
                "free disk space or choose another disk; nothing was overwritten"
            }
            _ => "check the disk and the path",
        };
        Self::failure(path.display().to_string(), format!("cannot {action}: {source}")).fix(fix)
    }

    /// What was found.
    pub fn is(mut self, is: impl fmt::Display) -> Self {
        self.0.is = Some(is.to_string());
        self
    }

    /// What was needed.
    pub fn must(mut self, must: impl fmt::Display) -> Self {
        self.0.must = Some(must.to_string());
        self
    }

    /// What to do about it.
    pub fn fix(mut self, fix: impl fmt::Display) -> Self {
        self.0.fix = Some(fix.to_string());
        self
    }

    /// Prefixes the place with an outer one: `context("run/plan.toml")` turns `lr: …` into `run/plan.toml: lr: …`.
    pub fn context(mut self, outer: impl fmt::Display) -> Self {
        self.0.place = format!("{outer}: {}", self.0.place);
        self
    }

    /// Class of the error.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// Short description of the problem, without place, values and fix.
    pub fn problem(&self) -> &str {
        &self.0.problem
    }

    /// Exit code of the program when this error ends it.
    pub fn exit_code(&self) -> u8 {
        match self.0.kind {
            Kind::Usage => 2,
            Kind::Failure => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parts { place, problem, is, must, fix, .. } = &*self.0;
        write!(f, "{place}: {problem}")?;
        for (label, part) in [("is", is), ("must be", must), ("fix:", fix)] {
            if let Some(part) = part {
                write!(f, "; {label} {part}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
