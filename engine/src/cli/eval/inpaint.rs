//! `graft eval --inpaint`: holes in held-out images, filled by a model.

use super::Args;
use super::real::Real;
use crate::cli::{out, progress};
use crate::error::Result;
use crate::eval::classifier::Classifier;
use crate::eval::inpaint::inpainting;
use crate::models::dit;
use crate::report::format::percent;
use crate::tensor::Device;
use serde_json::json;

/// Images where nothing is said.
const DEFAULT: usize = 100;

/// Runs the command.
pub fn run(args: &Args, as_json: bool) -> Result<()> {
    let data = Real::parse(&args.reference)?.test_images()?;
    let device = Device::cpu();
    let model = dit::load(&args.model, &device)?;
    // The classifier knows one kind of images only; of others, the error alone is told.
    let fits = (data.channels, data.height, data.width) == (1, 28, 28);
    let classifier = fits.then(|| Classifier::load(&args.classifier, &device)).transpose()?;
    let request = args.request(args.seed)?;
    let n = args.n.unwrap_or(DEFAULT.min(data.n));
    let bar = progress::bar((n * args.steps) as u64, "inpaint");
    let found = inpainting(&model, &data, classifier.as_ref(), n, args.rounds, &request, &mut |p| {
        bar.set_position((p.images * args.steps + p.step * p.batch) as u64);
    })?;
    bar.finish_and_clear();
    if as_json {
        return out::line(format_args!(
            "{:#}",
            json!({
                "model": args.model.display().to_string(),
                "reference": args.reference,
                "sampler": args.sampler,
                "steps": args.steps,
                "guidance_scale": args.guidance_scale,
                "rounds": args.rounds,
                "seed": args.seed,
                "inpainting": found,
            })
        ));
    }
    let mut text = format!(
        "{n} test images, hole of {0} x {0} pixels in the middle\nerror in the hole {1:.1} of 255, {2:.2} dB; filled with the mean of its surroundings {3:.2} dB",
        found.hole, found.rmse, found.psnr, found.psnr_flat
    );
    if let (Some(filled), Some(whole)) = (found.agreement, found.agreement_real) {
        text += &format!("\nright class {}; whole images {}", percent(filled), percent(whole));
    }
    out::line(text)
}
