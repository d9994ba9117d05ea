//! Family `vae`: both halves of a KL autoencoder, at once and in strips, and the small decoder.

use super::case::Case;
use super::checks::Checks;
use crate::error::Result;
use crate::io::files;
use crate::models::vae::{self, Given, Tiny, Vae};
use serde_json::Value;
use std::path::PathBuf;

/// Decodes, and encodes where the case has a picture.
pub fn run(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    let device = case.device.clone();
    let latent = case.input_f32(&device, "latent")?;
    let precision = checks.precision("decoded");
    let path = weights(case)?;
    if vae::is_tiny(&path)? {
        return checks.tensor("decoded", &Tiny::load(&path, &device)?.decode(&latent, precision)?);
    }
    // A single file does not tell the groups.
    let groups = case.config.get("norm_num_groups").and_then(Value::as_u64).map(|g| g as usize);
    let mut vae = vae::load(&path, &device, Given { groups, scaling: None })?;
    both(case, checks, &vae)?;
    checks.label("strips");
    vae.set_strip(1);
    both(case, checks, &vae)
}

/// The folder of the model, or the one file in it that stands without a configuration.
fn weights(case: &Case) -> Result<PathBuf> {
    let files = files::list(&case.model())?;
    Ok(match files.as_slice() {
        [only] => only.clone(),
        _ => case.model(),
    })
}

fn both(case: &Case, checks: &mut Checks<'_>, vae: &Vae) -> Result<()> {
    let device = vae.device();
    let latent = case.input_f32(&device, "latent")?;
    checks.tensor("decoded", &vae.decode(&latent, checks.precision("decoded"), &mut |_, _| {})?)?;
    if case.has_input("image") {
        let (mean, logvar) = vae.encode(&case.input_f32(&device, "image")?, checks.precision("mean"))?;
        checks.tensor("mean", &mean)?;
        checks.tensor("logvar", &logvar)?;
    }
    Ok(())
}
