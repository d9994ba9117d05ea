//! The models that ship with the repository.

use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// Where the text-to-image model lies in the repository.
const TEXT_TO_IMAGE: &str = "assets/emoji-pixart/model";

/// The shipped text-to-image model: below the working directory or one above it, or above the program.
///
/// # Errors
/// When the repository is not there.
pub fn text_to_image() -> Result<PathBuf> {
    let program = std::env::current_exe().ok();
    let here = std::env::current_dir().ok();
    let starts = [here.as_deref(), program.as_deref()];
    let found = starts.into_iter().flatten().flat_map(Path::ancestors).map(|root| root.join(TEXT_TO_IMAGE));
    found.into_iter().find(|path| path.join("model_index.json").is_file()).ok_or_else(|| {
        Error::usage("--model", "not given, and the shipped model is not here")
            .is(format!("no {TEXT_TO_IMAGE} above the working directory or the program"))
            .must("a model folder")
            .fix("give one, or run this inside the repository")
    })
}
