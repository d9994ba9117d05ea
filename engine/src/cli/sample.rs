//! `graft sample --model DIR …`: pictures or latents from class labels.

use super::model_args::{self, Channels, ModelArgs};
use super::{known, pictures, progress};
use crate::error::{Error, Result};
use crate::io::safetensors::{self, TensorFile, TensorRecord};
use crate::io::{atomic, png};
use crate::models::dit::{self, Dit, DitConfig};
use crate::sample::pipeline::{Request, generate, plan_memory, to_pixels};
use crate::sample::{cfg, solver::Sampler};
use crate::tensor::Tensor;
use graft_kernels::rng::image_seed;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Classes by number or name, separated by commas.
    #[arg(long, visible_alias = "class", value_name = "LABELS", allow_hyphen_values = true)]
    class_labels: Option<String>,
    /// Every class of the model, one row each.
    #[arg(long, value_name = "rows", value_parser = ["rows"], conflicts_with = "class_labels")]
    grid: Option<String>,
    /// Images per class.
    #[arg(long, default_value_t = 1, value_name = "N")]
    n: usize,
    /// Model evaluations per image.
    #[arg(long, visible_alias = "num-inference-steps", default_value_t = 20, value_name = "S")]
    steps: usize,
    /// Sampler: ddim, ddpm or dpm++ (dpm-solver++).
    #[arg(long, default_value = "ddim", value_name = "NAME")]
    sampler: Sampler,
    /// DDIM only: share of fresh noise, 0 (none) to 1 (as DDPM).
    #[arg(long, value_name = "ETA")]
    eta: Option<f64>,
    /// Scale of classifier-free guidance; 1 is none.
    #[arg(long, visible_aliases = ["cfg-scale", "guidance"], default_value_t = 4.0, value_name = "S", allow_hyphen_values = true)]
    guidance_scale: f64,
    /// Noise channels that are guided: a number, or all; the first three where not given, as in the original DiT.
    #[arg(long, value_name = "N|all")]
    cfg_channels: Option<Channels>,
    /// Seed of the first image, image i uses seed + i; -1 for a random one.
    #[arg(short, long, default_value_t = 0, value_name = "SEED", allow_hyphen_values = true)]
    seed: i64,
    /// Images computed together; changes speed and memory, never the result.
    #[arg(long, default_value_t = 16, value_name = "B")]
    batch: usize,
    /// PNG file, folder, or - for standard output; %seed% becomes the seed.
    #[arg(short, long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// One file per image instead of a sheet.
    #[arg(long)]
    separate: bool,
    /// Starting noise: a safetensors file with `latents [n, C, H, W]`.
    #[arg(long, value_name = "FILE")]
    latents: Option<PathBuf>,
    /// Also write the result as safetensors: `latents [n, C, H, W]`.
    #[arg(long, value_name = "FILE")]
    output_latents: Option<PathBuf>,
    /// Picture to fill in: what --mask leaves black is kept.
    #[arg(long, value_name = "PNG", requires = "mask")]
    inpaint: Option<PathBuf>,
    /// Where to fill in: white, in the size of the picture.
    #[arg(long, value_name = "PNG", requires = "inpaint")]
    mask: Option<PathBuf>,
    /// Rounds per step when filling in: more of them let the filling agree with its surroundings.
    #[arg(long, default_value_t = 1, value_name = "R")]
    rounds: usize,
    /// Only print how much memory the request needs.
    #[arg(long)]
    plan_memory: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let config = dit::describe(&args.model.model)?;
    let names = model_args::class_names(&args.model.model, config.classes)?;
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
    let seed = match args.seed {
        -1 => RandomState::new().hash_one(std::process::id()) >> 1,
        seed => u64::try_from(seed)
            .map_err(|_| Error::usage("--seed", "negative").is(seed).must("0 or more, or -1 for a random one"))?,
    };
    let sampler = match (args.sampler, args.eta) {
        (sampler, None) => sampler,
        (Sampler::Ddim { .. }, Some(eta)) => Sampler::Ddim { eta },
        (_, Some(eta)) => return Err(Error::usage("--eta", "only DDIM has it").is(eta).must("absent")),
    };
    let labels: Vec<i32> = classes.iter().flat_map(|&class| std::iter::repeat_n(class, args.n)).collect();
    let model = args.model.load()?;
    let request = Request {
        labels,
        seed,
        sampler,
        steps: args.steps,
        guidance: args.guidance_scale,
        guided: args.cfg_channels.map(|c| c.count(config.in_channels)),
        batch: args.batch,
        precision: args.model.dtype.into(),
        semantics: args.model.semantics(&model),
        latents: args.latents.as_deref().map(|path| read_latents(path, &model)).transpose()?,
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
    let record = record(args, &request, &config)?;
    if args.seed == -1 {
        eprintln!("seed {seed}");
    }
    if let Some(path) = &args.output_latents {
        let shape = images.shape();
        let metadata = BTreeMap::from([(png::RECORD_KEY.to_string(), record.to_string())]);
        safetensors::write(path, [TensorRecord::f32("latents", shape.dims(), images.values()?)], &metadata)?;
        eprintln!("latents in {}", path.display());
    }
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

/// Where pictures go.
enum Target {
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
    let text = path.to_string_lossy().into_owned();
    if text == "-" {
        if args.separate {
            return Err(Error::usage("--separate", "standard output takes one picture").must("absent with --output -"));
        }
        return Ok(Some(Target::Sheet(path)));
    }
    let target = if path.is_dir() || text.ends_with('/') {
        Target::Separate(format!("{}/%seed%.png", text.trim_end_matches('/')))
    } else if text.contains("%seed%") {
        Target::Separate(text)
    } else if args.separate {
        let extension = path.extension().map_or("png".into(), |e| e.to_string_lossy());
        Target::Separate(format!("{}-%seed%.{extension}", path.with_extension("").display()))
    } else {
        Target::Sheet(path)
    };
    match &target {
        Target::Sheet(path) => writable(path)?,
        Target::Separate(pattern) => writable(Path::new(pattern))?,
    }
    Ok(Some(target))
}

fn writable(file: &Path) -> Result<()> {
    match file.parent().filter(|p| !p.as_os_str().is_empty()) {
        Some(folder) => atomic::ensure_writable_dir(folder),
        None => atomic::ensure_writable_dir(Path::new(".")),
    }
}

fn read_latents(path: &Path, model: &Dit) -> Result<Tensor> {
    let file = TensorFile::open(path)?;
    let view = file.get("latents").ok_or_else(|| {
        Error::failure(format!("{}: latents", path.display()), "missing tensor").must("present, [n, C, H, W]")
    })?;
    Tensor::from_f32(model.device(), view.shape, &view.to_f32()?)
}

fn caption(names: &[String], label: i32) -> String {
    // Synonyms after the first comma would only widen the sheet.
    let name = names.get(label as usize).and_then(|n| n.split(',').next());
    name.map_or_else(|| format!("class {label}"), str::to_string)
}

/// Everything that is needed to make the same pictures again.
fn record(args: &Args, request: &Request, config: &DitConfig) -> Result<Value> {
    let (sampler, eta) = match request.sampler {
        Sampler::Ddpm => ("ddpm", None),
        Sampler::Ddim { eta } => ("ddim", Some(eta)),
        Sampler::DpmPlusPlus { .. } => ("dpm++", None),
    };
    let mut record = json!({
        "program": concat!("graft ", env!("CARGO_PKG_VERSION")),
        "model": model_args::short_name(&args.model.model),
        "weights_sha256": model_args::weights_digest(&args.model.model)?,
        "labels": request.labels,
        "seed": request.seed,
        "sampler": sampler,
        "steps": request.steps,
        "guidance_scale": request.guidance,
        "cfg_channels": request.guided.unwrap_or_else(|| cfg::default_channels(config)),
        "dtype": if args.model.dtype == super::Dtype::Bf16 { "bf16" } else { "f32" },
        "semantics": args.model.semantics_name(),
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
