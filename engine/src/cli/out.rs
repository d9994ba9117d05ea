//! Standard output that never panics: a closed pipe ends quietly, a full disk is an error.

use crate::error::{Error, Result};
use std::io::{ErrorKind, Write};

/// Writes bytes to standard output.
///
/// # Errors
/// When they cannot be written; a reader that went away is not an error.
pub fn bytes(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(Error::failure("standard output", format!("cannot write: {e}")).fix("redirect it to a disk with space"))
        }
        _ => Ok(()),
    }
}

/// Writes text and a line break to standard output.
///
/// # Errors
/// As [`bytes`].
pub fn line(text: impl std::fmt::Display) -> Result<()> {
    bytes(format!("{text}\n").as_bytes())
}
