//! `graft classifier train --data DIR --output DIR`: makes the network that `graft eval` looks through.

use super::{Dtype, out, progress};
use crate::backend::Device;
use crate::error::Result;
use crate::eval::classifier::{self, Classifier, Settings};
use crate::io::datasets::{self, ImageSet, Split};
use crate::train::batches;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Train it on a folder of Fashion-MNIST and state its accuracy on the test images.
    Train(TrainArgs),
}

#[derive(clap::Args)]
struct TrainArgs {
    /// Folder with the four idx files.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Folder that `model.safetensors` is written to.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Passes over the training images.
    #[arg(long, default_value_t = Settings::default().epochs)]
    epochs: u64,
    /// Seed of weights, order and shifts.
    #[arg(long, default_value_t = Settings::default().seed)]
    seed: u64,
    /// Peak learning rate.
    #[arg(long, default_value_t = Settings::default().lr)]
    lr: f64,
    /// Arithmetic of products.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    dtype: Dtype,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Train(args) => train(args),
    }
}

fn train(args: &TrainArgs) -> Result<()> {
    let (data, test) =
        (datasets::fashion_mnist(&args.data, Split::Train)?, datasets::fashion_mnist(&args.data, Split::Test)?);
    crate::io::atomic::ensure_writable_dir(&args.output)?;
    let settings = Settings {
        epochs: args.epochs,
        seed: args.seed,
        lr: args.lr,
        precision: args.dtype.into(),
        ..Settings::default()
    };
    let device = Device::cpu();
    let bar = progress::bar(0, "classifier");
    let mut smoothed = None;
    let trained = classifier::train(&data, &device, settings, &mut |p| {
        let loss = smoothed.map_or(p.loss, |s: f64| 0.98 * s + 0.02 * p.loss);
        smoothed = Some(loss);
        bar.set_length(p.steps);
        bar.set_position(p.step);
        bar.set_message(format!("loss {loss:.4}"));
        ControlFlow::Continue(())
    })?;
    bar.finish();
    let metadata = BTreeMap::from([(
        "graft.classifier".to_string(),
        format!(
            "{} training images, {} epochs, seed {}, lr {}, {:?} products",
            data.n, args.epochs, args.seed, args.lr, args.dtype
        ),
    )]);
    trained.save(&args.output, &metadata)?;
    let accuracy = accuracy(&args.output, &test, &device)?;
    let folder = args.output.display();
    out::line(format_args!("{:.2} % of {} test images; classifier in {folder}", 100.0 * accuracy, test.n))
}

/// Accuracy of what was written, not of what was trained: the file is rounded.
fn accuracy(folder: &Path, test: &ImageSet, device: &Device) -> Result<f64> {
    let all: Vec<u32> = (0..test.n as u32).collect();
    let batch = batches::images(device, test, &all)?;
    Classifier::load(folder, device)?.read(&batch.images)?.agreement(&batch.labels)
}
