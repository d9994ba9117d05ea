//! `graft eval --loss`: how well a model predicts noise on images it was not trained on.

use super::Args;
use super::real::Real;
use crate::cli::{out, progress};
use crate::error::Result;
use crate::eval::loss::{LossSettings, denoising_loss};
use crate::models::dit;
use crate::report::format::significant;
use crate::tensor::Device;
use serde_json::json;

/// Runs the command.
pub fn run(args: &Args, as_json: bool) -> Result<()> {
    let data = Real::parse(&args.reference)?.test_images()?;
    let model = dit::load(&args.model, &Device::cpu())?;
    let n = args.n.unwrap_or(LossSettings::default().n.min(data.n));
    let settings =
        LossSettings { n, repeats: args.repeats, seed: args.seed, batch: args.batch, precision: args.dtype.into() };
    let bar = progress::bar((n * args.repeats) as u64, "loss");
    let found = denoising_loss(&model, &data, settings, &mut |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    if as_json {
        return out::line(format_args!(
            "{:#}",
            json!({
                "model": args.model.display().to_string(),
                "reference": args.reference,
                "seed": args.seed,
                "loss": found,
            })
        ));
    }
    let quarters = found.quartiles.map(|q| format!("{q:.5}")).join("  ");
    out::line(format_args!(
        "denoising loss {:.5} ± {}\nby quarter of the timesteps, cleanest first: {quarters}\n{} test images, {} noise{} each, seed {}",
        found.mean,
        significant(found.standard_error),
        found.n,
        found.repeats,
        if found.repeats == 1 { "" } else { "s" },
        args.seed,
    ))
}
