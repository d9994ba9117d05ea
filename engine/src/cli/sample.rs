//! `graft sample --model DIR …`: pictures or latents from class labels; models that read text are run by
//! [`super::sample_text`].

use super::model_args::{self, Channels, ModelArgs, RunArgs};
use super::sample_text::{self, TextArgs};
use super::{known, pictures, progress};
use crate::error::{Error, Result};
use crate::io::safetensors::{self, TensorFile, TensorRecord};
use crate::io::{atomic, png};
use crate::models::dit::{self, DitConfig};
use crate::sample::pipeline::{Request, generate, plan_memory, to_pixels};
use crate::sample::{cfg, solver::Sampler};
use crate::tensor::{Device, Tensor};
use graft_kernels::rng::image_seed;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Model folder, transformer, checkpoint, or the id of a model in the hub's cache; for a prompt the shipped model
    /// where not given.
    #[arg(long, value_name = "DIR")]
    pub(super) model: Option<PathBuf>,
    #[command(flatten)]
    pub(super) run: RunArgs,
    #[command(flatten)]
    pub(super) text: TextArgs,
    /// Classes by number or name, separated by commas.
    #[arg(long, visible_alias = "class", value_name = "LABELS", allow_hyphen_values = true)]
    pub(super) class_labels: Option<String>,
    /// A row for every class of the model, or one sheet with a row for every prompt.
    #[arg(long, value_name = "rows", value_parser = ["rows"], conflicts_with = "class_labels")]
    pub(super) grid: Option<String>,
    /// Images per class or prompt.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(super) n: usize,
    /// Model evaluations per image.
    #[arg(long, visible_alias = "num-inference-steps", default_value_t = 20, value_name = "S")]
    pub(super) steps: usize,
    /// Sampler: ddim, ddpm or dpm++ (dpm-solver++); ddim for labels, for text what the model's scheduler says or dpm++.
    #[arg(long, value_name = "NAME")]
    pub(super) sampler: Option<Sampler>,
    /// DDIM only: share of fresh noise, 0 (none) to 1 (as DDPM).
    #[arg(long, value_name = "ETA")]
    pub(super) eta: Option<f64>,
    /// Scale of classifier-free guidance; 1 is none; where not given 4 for labels, 4.5
    /// for text and 3 for text to pixels.
    #[arg(long, visible_aliases = ["cfg-scale", "guidance"], value_name = "S", allow_hyphen_values = true)]
    pub(super) guidance_scale: Option<f64>,
    /// Noise channels that are guided: a number, or all; where not given the first three for labels, as in the original
    /// DiT, and all for text.
    #[arg(long, value_name = "N|all")]
    pub(super) cfg_channels: Option<Channels>,
    /// Seed of the first image, image i uses seed + i; -1 for a random one.
    #[arg(short, long, default_value_t = 0, value_name = "SEED", allow_hyphen_values = true)]
    pub(super) seed: i64,
    /// Images computed together; changes speed and memory, never the result. 16 for labels and models
    /// of pixels, else 1.
    #[arg(long, value_name = "B")]
    pub(super) batch: Option<usize>,
    /// PNG file, folder, or - for standard output; %seed% becomes the seed.
    #[arg(short, long, value_name = "PATH")]
    pub(super) output: Option<PathBuf>,
    /// One file per image instead of a sheet.
    #[arg(long)]
    pub(super) separate: bool,
    /// Starting noise: a safetensors file with `latents [n, C, H, W]`.
    #[arg(long, value_name = "FILE")]
    pub(super) latents: Option<PathBuf>,
    /// Also write the result as safetensors: `latents [n, C, H, W]`.
    #[arg(long, value_name = "FILE")]
    pub(super) output_latents: Option<PathBuf>,
    /// Picture to fill in: what --mask leaves black is kept.
    #[arg(long, value_name = "PNG", requires = "mask")]
    pub(super) inpaint: Option<PathBuf>,
    /// Where to fill in: white, in the size of the picture.
    #[arg(long, value_name = "PNG", requires = "inpaint")]
    pub(super) mask: Option<PathBuf>,
    /// Rounds per step when filling in: more of them let the filling agree with its surroundings.
    #[arg(long, default_value_t = 1, value_name = "R")]
    pub(super) rounds: usize,
    /// Only print how much memory the request needs.
    #[arg(long)]
    pub(super) plan_memory: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    if sample_text::is_for(args)? {
        return sample_text::run(args);
    }
    let Some(path) = &args.model else {
        return Err(Error::usage("--model", "not given").must("a model folder, or --random-weights with --size"));
    };
    let model_args = ModelArgs { model: path.clone(), run: args.run.clone() };
    let config = dit::describe(path)?;
    let names = model_args::class_names(path, config.classes)?;
    let classes = match (&args.class_labels, &args.grid) {
        (Some(text), _) => model_args::parse_labels(text, &names, config.classes)?,
        (None, Some(_)) => (0..config.classes as i32).collect(),
        (None, None) => {
            return Err(Error::usage("--class-labels", "not given").must("classes by number or name, or --grid rows"));
        }
    };
    if args.n == 0 {
        return Err(Error::usage("--n", "no images").is(0).must("at least 1"));
    }
    let pictures = target(args, &config)?;
    let seed = first_seed(args)?;
    let sampler = with_eta(args.sampler.unwrap_or(Sampler::Ddim { eta: 0.0 }), args.eta)?;
    let labels: Vec<i32> = classes.iter().flat_map(|&class| std::iter::repeat_n(class, args.n)).collect();
    let model = model_args.load()?;
    let request = Request {
        labels,
        seed,
        sampler,
        steps: args.steps,
        guidance: args.guidance_scale.unwrap_or(4.0),
        guided: args.cfg_channels.map(|c| c.count(config.in_channels)),
        batch: args.batch.unwrap_or(16),
        precision: args.run.dtype.into(),
        semantics: model_args.semantics(&model),
        latents: args.latents.as_deref().map(|path| read_latents(path, model.device())).transpose()?,
        known: args
            .inpaint
            .as_deref()
            .zip(args.mask.as_deref())
            .map(|(image, mask)| known::read(image, mask, args.rounds, &model, classes.len() * args.n))
            .transpose()?,
    };
    if args.plan_memory {
        return super::out::line(plan_memory(&model, &request)?);
    }
    let bar = progress::bar((request.labels.len() * request.steps) as u64, "sample");
    let result =
        generate(&model, &request, &mut |p| bar.set_position((p.images * args.steps + p.batch * p.step) as u64));
    bar.finish_and_clear();
    let images = result?;
    let record = record(args, path, &request, &config)?;
    if args.seed == -1 {
        eprintln!("seed {seed}");
    }
    write_latents(args, &images, &record)?;
    let Some(target) = pictures else { return Ok(()) };
    let pictures = pictures::split(&to_pixels(&images)?, &config)?;
    let captions: Vec<String> = request.labels.iter().map(|&l| caption(&names, l)).collect();
    match target {
        Target::Sheet(path) => {
            let sheet = pictures::sheet(&pictures, args.n, captions.iter().step_by(args.n).cloned().collect())?;
            pictures::write(&path, &sheet, &record)
        }
        Target::Separate(pattern) => {
            for (i, picture) in pictures.iter().enumerate() {
                let own = image_seed(seed, i as u64);
                let mut one = record.clone();
                one["seed"] = json!(own);
                one["labels"] = json!([request.labels[i]]);
                pictures::write(&PathBuf::from(pattern.replace("%seed%", &own.to_string())), picture, &one)?;
            }
            Ok(())
        }
    }
}

