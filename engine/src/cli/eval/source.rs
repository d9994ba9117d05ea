//! Where samples come from: a model that makes them, a folder of pictures, an array.

use super::Args;
use crate::cli::{Dtype, model_args, out, progress};
use crate::error::{Error, Result};
use crate::eval::samples::{SampleFolder, Samples, Shard};
use crate::io::npz::Npz;
use crate::io::pictures::{self, Pictures};
use crate::models::dit::{self, Dit};
use crate::sample::pipeline::{Request, generate, to_pixels};
use crate::tensor::{Device, Tensor};
use serde_json::{Value, json};

/// Samples, or what makes them.
pub enum Source {
    /// A model.
    Model(Box<Dit>),
    /// Pictures that are there already.
    Ready(Box<Samples>),
}

/// Samples of a model where nothing is said.
const DEFAULT: usize = 500;

impl Source {
    /// Opens what the first argument names.
    ///
    /// # Errors
    /// Neither a model nor pictures, or damaged ones.
    pub fn open(args: &Args, device: &Device) -> Result<Source> {
        let path = &args.model;
        let most = args.n.unwrap_or(usize::MAX);
        let found = if path.extension().is_some_and(|e| e == "npz") {
            Npz::open(path)?.pictures("arr_0")?.first(most)?
        } else if path.is_dir() && dit::weight_files(path).is_err() && pictures::is_folder_of_pngs(path)? {
            pictures::read_folder(path, most)?
        } else {
            let model = dit::load(path, device)?;
            if !matches!(model.config.in_channels, 1 | 3) {
                return Err(Error::usage("model", "it works on latents, and there is no decoder for them")
                    .is(format!("{} channels", model.config.in_channels))
                    .must("1 or 3 channels"));
            }
            return Ok(Source::Model(Box::new(model)));
        };
        for (flag, given) in [("--samples-dir", args.samples_dir.is_some()), ("--seeds", !args.seeds.is_empty())] {
            if given {
                return Err(Error::usage(flag, "these samples are there already").must("absent without a model"));
            }
        }
        if args.n.is_some_and(|n| n > found.n) {
            return Err(Error::usage("--n", "more than there are samples")
                .is(most)
                .must(format!("at most {}", found.n)));
        }
        Ok(Source::Ready(Box::new(Samples { pictures: found, labels: Vec::new() })))
    }

    /// How many samples there will be.
    pub fn count(&self, args: &Args) -> usize {
        match self {
            Source::Model(_) => args.n.unwrap_or(DEFAULT),
            Source::Ready(samples) => samples.pictures.n,
        }
    }

    /// Makes this process' share of a model's samples in `--samples-dir`; says what is missing where something is, and
    /// whether all are there.
    ///
    /// # Errors
    /// Those of sampling, or a folder of other samples.
    pub fn prepare(&self, args: &Args, sets: &[(u64, u64)], as_json: bool) -> Result<bool> {
        let (Source::Model(model), Some(_)) = (self, &args.samples_dir) else { return Ok(true) };
        let shard = args.shard.unwrap_or(Shard::ALL);
        let mut folders = Vec::new();
        for &set in sets {
            folders.push((set.1, folder(model, args, set, self.count(args))?));
        }
        let missing: usize = folders.iter().map(|(_, folder)| folder.missing(shard)).sum();
        let bar = progress::bar((missing * args.steps) as u64, "samples");
        for (seed, folder) in &folders {
            folder.fill(shard, *seed, &mut |labels, seed| draw(model, args, labels, seed, &bar))?;
        }
        bar.finish_and_clear();
        let left: usize = folders.iter().map(|(_, folder)| folder.missing(Shard::ALL)).sum();
        if left > 0 {
            let all = sets.len() * self.count(args);
            let (index, of, done) = (shard.index, shard.of, all - left);
            out::line(if as_json {
                format!("{:#}", json!({ "shard": index, "shards": of, "samples_made": done, "samples_wanted": all }))
            } else {
                format!(
                    "share {index}/{of} is done: {done} of {all} samples are there; the same command scores them when the others are done"
                )
            })?;
        }
        Ok(left == 0)
    }

    /// Hands the samples of one set to `use_them`.
    ///
    /// # Errors
    /// Those of sampling, damaged files, or those of `use_them`.
    pub fn with_samples<R>(
        &self,
        args: &Args,
        set: (u64, u64),
        use_them: impl FnOnce(&Samples) -> Result<R>,
    ) -> Result<R> {
        let n = self.count(args);
        let model = match self {
            Source::Ready(samples) => return use_them(samples),
            Source::Model(model) => model,
        };
        if args.samples_dir.is_some() {
            let found = folder(model, args, set, n)?.load()?.ok_or_else(|| {
                Error::failure("--samples-dir", "samples are missing").fix("run the command without --shard")
            })?;
            return use_them(&found);
        }
        let labels: Vec<i32> = (0..n).map(|i| (i % model.config.classes) as i32).collect();
        let bar = progress::bar((n * args.steps) as u64, "eval");
        let pixels = to_pixels(&draw(model, args, &labels, set.1, &bar)?)?;
        bar.finish_and_clear();
        let c = &model.config;
        let pictures = Pictures::new("samples", [n, c.input_size, c.input_size, c.in_channels], pixels)?;
        use_them(&Samples { pictures, labels })
    }
}

fn draw(model: &Dit, args: &Args, labels: &[i32], seed: u64, bar: &indicatif::ProgressBar) -> Result<Tensor> {
    let request = Request { labels: labels.to_vec(), ..args.request(seed)? };
    let before = bar.position();
    generate(model, &request, &mut |p| bar.set_position(before + (p.images * args.steps + p.step * p.batch) as u64))
}

fn folder(model: &Dit, args: &Args, (set, seed): (u64, u64), n: usize) -> Result<SampleFolder> {
    let dir = args.samples_dir.clone().unwrap_or_default().join(format!("set-{set}"));
    SampleFolder::open(&dir, n, model.config.classes, &recipe(args, seed)?)
}

/// All that decides what an image is.
fn recipe(args: &Args, seed: u64) -> Result<Value> {
    Ok(json!({
        "weights_sha256": model_args::weights_digest(&args.model)?,
        "sampler": args.sampler,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "seed": seed,
        "dtype": if args.dtype == Dtype::Bf16 { "bf16" } else { "f32" },
    }))
}
