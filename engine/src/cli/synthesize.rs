//! `graft synthesize --model DIR --prompts FILE -o DIR`: pairs of latents and text features that a model makes for its
//! own graft.

use super::model_args::RunArgs;
use super::texts::{Compat, Encoding, PartArgs};
use super::{Dtype, out, progress, sample, sample_sources, texts};
use crate::error::{Error, Result};
use crate::graft::plan::Plan;
use crate::graft::synthesize::{Progress, Sampling, Synthesis, SynthesizeConfig};
use crate::graft::text_source;
use crate::io::{hash, json};
use crate::models::pipeline::Components;
use crate::models::pixart::{self, PixArtConfig, Semantics};
use crate::sample::config::SolverConfig;
use crate::sample::dpm::DpmEndPoint;
use crate::sample::schedule::Schedule;
use crate::sample::solver::{Prediction, Sampler};
use crate::train::pairs::{About, Half};
use indicatif::ProgressBar;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Model folder, or its transformer alone with --components.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    parts: PartArgs,
    /// File with a prompt on every line.
    #[arg(long, value_name = "FILE")]
    prompts: PathBuf,
    /// Latents of every prompt, each from a seed of its own.
    #[arg(long, default_value_t = 1, value_name = "N")]
    per_prompt: usize,
    /// Folder for the pairs; a call that was stopped goes on there.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Seed of the first latent; that of the i-th is i higher.
    #[arg(short, long, default_value_t = 0)]
    seed: u64,
    /// Sampling steps of a latent.
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// ddpm, ddim or dpm++; the model's scheduler where not given.
    #[arg(long, value_name = "NAME")]
    sampler: Option<String>,
    /// Scale of classifier-free guidance; 1 is none.
    #[arg(long, default_value_t = 4.5, value_name = "S")]
    guidance_scale: f64,
    /// Latents computed together; changes no bit.
    #[arg(long, default_value_t = 1, value_name = "N")]
    batch: usize,
    /// Pairs in a file: what a call that is killed may lose.
    #[arg(long, default_value_t = 64, value_name = "N")]
    shard: usize,
    /// Element type of what is written: f32, or bf16 in half the space.
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    store: Dtype,
    /// Most tokens of a text; as the model was trained where not given.
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// Stop after this many shards of latents of this call.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    stop_after: Option<u64>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let config = SynthesizeConfig {
        prompts: args.prompts.clone(),
        per_prompt: args.per_prompt,
        seed: args.seed,
        steps: args.steps,
        sampler: args.sampler.clone(),
        guidance: args.guidance_scale,
        batch: args.batch,
        shard: args.shard,
        dtype: args.run.dtype.into(),
        store: args.store.into(),
    };
    config.check()?;
    let job = Job { config: &config, run: &args.run, parts: &args.parts, max_tokens: args.max_tokens };
    match job.make(&args.model, &args.output, args.stop_after)? {
        Some((count, shards)) => out::line(format!("{count} pairs in {shards} shards in {}", args.output.display())),
        None => out::line("stopped; the same command goes on from here"),
    }
}

/// Makes the pairs that a plan asks for on a backend, as far as they are not there.
///
/// # Errors
/// As `graft synthesize`; a plan whose data is no pairs.
pub fn for_plan(plan: &Plan, config: &SynthesizeConfig, backend: &str) -> Result<()> {
    if plan.data.kind != text_source::KIND {
        return Err(Error::usage("data: kind", "nothing is synthesized for this data")
            .is(&plan.data.kind)
            .must(format!("{:?}, or a plan without [synthesize]", text_source::KIND)));
    }
    let dtype = if config.dtype == crate::train::config::Dtype::Bf16 { Dtype::Bf16 } else { Dtype::F32 };
    let (run, parts) = (RunArgs::new(backend, dtype), PartArgs::default());
    let job = Job { config, run: &run, parts: &parts, max_tokens: None };
    job.make(&plan.base, Path::new(&plan.data.dir), None).map(|_| ())
}

/// What to make, and how.
struct Job<'j> {
    config: &'j SynthesizeConfig,
    run: &'j RunArgs,
    parts: &'j PartArgs,
    max_tokens: Option<usize>,
}