/// Seed of the first image: the one that was given, or a random one for -1.
pub(super) fn first_seed(args: &Args) -> Result<u64> {
    match args.seed {
        -1 => Ok(RandomState::new().hash_one(std::process::id()) >> 1),
        seed => u64::try_from(seed)
            .map_err(|_| Error::usage("--seed", "negative").is(seed).must("0 or more, or -1 for a random one")),
    }
}

/// A sampler with the share of noise that was given for it.
pub(super) fn with_eta(sampler: Sampler, eta: Option<f64>) -> Result<Sampler> {
    match (sampler, eta) {
        (sampler, None) => Ok(sampler),
        (Sampler::Ddim { .. }, Some(eta)) => Ok(Sampler::Ddim { eta }),
        (_, Some(eta)) => Err(Error::usage("--eta", "only DDIM has it").is(eta).must("absent")),
    }
}

/// Name and share of noise of a sampler, for records.
pub(super) fn sampler_name(sampler: Sampler) -> (&'static str, Option<f64>) {
    match sampler {
        Sampler::Ddpm => ("ddpm", None),
        Sampler::Ddim { eta } => ("ddim", Some(eta)),
        Sampler::DpmPlusPlus { .. } => ("dpm++", None),
    }
}

/// Writes the result as tensors, where that was asked for.
pub(super) fn write_latents(args: &Args, latents: &Tensor, record: &Value) -> Result<()> {
    let Some(path) = &args.output_latents else { return Ok(()) };
    let shape = latents.shape();
    let metadata = BTreeMap::from([(png::RECORD_KEY.to_string(), record.to_string())]);
    safetensors::write(path, [TensorRecord::f32("latents", shape.dims(), latents.values()?)], &metadata)?;
    eprintln!("latents in {}", path.display());
    Ok(())
}

