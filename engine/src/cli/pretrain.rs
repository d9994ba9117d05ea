//! `graft pretrain CONFIG --run DIR`.

use super::progress;
use crate::backend::Device;
use crate::error::{Error, Result};
use crate::io::datasets::Split;
use crate::models::dit::{self, Dit, DitConfig, SaveAs};
use crate::train::config::PretrainConfig;
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
    /// Only write the model of the last checkpoint (averaged weights) to `RUN/model`.
    #[arg(long)]
    export: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let config = PretrainConfig::read(&args.config)?;
    let data = config.data.load(Split::Train)?;
    let device = Device::cpu();
    let sizes = config.model_for(data.channels, data.height, data.class_names.len())?;
    let model = match &config.init {
        None => Dit::new(sizes, &device, config.train.seed)?,
        Some(folder) => start_from(folder, &sizes, &device)?,
    };
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
        trainer.run(&data, &mut |p| {
            let loss = smoothed.map_or(p.loss, |s: f64| 0.98 * s + 0.02 * p.loss);
            smoothed = Some(loss);
            bar.set_position(p.step);
            bar.set_message(format!("loss {loss:.4} {:.0} images/s", p.images_per_second));
            let done = args.stop_after.is_some_and(|n| p.step >= start + n);
            if done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        bar.finish();
    }
    let folder = args.run.join("model");
    let names = serde_json::to_string(&data.class_names).map_err(|e| Error::failure("class names", e.to_string()))?;
    let metadata = BTreeMap::from([
        ("graft.pretrain.step".to_string(), trainer.step().to_string()),
        (super::model_args::CLASS_NAMES_KEY.to_string(), names),
    ]);
    dit::save(&trainer.averaged()?, &folder, SaveAs::Bf16, &metadata)?;
    println!("{} updates; averaged weights in {}", trainer.step(), folder.display());
    Ok(())
}

/// The model in `folder`, which must have the sizes of the configuration.
fn start_from(folder: &Path, sizes: &DitConfig, device: &Device) -> Result<Dit> {
    let model = dit::load(folder, device)?;
    let same = DitConfig { norm_eps: sizes.norm_eps, ..model.config.clone() } == *sizes;
    same.then_some(model).ok_or_else(|| {
        Error::usage(format!("init: {}", folder.display()), "not a model of the configured sizes")
            .fix("name a model that the same [model] section made, or leave `init` out")
    })
}
