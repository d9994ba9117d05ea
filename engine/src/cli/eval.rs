//! `graft eval DIR`: scores samples of a model against real images, beside the scores of other real images.

use super::{Dtype, out, progress};
use crate::error::{Error, Result};
use crate::eval::classifier::Classifier;
use crate::eval::score::{Baseline, Reference, Score};
use crate::io::datasets::{self, Split};
use crate::models::dit::{self, Dit};
use crate::report::format::{percent, significant};
use crate::sample::pipeline::{Request, generate};
use crate::sample::solver::Sampler;
use crate::tensor::Device;
use std::path::PathBuf;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Model folder or checkpoint of grey images of 28 x 28.
    model: PathBuf,
    /// Fashion-MNIST: its training images are the reference, its test images the real ones that samples are held to.
    #[arg(long = "ref", value_name = "DIR", default_value = "assets/fashion-mnist")]
    reference: PathBuf,
    /// Network in whose feature space images are compared.
    #[arg(long, value_name = "DIR", default_value = "assets/fashion-classifier")]
    classifier: PathBuf,
    /// Samples, and real images in each of the five splits.
    #[arg(long, default_value_t = 500)]
    n: usize,
    /// Sampler: ddim, ddpm or dpm++.
    #[arg(long, default_value = "ddim")]
    sampler: String,
    /// Model evaluations per sample.
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Scale of classifier-free guidance; 1 is none.
    #[arg(long, default_value_t = 1.5)]
    guidance_scale: f64,
    /// Seed of the first sample, and of the splits.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Samples computed together.
    #[arg(long, default_value_t = 50)]
    batch: usize,
    /// Arithmetic of products.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
}

/// Runs the command.
pub fn run(args: &Args, as_json: bool) -> Result<()> {
    let sampler: Sampler = args.sampler.parse()?;
    let device = Device::cpu();
    let model = dit::load(&args.model, &device)?;
    let classifier = Classifier::load(&args.classifier, &device)?;
    check(&model, &classifier)?;
    let reference = Reference::new(&classifier, &datasets::fashion_mnist(&args.reference, Split::Train)?, args.seed)?;
    let held_out = datasets::fashion_mnist(&args.reference, Split::Test)?;
    // Before the samples: it finds out quickly whether there are enough images.
    let real = reference.baseline(&classifier, &held_out, args.n)?;
    let bar = progress::bar((args.n * args.steps) as u64, "eval");
    let samples = reference.score_samples(&classifier, args.n, args.seed, &mut |labels, seed| {
        let request = Request {
            sampler,
            steps: args.steps,
            guidance: args.guidance_scale,
            batch: args.batch,
            precision: args.dtype.into(),
            ..Request::new(labels.to_vec(), seed)
        };
        generate(&model, &request, &mut |p| bar.set_position((p.images * args.steps + p.step * p.batch) as u64))
    })?;
    bar.finish_and_clear();
    if !as_json {
        return out::line(text(&samples, &real));
    }
    out::line(format_args!(
        "{:#}",
        serde_json::json!({
            "model": args.model.display().to_string(),
            "sampler": args.sampler,
            "steps": args.steps,
            "guidance_scale": args.guidance_scale,
            "seed": args.seed,
            "samples": samples,
            "real": real,
        })
    ))
}

fn check(model: &Dit, classifier: &Classifier) -> Result<()> {
    let c = &model.config;
    if (c.in_channels, c.input_size, c.classes) != (1, 28, classifier.classes()) {
        return Err(Error::usage("model", "does not make the images that the classifier reads")
            .is(format!("{} channels of {2} x {2} in {} classes", c.in_channels, c.classes, c.input_size))
            .must(format!("1 channel of 28 x 28 in {} classes", classifier.classes())));
    }
    Ok(())
}

/// The scores as a table.
fn text(samples: &Score, real: &Baseline) -> String {
    let row = |name: &str, s: &Score| {
        let fractions = [s.precision, s.recall, s.agreement].map(percent);
        let [precision, recall, agreement] = fractions;
        format!(
            "{name:<14}{:>10}{:>10}{precision:>12}{recall:>10}{agreement:>13}",
            significant(s.frechet),
            significant(s.kid)
        )
    };
    let head =
        format!("{:<14}{:>10}{:>10}{:>12}{:>10}{:>13}", "", "Fréchet", "kernel", "precision", "recall", "right class");
    let shared = if real.disjoint { "disjoint" } else { "overlapping" };
    format!(
        "{head}\n{}\n{}\n{}\n{} samples; real images: mean and spread over {} {shared} splits of as many",
        row("samples", samples),
        row("real images", &real.mean),
        row("  spread ±", &real.sd),
        samples.n,
        real.splits,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_row_for_each() {
        let score = Score { n: 500, frechet: 5.314, kid: -0.001_23, precision: 0.9, recall: 0.75, agreement: 0.8844 };
        let real = Baseline { mean: Score { frechet: 1.9, ..score }, sd: score, splits: 5, disjoint: false };
        let text = text(&score, &real);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[1], "samples             5.31  -0.00123      90.0 %    75.0 %       88.4 %");
        assert_eq!(lines[0].chars().count(), lines[1].chars().count());
        assert!(lines[2].contains("1.90") && lines[4].contains("overlapping"));
    }
}