impl Job<'_> {
    /// Makes what is missing in a folder; returns how many pairs and shards it holds, or nothing where it was stopped.
    fn make(&self, model: &Path, folder: &Path, stop_after: Option<u64>) -> Result<Option<(usize, usize)>> {
        let prompts = texts::lines(&self.config.prompts)?;
        let prompts: Vec<String> = prompts.into_iter().flat_map(|p| vec![p; self.config.per_prompt]).collect();
        let components = self.parts.find(model)?;
        let config = pixart::describe(&components.transformer)?;
        let how = self.sampling(&components)?;
        let about = self.about(&components, &config, &how, &prompts)?;
        let size = (about.count, about.shards());
        let made = Synthesis::begin(folder, about)?;
        let mut bars = Bars { bar: None, left: stop_after };
        let missing = made.missing(Half::Texts)?;
        if !missing.is_empty() {
            let encoding = Encoding {
                components: &components,
                residence: self.parts.residence(),
                most: self.max_tokens.unwrap_or(config.max_tokens),
                compat: Compat::Diffusers,
                run: self.run,
            };
            let encoder = encoding.open()?;
            let mut encode = |prompts: &[String]| {
                let mut found = encoder.encode(prompts, &vec![String::new(); prompts.len()])?;
                Ok((found.prompts, found.nulls.swap_remove(0)))
            };
            made.encode(&missing, &prompts, &mut encode, &mut |p| bars.report(p))?;
        }
        let missing = made.missing(Half::Latents)?;
        let mut finished = true;
        if !missing.is_empty() {
            // The encoder is forgotten by now.
            let bf16 = self.run.dtype == Dtype::Bf16;
            let model = pixart::load(&components.transformer, &self.run.device()?, bf16)?;
            finished = made.draw(&missing, &model, &how, &mut |p| bars.report(p))?;
        }
        bars.finish();
        Ok(finished.then_some(size))
    }

    fn sampling(&self, components: &Components) -> Result<Sampling> {
        let stated = match &components.scheduler {
            Some(path) => {
                let value = json::read(path)?;
                let solver = SolverConfig::from_scheduler_json(&value).map_err(|e| e.context(path.display()));
                Some((solver, Prediction::stated(&value)))
            }
            None => None,
        };
        let sampler: Option<Sampler> = self.config.sampler.as_deref().map(str::parse).transpose()?;
        let usual = |prediction| SolverConfig {
            sampler: Sampler::DpmPlusPlus { end: DpmEndPoint::Zero },
            schedule: Schedule::default(),
            prediction,
        };
        let solver = match (stated, sampler) {
            (Some((Ok(solver), _)), _) => solver,
            (Some((Err(e), _)), None) => return Err(e),
            // A scheduler that is not known matters only to those who do not choose another.
            (Some((Err(_), prediction)), Some(_)) => usual(prediction),
            (None, _) => usual(Prediction::Noise),
        };
        let semantics = if self.run.as_diffusers() { Semantics::Diffusers } else { Semantics::Original };
        Ok(Sampling {
            sampler: sampler.unwrap_or(solver.sampler),
            schedule: solver.schedule,
            prediction: solver.prediction,
            steps: self.config.steps,
            guidance: self.config.guidance,
            batch: self.config.batch,
            precision: self.run.dtype.into(),
            semantics,
        })
    }

    fn about(
        &self,
        components: &Components,
        config: &PixArtConfig,
        how: &Sampling,
        prompts: &[String],
    ) -> Result<About> {
        let encoder = components.text()?.0;
        let (name, eta) = sample::sampler_name(how.sampler);
        let sampling = serde_json::json!({
            "sampler": name,
            "eta": eta,
            "schedule": hash::sha256(format!("{:?}", how.schedule).as_bytes()),
            "steps": how.steps,
            "guidance_scale": how.guidance,
            "dtype": self.run.dtype_name(),
            "semantics": self.run.semantics_name(),
            "text_encoder": sample_sources::digest(encoder)?,
            "max_tokens": self.max_tokens.unwrap_or(config.max_tokens),
        });
        Ok(About {
            transformer: sample_sources::digest(&components.transformer)?,
            prompts: hash::sha256(prompts.join("\n").as_bytes()),
            count: prompts.len(),
            shard: self.config.shard,
            latent: [config.in_channels, config.sample_size, config.sample_size],
            features: config.caption_channels,
            factor: texts::factor(components, config)?,
            seed: self.config.seed,
            sampling: sampling.to_string(),
            dtype: if self.config.store == crate::train::config::Dtype::Bf16 { "bf16" } else { "f32" }.into(),
            prediction: how.prediction,
        })
    }
}

/// A bar for the texts, then one for the latents.
struct Bars {
    bar: Option<(&'static str, ProgressBar)>,
    left: Option<u64>,
}

impl Bars {
    fn report(&mut self, event: Progress) -> ControlFlow<()> {
        match event {
            Progress::Texts(done, total) => self.show("texts", done as u64, total as u64),
            Progress::Latents(done, total) => self.show("latents", done, total),
            Progress::Shard(_) => {
                self.left = self.left.map(|left| left.saturating_sub(1));
                if self.left == Some(0) {
                    return ControlFlow::Break(());
                }
            }
        }
        ControlFlow::Continue(())
    }

    fn show(&mut self, what: &'static str, done: u64, total: u64) {
        if self.bar.as_ref().is_none_or(|(shown, _)| *shown != what) {
            self.finish();
            self.bar = Some((what, progress::bar(total, what)));
        }
        if let Some((_, bar)) = &self.bar {
            bar.set_position(done);
        }
    }

    fn finish(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
