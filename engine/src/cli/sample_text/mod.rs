//! `graft sample -p "…"`: pictures from text. Encode, forget the encoder; denoise, forget the transformer; decode.

mod told;

use super::sample::{self, Args, Target};
use super::sample_sources::{self, Sources, Space};
use super::stages::{self, Laps, Stages};
use super::texts::{self, Compat, Encoding, PartArgs, Texts};
use super::{Dtype, pictures, progress, shipped};
use crate::error::{Error, Result};
use crate::io::png::Image;
use crate::io::{hub, json};
use crate::models::pipeline::Components;
use crate::models::pixart::{self, PixArt, PixArtConfig, Semantics};
use crate::models::vae::{self, Decoder, Given, Vae, VaeConfig};
use crate::models::{component, lora};
use crate::sample::bins;
use crate::sample::config::SolverConfig;
use crate::sample::dpm::DpmEndPoint;
use crate::sample::schedule::Schedule;
use crate::sample::solver::{Prediction, Sampler};
use crate::sample::text::{self, Request};
use crate::tensor::{Device, Tensor};
use graft_kernels::rng::{Philox, image_seed};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Arguments of models that read text.
#[derive(clap::Args)]
pub struct TextArgs {
    /// Text to draw; may be given several times.
    #[arg(short, long, value_name = "TEXT", conflicts_with = "class_labels")]
    prompt: Vec<String>,
    /// Draw every prompt in each of these styles, as "PROMPT, STYLE style"; with --grid a column each.
    #[arg(long, value_name = "STYLE,...", value_delimiter = ',', requires = "prompt")]
    styles: Vec<String>,
    /// What to stay away from, for all prompts.
    #[arg(long, value_name = "TEXT", requires = "prompt")]
    negative_prompt: Option<String>,
    /// Features from `graft encode` instead of prompts.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    embeddings: Option<PathBuf>,
    /// Width of the pictures; with --height.
    #[arg(short = 'W', long, value_name = "PIXELS", conflicts_with = "size")]
    width: Option<usize>,
    /// Height of the pictures; with --width.
    #[arg(short = 'H', long, value_name = "PIXELS", conflicts_with = "size")]
    height: Option<usize>,
    /// Width and height, as 2048x2048; the size of training where not given.
    #[arg(long, value_name = "WxH")]
    size: Option<Size>,
    /// Draw at exactly this size, instead of at the nearest trained one and scaling.
    #[arg(long)]
    no_binning: bool,
    /// Whose behaviour to follow where the released programs differ.
    #[arg(long, value_enum, default_value_t = Compat::Diffusers)]
    compat: Compat,
    #[command(flatten)]
    parts: PartArgs,
    /// Factor between the autoencoder's latents and the transformer's, for files that do not say.
    #[arg(long, value_name = "F")]
    vae_scale: Option<f64>,
    /// Adapter to apply: a PEFT folder, or a file in the names of PEFT or kohya; may be given several times.
    #[arg(long, value_name = "PATH[:WEIGHT]")]
    lora: Vec<String>,
    /// Picture to begin with.
    #[arg(long, value_name = "PNG", conflicts_with_all = ["inpaint", "latents"])]
    init_image: Option<PathBuf>,
    /// How much of the picture to begin with changes, above 0 to 1.
    #[arg(long, default_value_t = 0.6, value_name = "S", requires = "init_image")]
    strength: f64,
    /// Small decoder for previews.
    #[arg(long, value_name = "DIR|FILE", requires = "preview")]
    preview_decoder: Option<PathBuf>,
    /// Picture that is overwritten with a preview after every step.
    #[arg(long, value_name = "PNG", requires = "preview_decoder")]
    preview: Option<PathBuf>,
    /// PixArt-Σ-XL/2 and its autoencoder with random weights, and random features of a text: to measure.
    #[arg(long, conflicts_with_all = ["prompt", "embeddings"])]
    random_weights: bool,
    /// Append times and memory of every stage to a file, as a line of JSON.
    #[arg(long, value_name = "FILE")]
    measure: Option<PathBuf>,
}

/// Guidance of models of pixels, which cannot overshoot as latents can.
const PIXEL_GUIDANCE: f64 = 3.0;
/// Images that a model of pixels draws together, where nothing else is asked for: they are small.
const PIXEL_BATCH: usize = 16;

