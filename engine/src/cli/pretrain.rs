//! `graft pretrain CONFIG --run DIR`.

use super::progress;
use crate::autograd::Precision;
use crate::backend::{self, Device};
use crate::error::{Error, Result};
use crate::io::datasets::Split;
use crate::models::dit::{self, Dit, DitConfig, SaveAs};
use crate::models::pixart::{self, PixArt};
use crate::models::t5::{self, T5, Tokenizer};
use crate::models::{component, pipeline};
use crate::sample::captions;
use crate::sample::solver::Prediction;
use crate::train::config::{PretrainConfig, TextConfig};
use crate::train::learner::Learner;
use crate::train::text::{Captioned, TextToImage};
use crate::train::trainer::{LoopSettings, Trainer};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// TOML file that describes data, model and optimiser.
    config: PathBuf,
    /// Run folder: checkpoint, loss log, and the model at the end.
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Stop after this many updates of this call; the run resumes from there.
    #[arg(long, value_name = "N")]
    stop_after: Option<u64>,
    /// What runs the operators: cpu, oracle, emu or cuda; a GPU computes in the configuration's dtype.
    #[arg(long, default_value = "cpu", value_name = "NAME")]
    backend: String,
    /// Only write the model of the last checkpoint (averaged weights) to `RUN/model`.
    #[arg(long)]
    export: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let config = PretrainConfig::read(&args.config)?;
    match &config.text {
        Some(text) => run_text(args, &config, text),
        None => run_labels(args, &config),
    }
}

fn run_labels(args: &Args, config: &PretrainConfig) -> Result<()> {
    let data = config.data.load(Split::Train)?;
    let device = open(args, config)?;
    let sizes = config.model_for(data.channels, data.height, data.class_names.len())?;
    let model = match &config.init {
        None => Dit::new(sizes, &device, config.train.seed)?,
        Some(folder) => start_from(folder, &sizes, &device)?,
    };
    let trainer = train(args, config, model, &data)?;
    let folder = args.run.join("model");
    let names = serde_json::to_string(&data.class_names).map_err(|e| Error::failure("class names", e.to_string()))?;
    let metadata = BTreeMap::from([step_of(&trainer), (super::model_args::CLASS_NAMES_KEY.to_string(), names)]);
    dit::save(&trainer.averaged()?, &folder, SaveAs::Bf16, &metadata)?;
    report(&trainer, &folder);
    Ok(())
}

fn open(args: &Args, config: &PretrainConfig) -> Result<Device> {
    backend::open_as(&args.backend, Precision::from(config.train.dtype).into())
}

/// A model that reads captions, with its text encoder and a tokenizer of the captions' words.
fn run_text(args: &Args, config: &PretrainConfig, text: &TextConfig) -> Result<()> {
    let data = config.data.load_captioned(Split::Train)?;
    let (device, folder) = (open(args, config)?, args.run.join("model"));
    let cleaned: Vec<String> = data.captions.iter().map(|caption| captions::clean(caption)).collect();
    let tokens = folder.join("tokenizer");
    t5::write_word_tokenizer(&tokens, cleaned.iter().map(String::as_str))?;
    let tokenizer = Tokenizer::open(&tokens)?;
    let encode = |caption: &str| tokenizer.encode_at_most(caption, text.max_tokens).ids;
    let data = Captioned {
        captions: cleaned.iter().map(|caption| encode(caption)).collect(),
        null: encode(""),
        images: data.images,
    };
    let picture = (data.images.channels, data.images.height);
    let (transformer, encoder) = config.text_models_for(text, picture, tokenizer.size())?;
    let model = match &config.init {
        None => TextToImage {
            transformer: PixArt::new(transformer, &device, config.train.seed)?,
            encoder: T5::new(encoder, &device, config.train.seed)?,
            prediction: text.prediction,
        },
        Some(init) => {
            let found = TextToImage {
                transformer: pixart::load(&component(init, "transformer"), &device, false)?,
                encoder: t5::load(&init.join("text_encoder"), &device, false, t5::Residence::Memory)?,
                prediction: text.prediction,
            };
            let same = found.transformer.config == transformer && found.encoder.config == encoder;
            same.then_some(found).ok_or_else(|| other_sizes(init))?
        }
    };
    let trainer = train(args, config, model, &data)?;
    let averaged = trainer.averaged()?;
    pixart::save(
        &averaged.transformer,
        &folder.join("transformer"),
        SaveAs::Bf16,
        &BTreeMap::from([step_of(&trainer)]),
    )?;
    t5::save(&averaged.encoder, &folder.join("text_encoder"), SaveAs::Bf16)?;
    pipeline::write_index(&folder, text.prediction == Prediction::Velocity)?;
    report(&trainer, &folder);
    Ok(())
}

/// Trains a model, or only opens its last checkpoint.
fn train<M: Learner>(args: &Args, config: &PretrainConfig, model: M, data: &M::Data) -> Result<Trainer<M>> {
    let t = &config.train;
    let settings = LoopSettings {
        steps: t.steps,
        batch: t.batch,
        seed: t.seed,
        label_dropout: t.label_dropout,
        precision: t.dtype.into(),
        checkpoint_every: t.checkpoint_every,
        activation_checkpointing: t.activation_checkpointing,
    };
    // The number of steps may be raised later; everything else makes it another run.
    let mut identity = config.clone();
    identity.train.steps = 0;
    identity.train.checkpoint_every = 1;
    identity.data.dir.clear();
    let fingerprint = serde_json::to_string(&identity).map_err(|e| Error::failure("configuration", e.to_string()))?;
    let mut trainer = Trainer::open(model, config.optimizer, settings, &args.run, fingerprint)?;
    let start = trainer.step();
    if !args.export {
        let bar = progress::bar(t.steps, "pretrain");
        bar.set_position(start);
        let mut smoothed = None;
        trainer.run(data, &mut |p| {
            let loss = smoothed.map_or(p.loss, |s: f64| 0.98 * s + 0.02 * p.loss);
            smoothed = Some(loss);
            bar.set_position(p.step);
            bar.set_message(format!("loss {loss:.4} {:.0} images/s", p.images_per_second));
            let done = args.stop_after.is_some_and(|n| p.step >= start + n);
            if done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        bar.finish();
    }
    Ok(trainer)
}

fn step_of<M: Learner>(trainer: &Trainer<M>) -> (String, String) {
    ("graft.pretrain.step".to_string(), trainer.step().to_string())
}

fn report<M: Learner>(trainer: &Trainer<M>, folder: &Path) {
    println!("{} updates; averaged weights in {}", trainer.step(), folder.display());
}

/// The model in `folder`, which must have the sizes of the configuration.
fn start_from(folder: &Path, sizes: &DitConfig, device: &Device) -> Result<Dit> {
    let model = dit::load(folder, device)?;
    let same = DitConfig { norm_eps: sizes.norm_eps, ..model.config.clone() } == *sizes;
    same.then_some(model).ok_or_else(|| other_sizes(folder))
}

fn other_sizes(folder: &Path) -> Error {
    Error::usage(format!("init: {}", folder.display()), "not a model of the configured sizes")
        .fix("name a model that the same sections [model] and [text] made, or leave `init` out")
}