/// Where pictures go.
pub(super) enum Target {
    /// One sheet; `-` for standard output.
    Sheet(PathBuf),
    /// One file per image, by a pattern with `%seed%`.
    Separate(String),
}

/// Works out where pictures go and makes sure that they can, before anything is computed.
fn target(args: &Args, config: &DitConfig) -> Result<Option<Target>> {
    for path in args.output_latents.iter() {
        writable(path)?;
    }
    if !matches!(config.in_channels, 1 | 3) {
        if args.output_latents.is_some() && args.output.is_none() {
            return Ok(None);
        }
        return Err(Error::usage("--output", "this model works on latents, and there is no decoder for them")
            .is(format!("{} channels", config.in_channels))
            .must("absent, with --output-latents FILE"));
    }
    let path = match (&args.output, &args.output_latents) {
        (Some(path), _) => path.clone(),
        (None, Some(_)) => return Ok(None),
        (None, None) => PathBuf::from("sample.png"),
    };
    place(args, path, args.separate).map(Some)
}

/// Where pictures go that are to be written at `path`, which must be writable; several are to be `separate` or not.
pub(super) fn place(args: &Args, path: PathBuf, separate: bool) -> Result<Target> {
    let text = path.to_string_lossy().into_owned();
    if text == "-" {
        if args.separate {
            return Err(Error::usage("--separate", "standard output takes one picture").must("absent with --output -"));
        }
        return Ok(Target::Sheet(path));
    }
    let target = if path.is_dir() || text.ends_with('/') {
        Target::Separate(format!("{}/%seed%.png", text.trim_end_matches('/')))
    } else if text.contains("%seed%") {
        Target::Separate(text)
    } else if separate {
        let extension = path.extension().map_or("png".into(), |e| e.to_string_lossy());
        Target::Separate(format!("{}-%seed%.{extension}", path.with_extension("").display()))
    } else {
        Target::Sheet(path)
    };
    match &target {
        Target::Sheet(path) => writable(path)?,
        Target::Separate(pattern) => writable(Path::new(pattern))?,
    }
    Ok(target)
}

pub(super) fn writable(file: &Path) -> Result<()> {
    match file.parent().filter(|p| !p.as_os_str().is_empty()) {
        Some(folder) => atomic::ensure_writable_dir(folder),
        None => atomic::ensure_writable_dir(Path::new(".")),
    }
}

/// Starting noise or latents from a file.
pub(super) fn read_latents(path: &Path, device: &Device) -> Result<Tensor> {
    let file = TensorFile::open(path)?;
    let view = file.get("latents").ok_or_else(|| {
        Error::failure(format!("{}: latents", path.display()), "missing tensor").must("present, [n, C, H, W]")
    })?;
    Tensor::from_f32(device, view.shape, &view.to_f32()?)
}

fn caption(names: &[String], label: i32) -> String {
    // Synonyms after the first comma would only widen the sheet.
    let name = names.get(label as usize).and_then(|n| n.split(',').next());
    name.map_or_else(|| format!("class {label}"), str::to_string)
}

/// Everything that is needed to make the same pictures again.
fn record(args: &Args, model: &Path, request: &Request, config: &DitConfig) -> Result<Value> {
    let (sampler, eta) = sampler_name(request.sampler);
    let mut record = json!({
        "program": concat!("graft ", env!("CARGO_PKG_VERSION")),
        "model": model_args::short_name(model),
        "weights_sha256": model_args::weights_digest(model)?,
        "labels": request.labels,
        "seed": request.seed,
        "sampler": sampler,
        "steps": request.steps,
        "guidance_scale": request.guidance,
        "cfg_channels": request.guided.unwrap_or_else(|| cfg::default_channels(config)),
        "dtype": args.run.dtype_name(),
        "semantics": args.run.semantics_name(),
    });
    if let Some(eta) = eta {
        record["eta"] = json!(eta);
    }
    if let (Some(image), Some(mask)) = (&args.inpaint, &args.mask) {
        record["inpaint_sha256"] = json!(crate::io::hash::sha256_file(image)?);
        record["mask_sha256"] = json!(crate::io::hash::sha256_file(mask)?);
        record["rounds"] = json!(args.rounds);
    }
    if let Some(path) = &args.latents {
        record["latents_sha256"] = json!(crate::io::hash::sha256_file(path)?);
    }
    Ok(record)
}