/// Width and height.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Size {
    width: usize,
    height: usize,
}

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let sides = text.split_once(['x', 'X']).and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
        sides.map(|(width, height)| Size { width, height }).ok_or_else(|| "must be WIDTHxHEIGHT, as 2048x2048".into())
    }
}

/// Whether the request is for a model that reads text.
///
/// # Errors
/// A model that cannot be opened, or text for one that reads labels.
pub fn is_for(args: &Args) -> Result<bool> {
    let text = &args.text;
    if text.random_weights {
        return Ok(true);
    }
    let asked = !text.prompt.is_empty() || text.embeddings.is_some();
    if asked && args.model.is_none() && text.parts.names_transformer().is_none() {
        return Ok(true);
    }
    let path = match (&args.model, text.parts.names_transformer()) {
        (_, Some(path)) => path,
        (Some(model), None) => model,
        (None, None) => return Ok(false),
    };
    // Who reads labels says what is wrong with a model that cannot be opened.
    let opened = hub::resolve(path).and_then(|path| pixart::is_pixart(&component(&path, "transformer")));
    let reads = if asked || args.model.is_none() { opened? } else { opened.unwrap_or(false) };
    match (reads, asked) {
        (false, true) => Err(Error::usage("--prompt", "the model does not read text")
            .is(path.display())
            .must("absent, with --class-labels")
            .fix("give the folder of a PixArt model")),
        (reads, _) => Ok(reads),
    }
}

/// Names of the stages.
const TEXT: &str = "text encoder";
const TRANSFORMER: &str = "transformer";
const DECODER: &str = "decoder";

/// What is settled before anything is loaded.
struct Job<'a> {
    args: &'a Args,
    device: Device,
    /// Absent with random weights.
    components: Option<Components>,
    /// Every prompt in every style.
    prompts: Vec<String>,
    config: PixArtConfig,
    /// Whether the transformer works on pixels: there is no autoencoder.
    pixels: bool,
    /// Pixels along a side of a latent's pixel.
    factor: usize,
    /// Height and width that are drawn, and that are asked for.
    drawn: [usize; 2],
    wanted: [usize; 2],
    solver: SolverConfig,
    seed: u64,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let job = Job::new(args)?;
    let count = job.prompts.len().max(1) * args.n;
    let target = job.target(count)?;
    let planned = job.planned()?;
    if args.plan_memory {
        let lines = stages::told(&planned).into_iter().chain(job.released()?);
        return lines.into_iter().try_for_each(super::out::line);
    }
    let mut stages = Stages::begin(planned);
    let texts = stages.run(TEXT, &job.device, |_| job.texts())?;
    let sources = job.sources(texts.prompts.len())?;
    let request = job.request(texts, &sources)?;
    let latents = stages.run(TRANSFORMER, &job.device, |laps| job.denoise(&request, laps))?;
    // After the weights were read, whose bytes it reads again.
    let record = job.record(&request)?;
    if args.seed == -1 {
        eprintln!("seed {}", job.seed);
    }
    sample::write_latents(args, &latents, &record)?;
    let images = match &target {
        None => Vec::new(),
        Some(_) => stages.run(DECODER, &job.device, |laps| job.decode(&latents, &sources, laps))?,
    };
    if let Some(path) = &args.text.measure {
        stages.keep(path, &record, &job.device)?;
    }
    let Some(target) = target else { return Ok(()) };
    match target {
        Target::Sheet(path) if args.grid.is_some() => {
            let columns = args.text.styles.len().max(1) * args.n;
            pictures::write(&path, &pictures::sheet(&images, columns, args.text.prompt.clone())?, &record)
        }
        Target::Sheet(path) => {
            let [only] = images.as_slice() else {
                return Err(Error::failure("pictures", "several for one file").is(images.len()).must("one"));
            };
            pictures::write(&path, only, &record)
        }
        Target::Separate(pattern) => {
            for (i, image) in images.iter().enumerate() {
                let own = image_seed(job.seed, i as u64);
                let mut one = record.clone();
                one["seed"] = json!(own);
                if let Some(prompt) = job.prompts.get(i / args.n) {
                    one["prompts"] = json!([prompt]);
                }
                pictures::write(&PathBuf::from(pattern.replace("%seed%", &own.to_string())), image, &one)?;
            }
            Ok(())
        }
    }
}

