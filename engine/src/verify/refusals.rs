//! Family `safetensors_bad`: files and folders that must be accepted, or refused with a given kind of message.

use super::case::Case;
use super::checks::{Checks, unknown};
use super::dit;
use crate::error::Result;
use crate::io::safetensors::TensorFile;
use crate::models;
use crate::tensor::Device;
use serde_json::Value;
use std::path::Path;

/// Runs a case at the level of a file or of a model folder.
pub fn run(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    let refuse = match case.text("verdict") {
        Some("refuse") => true,
        Some("accept") => false,
        other => return Err(unknown("verdict", other.unwrap_or("missing"), &["accept", "refuse"])),
    };
    match case.text("level") {
        Some("container") => {
            let path = case.folder.join(case.text("file").unwrap_or("model/file.safetensors"));
            let read = || -> Result<()> {
                for view in TensorFile::open(&path)?.iter() {
                    // Every tensor of an accepted file must be readable, whichever way its type is read.
                    view.to_f32().or_else(|e| view.to_i64().map(|_| Vec::new()).map_err(|_| e))?;
                }
                Ok(())
            };
            if refuse {
                refused(case, checks, read)
            } else {
                checks.verdict("accepted", read().err().map(|e| e.to_string()))
            }
        }
        Some("model") => {
            let load = || models::dit::load(&case.model(), &Device::cpu());
            if refuse {
                refused(case, checks, || load().map(|_| ()));
            } else {
                let model = load()?;
                checks.verdict("accepted", None);
                if case.expected_names().next().is_some() {
                    dit::folder(case, checks, &model)?;
                }
            }
        }
        other => return Err(unknown("level", other.unwrap_or("missing"), &["container", "model"])),
    }
    Ok(())
}

/// `read` must fail, with the message that the case describes, and must not have run anything.
pub(super) fn refused(case: &Case, checks: &mut Checks<'_>, read: impl FnOnce() -> Result<()>) {
    let marker = case.text("marker_that_must_not_appear");
    let appeared = || {
        let places = [Path::new("."), &case.folder, &case.model()].map(Path::to_path_buf);
        marker.and_then(|name| places.iter().map(|p| p.join(name)).find(|p| p.exists()))
    };
    if let Some(old) = appeared() {
        return checks.verdict("refused", Some(format!("{} was there before: remove it", old.display())));
    }
    let Err(error) = read() else {
        return checks.verdict("refused", Some("was accepted".into()));
    };
    let message = error.to_string();
    let kind = case.text("message_kind").into_iter();
    let mentions = case.config.get("message_should_mention").and_then(Value::as_array);
    let words = kind.chain(mentions.into_iter().flatten().filter_map(Value::as_str));
    let missing: Vec<&str> = words.filter(|word| !message.contains(word)).collect();
    let problem = (!missing.is_empty()).then(|| format!("the message lacks {missing:?}: {message}"));
    checks
        .verdict("refused", problem.or_else(|| appeared().map(|p| format!("{} appeared: code was run", p.display()))));
}
