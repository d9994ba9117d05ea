//! `graft op replay`: recorded launches of the probes on a device, bit by bit.

use crate::backend::Device;
use crate::backend::replay::{Recorded, replay};
use crate::cli::out;
use crate::error::{Error, Result};
use crate::io::files;
use std::path::Path;

/// Every recording in a folder.
pub fn run(device: &Device, folder: &Path) -> Result<()> {
    let mut cases: Vec<_> = files::list(folder)?;
    cases.retain(|path| path.extension().is_some_and(|e| e == "case"));
    cases.sort();
    if cases.is_empty() {
        return Err(Error::failure(folder.display().to_string(), "no recorded case").must("at least one .case file"));
    }
    let mut failed = 0;
    for path in &cases {
        let name = path.file_stem().and_then(|n| n.to_str()).unwrap_or_default();
        let (text, input) = (files::read_text(path)?, files::read_packed(&path.with_extension("in"))?);
        let output = files::read_packed(&path.with_extension("out"))?;
        match replay(device, &Recorded { name, text: &text, input: &input, output: &output }) {
            Ok(()) => out::line(format!("{name:<40} ok"))?,
            Err(e) => {
                failed += 1;
                out::line(format!("{name:<40} FAIL {e}"))?;
            }
        }
    }
    out::line(format!("{} cases, {failed} failed", cases.len()))?;
    if failed == 0 { Ok(()) } else { Err(Error::failure("op replay", format!("{failed} cases failed"))) }
}