impl<'a> Job<'a> {
    fn new(args: &'a Args) -> Result<Job<'a>> {
        let text = &args.text;
        if args.n == 0 {
            return Err(Error::usage("--n", "no images").is(0).must("at least 1"));
        }
        let asked = match (text.size, text.width, text.height) {
            (Some(size), ..) => Some([size.height, size.width]),
            (None, Some(width), Some(height)) => Some([height, width]),
            (None, None, None) => None,
            _ => return Err(Error::usage("--width, --height", "only one is given").must("both, or --size")),
        };
        let (components, config) = match text.random_weights {
            true => {
                let longest = asked.map_or(1024, |[h, w]| h.max(w));
                let side = [256, 512, 1024].into_iter().find(|side| *side >= longest).unwrap_or(2048);
                (None, PixArtConfig::sigma_xl(side)?)
            }
            false => {
                if text.prompt.is_empty() && text.embeddings.is_none() {
                    return Err(Error::usage("--prompt", "not given").must("a text, or features with --embeddings"));
                }
                let found = match args.model.as_deref().or(text.parts.names_transformer()) {
                    Some(model) => text.parts.find(model)?,
                    None => text.parts.find(&shipped::text_to_image()?)?,
                };
                let config = pixart::describe(&found.transformer)?;
                (Some(found), config)
            }
        };
        let vae = components.as_ref().and_then(|found| found.vae.as_deref());
        let pixels = components.is_some() && vae.is_none() && config.in_channels == 3;
        let factor = components.as_ref().map_or(Ok(8), |found| texts::factor(found, &config))?;
        let prompts = match text.styles.is_empty() {
            true => text.prompt.clone(),
            false => {
                let in_all = |prompt| text.styles.iter().map(move |style| format!("{prompt}, {style} style"));
                text.prompt.iter().flat_map(in_all).collect()
            }
        };
        let side = config.sample_size * factor;
        let wanted = asked.unwrap_or([side, side]);
        let unit = factor * config.patch;
        if wanted.iter().any(|side| *side == 0 || !side.is_multiple_of(unit)) {
            return Err(Error::usage("--size", "sides do not divide into patches")
                .is(format!("{} x {}", wanted[1], wanted[0]))
                .must(format!("multiples of {unit}")));
        }
        let bin = bins::nearest(side, wanted);
        let drawn = match bin {
            Some(bin) if !text.no_binning && !text.random_weights => bin,
            _ => wanted,
        };
        if let Some(bin) = bin.filter(|bin| *bin != drawn && !text.random_weights) {
            eprintln!(
                "note: {} x {} is no size that the model was trained at; the nearest is {} x {}",
                drawn[1], drawn[0], bin[1], bin[0]
            );
        }
        let end = if text.compat == Compat::Official { DpmEndPoint::Official } else { DpmEndPoint::Zero };
        let stated = match components.as_ref().and_then(|c| c.scheduler.as_ref()) {
            Some(path) => {
                let value = json::read(path)?;
                Some((SolverConfig::from_scheduler_json(&value), Prediction::stated(&value), path))
            }
            None => None,
        };
        let plain = |sampler, prediction| SolverConfig { sampler, schedule: Schedule::default(), prediction };
        let mut solver = match (stated, args.sampler) {
            (None, _) => plain(Sampler::DpmPlusPlus { end }, Prediction::Noise),
            (Some((Ok(solver), ..)), _) => solver,
            // A scheduler that is not known matters only to those who do not choose another.
            (Some((Err(_), prediction, _)), Some(sampler)) => plain(sampler, prediction),
            (Some((Err(e), _, path)), None) => return Err(e.context(path.display().to_string())),
        };
        solver.sampler = args.sampler.unwrap_or(solver.sampler);
        if let Sampler::DpmPlusPlus { .. } = solver.sampler {
            solver.sampler = Sampler::DpmPlusPlus { end };
        }
        solver.sampler = sample::with_eta(solver.sampler, args.eta)?;
        let (device, seed) = (args.run.device()?, sample::first_seed(args)?);
        Ok(Job { args, device, components, prompts, config, pixels, factor, drawn, wanted, solver, seed })
    }

    /// Where pictures go; none where only latents are asked for.
    fn target(&self, count: usize) -> Result<Option<Target>> {
        let args = self.args;
        for path in args.output_latents.iter().chain(&args.text.preview) {
            sample::writable(path)?;
        }
        let path = match (&args.output, &args.output_latents) {
            (None, Some(_)) => return Ok(None),
            (path, _) => path.clone().unwrap_or_else(|| PathBuf::from("sample.png")),
        };
        if let (Some(components), false) = (&self.components, self.pixels) {
            components.vae()?;
        }
        if count > 1 && args.grid.is_none() && path.as_os_str() == "-" {
            return Err(Error::usage("--output", "standard output takes one picture")
                .is(count)
                .must("a file or folder"));
        }
        sample::place(args, path, args.separate || (count > 1 && args.grid.is_none())).map(Some)
    }

    fn guidance(&self) -> f64 {
        self.args.guidance_scale.unwrap_or(if self.pixels { PIXEL_GUIDANCE } else { 4.5 })
    }

    fn latent_size(&self) -> [usize; 2] {
        self.drawn.map(|side| side / self.factor)
    }

    /// Features of every image's text.
    fn texts(&self) -> Result<Texts> {
        let text = &self.args.text;
        let found = match (&self.components, &text.embeddings) {
            (None, _) => self.random_texts()?,
            (Some(_), Some(path)) => texts::read(path, &self.device)?,
            (Some(components), None) => {
                let negative = text.negative_prompt.clone().unwrap_or_default();
                let encoding = Encoding {
                    components,
                    residence: text.parts.residence(),
                    most: self.config.max_tokens,
                    compat: text.compat,
                    run: &self.args.run,
                };
                encoding.encode(&self.prompts, &vec![negative; self.prompts.len()])?
            }
        };
        let each = |all: Vec<Tensor>| all.into_iter().flat_map(|t| vec![t; self.args.n]).collect();
        Ok(Texts { prompts: each(found.prompts), nulls: each(found.nulls) })
    }

    fn random_texts(&self) -> Result<Texts> {
        let draw = |tokens: usize, stream: u64| -> Result<Tensor> {
            let mut features = self.device.empty(&[tokens, self.config.caption_channels])?;
            features.edit(|values| Philox::new(self.seed, stream).fill_normal(values))?;
            Ok(features)
        };
        Ok(Texts { prompts: vec![draw(self.config.max_tokens, 1 << 33)?], nulls: vec![draw(1, 1 << 34)?] })
    }

    /// Pictures to begin with or to fill in, as latents.
    fn sources(&self, count: usize) -> Result<Sources> {
        let args = self.args;
        let known = args.inpaint.as_deref().zip(args.mask.as_deref());
        if args.text.init_image.is_none() && known.is_none() {
            return Ok(Sources::default());
        }
        let Some(components) = &self.components else {
            return Err(
                Error::usage("--random-weights", "knows no pictures").must("without --init-image and --inpaint")
            );
        };
        let space = match self.pixels {
            true => Space::Pixels(self.device.clone()),
            false => Space::Latents(Box::new(vae::load(components.vae()?, &self.device, self.given())?)),
        };
        let precision = args.run.dtype.into();
        let read = |path: &Path| sample_sources::picture(path, self.drawn);
        let mut sources = Sources::default();
        if let Some(path) = &args.text.init_image {
            sources.start = Some(sample_sources::latents(&space, &read(path)?, self.drawn, count, precision)?);
        }
        if let Some((image, mask)) = known {
            sources.inpaint(&space, &read(image)?, &read(mask)?, (self.drawn, count, args.rounds), precision)?;
        }
        Ok(sources)
    }

    fn given(&self) -> Given {
        Given { groups: None, scaling: self.args.text.vae_scale }
    }

    fn request(&self, texts: Texts, sources: &Sources) -> Result<Request> {
        let args = self.args;
        let semantics = if args.run.as_diffusers() { Semantics::Diffusers } else { Semantics::Original };
        Ok(Request {
            sampler: self.solver.sampler,
            schedule: self.solver.schedule.clone(),
            prediction: self.solver.prediction,
            steps: args.steps,
            guidance: self.guidance(),
            guided: args.cfg_channels.map(|c| c.count(self.config.out_channels)),
            batch: args.batch.unwrap_or(if self.pixels { PIXEL_BATCH } else { 1 }),
            precision: args.run.dtype.into(),
            semantics,
            latents: args.latents.as_deref().map(|p| sample::read_latents(p, &self.device)).transpose()?,
            start: sources.start.clone().map(|latents| (latents, args.text.strength)),
            known: sources.known.clone(),
            factor: self.factor,
            ..Request::new(texts.prompts, texts.nulls, self.latent_size(), self.seed)
        })
    }

    /// The transformer, with its adapters merged.
    fn transformer(&self) -> Result<PixArt> {
        let bf16 = self.args.run.dtype == Dtype::Bf16;
        let mut model = match &self.components {
            None => PixArt::random_in(self.config.clone(), &self.device, self.seed, bf16)?,
            Some(components) => {
                pixart::load(&components.transformer, &self.device, bf16 && self.args.text.lora.is_empty())?
            }
        };
        for (path, weight) in self.loras()? {
            let count = lora::attach(&mut model, &path, weight)?;
            crate::nn::lora::merge(&mut model.params)?;
            eprintln!("{count} adapters of {} merged", path.display());
        }
        if bf16 && !self.args.text.lora.is_empty() {
            model.round_to_bf16()?;
        }
        Ok(model)
    }

    fn loras(&self) -> Result<Vec<(PathBuf, f64)>> {
        let parse = |text: &String| {
            let split = text.rsplit_once(':').and_then(|(path, weight)| Some((path, weight.parse::<f64>().ok()?)));
            let (path, weight) = split.unwrap_or((text, 1.0));
            let path = hub::resolve(Path::new(path))?;
            match path.exists() && weight.is_finite() {
                true => Ok((path, weight)),
                false => Err(Error::usage("--lora", "no such adapter").is(text).must("a folder or file, and a weight")),
            }
        };
        self.args.text.lora.iter().map(parse).collect()
    }

    fn denoise(&self, request: &Request, laps: &mut Laps) -> Result<Tensor> {
        let model = self.transformer()?;
        laps.end("weights");
        let steps = text::step_count(&model, request)?;
        let preview = match (&self.args.text.preview, &self.args.text.preview_decoder) {
            (Some(path), Some(decoder)) => Some((path, Decoder::load(decoder, &self.device, self.given())?)),
            _ => None,
        };
        let bar = progress::bar((request.prompts.len() * steps) as u64, "sample");
        let [h, w] = request.size;
        let channels = self.config.in_channels;
        let result = text::generate(&model, request, &mut |p, x0| {
            bar.set_position((p.images * steps + p.batch * p.step) as u64);
            laps.end("step");
            let Some((path, decoder)) = &preview else { return Ok(()) };
            let first = Tensor::from_f32(&self.device, &[1, channels, h, w], &x0.values()?[..channels * h * w])?;
            let picture = decoder.decode(&first, request.precision, &mut |_, _| {})?;
            let image = sample_sources::to_image(&picture.values()?, picture.dim(2), picture.dim(3))?;
            crate::io::png::write(path, &image, &std::collections::BTreeMap::new())
        });
        bar.finish_and_clear();
        result
    }

    /// Pictures of the latents, in the size that was asked for.
    fn decode(&self, latents: &Tensor, sources: &Sources, laps: &mut Laps) -> Result<Vec<Image>> {
        let decoded = if self.pixels { latents.clone() } else { self.decode_latents(latents, laps)? };
        let each = decoded.len() / decoded.dim(0).max(1);
        let image = |values: &[f32]| {
            let mut values = values.to_vec();
            sources.restore(&mut values);
            if self.wanted != self.drawn {
                values = bins::resize_and_crop(&values, self.drawn, self.wanted);
            }
            sample_sources::to_image(&values, self.wanted[0], self.wanted[1])
        };
        decoded.values()?.chunks(each).map(image).collect()
    }

    /// Pixels `[n, 3, H, W]` of latents.
    fn decode_latents(&self, latents: &Tensor, laps: &mut Laps) -> Result<Tensor> {
        let decoder = match &self.components {
            Some(components) => Decoder::load(components.vae()?, &self.device, self.given())?,
            None => Decoder::Kl(Box::new(Vae::new(VaeConfig::released(0.13025), &self.device, self.seed)?)),
        };
        if let Decoder::Kl(vae) = &decoder
            && let Some(scaling) = vae.config.scaling.filter(|s| ![0.13025, 0.18215].contains(s))
        {
            eprintln!("note: the autoencoder states a scale of {scaling}; PixArt-Σ has 0.13025, PixArt-α 0.18215");
        }
        laps.end("weights");
        let bar = progress::bar(1, "decode");
        let decoded = decoder.decode(latents, self.args.run.dtype.into(), &mut |done, all| {
            laps.end("part");
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        });
        bar.finish_and_clear();
        let decoded = decoded?;
        Ok(decoded)
    }
}
