//! Whole models with random weights: forward passes, training steps, and sampling, over what is varied.
//!
//! Lists of `--batch`, `--pixels` and `--grafted` are gone through in all combinations, a row each, so that a page can
//! show how cost grows.

use super::{Keep, PATIENCE_MODEL, Subject, ceilings, layers, text_model};
use crate::autograd::{Graph, Precision, Var};
use crate::backend::{self, Device};
use crate::error::{Error, Result};
use crate::graft::cost::Counter;
use crate::graft::select::PAPER_PIXART;
use crate::models::dit::{self, Dit, DitConfig};
use crate::models::pixart::{self, Keys, PixArt, PixArtConfig, Text};
use crate::models::sites::{Observer, SiteConfig};
use crate::nn::operators::Spec;
use crate::ops::contracts::loss_regression;
use crate::report::bench::Row;
use crate::sample::pipeline::{self, Request};
use crate::tensor::{DType, Tensor};
use crate::train::optimizer::{AdamW, AdamWSettings};
use std::time::Instant;

/// What rows call the text-to-image model.
const PIXART: &str = "PixArt-Σ";
/// Text tokens of a measured PixArt.
const TEXT_TOKENS: usize = 300;
/// Pixels of an image along a side for each latent of the published autoencoder.
const PIXELS: usize = 8;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// One forward pass, nothing recorded.
    Forward,
    /// Forward, backward and one AdamW update.
    TrainingStep,
    /// All steps of a sampler, with guidance.
    Sampling,
}

/// Arguments of `model`, `train` and `e2e`.
#[derive(clap::Args)]
pub struct Args {
    /// Published size, as DiT-XL/2 or PixArt-Σ (also pixart-sigma).
    #[arg(default_value = "DiT-S/2")]
    size: String,
    /// cpu or cuda.
    #[arg(long, default_value = "cpu")]
    backend: String,
    /// Arithmetic of the products on the CPU: f32 or bf16.
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Images of a batch.
    #[arg(long, value_delimiter = ',', default_value = "1")]
    batch: Vec<usize>,
    /// Pixels along a side; tokens follow.
    #[arg(long, value_delimiter = ',', default_value = "256")]
    pixels: Vec<usize>,
    /// Percent of the layers whose attention is replaced.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    grafted: Vec<f64>,
    /// The operator that replaces it.
    #[arg(long, default_value = "hyena_x")]
    operator: String,
    /// Blocks; as many as published where it is not given.
    #[arg(long)]
    depth: Option<usize>,
    /// Also a row for every operator of every layer of a forward pass, on the CPU.
    #[arg(long)]
    layers: bool,
    /// Steps of e2e.
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Measurements of each.
    #[arg(long, default_value_t = 5)]
    samples: usize,
    #[command(flatten)]
    keep: Keep,
}

/// Runs the command.
pub fn run(args: &Args, work: Work, json: bool) -> Result<()> {
    let precision = match args.dtype.as_str() {
        "f32" => Precision::F32,
        "bf16" => Precision::Bf16,
        other => return Err(Error::usage("--dtype", "unknown type").is(format!("{other:?}")).must("f32 or bf16")),
    };
    let device = backend::open_as(&args.backend, precision.into())?;
    let mut rows = args.keep.open(json)?;
    ceilings::measure(&device, precision, &mut rows)?;
    for &pixels in &args.pixels {
        for &grafted in &args.grafted {
            let sizes = sizes(args, pixels, grafted)?;
            for &batch in &args.batch {
                let found = measure(args, work, &device, precision, &sizes, batch, grafted, &rows.rows)?;
                found.into_iter().try_for_each(|row| rows.put(row))?;
            }
        }
    }
    rows.finish()
}

/// Sizes of a model.
#[derive(Clone, Debug)]
enum Sizes {
    Dit(DitConfig),
    Text(PixArtConfig),
}

/// The model at a resolution with a share of its layers grafted, evenly spread; half of PixArt's are the paper's.
fn sizes(args: &Args, pixels: usize, grafted: f64) -> Result<Sizes> {
    let text = is_text(&args.size);
    let mut sizes = match text {
        false => Sizes::Dit(DitConfig::named(&args.size)?),
        true => Sizes::Text(PixArtConfig::sigma_xl(512)?),
    };
    let patch = match &sizes {
        Sizes::Dit(c) => c.patch,
        Sizes::Text(c) => c.patch,
    };
    let unit = PIXELS * patch;
    if pixels == 0 || !pixels.is_multiple_of(unit) {
        return Err(Error::usage("--pixels", "no such resolution").is(pixels).must(format!("a multiple of {unit}")));
    }
    if !(0.0..=100.0).contains(&grafted) {
        return Err(Error::usage("--grafted", "no share of the layers").is(grafted).must("0 to 100 percent"));
    }
    let blocks = match &mut sizes {
        Sizes::Dit(c) => {
            c.input_size = pixels / PIXELS;
            &mut c.blocks
        }
        Sizes::Text(c) => {
            (c.sample_size, c.interpolation) = (pixels / PIXELS, pixels as f64 / 512.0);
            &mut c.blocks
        }
    };
    if let Some(depth) = args.depth {
        if depth == 0 || depth > blocks.len() {
            let must = format!("1 to {}", blocks.len());
            return Err(Error::usage("--depth", "no such number of blocks").is(depth).must(must));
        }
        blocks.truncate(depth);
    }
    let depth = blocks.len();
    let count = (grafted / 100.0 * depth as f64).round() as usize;
    let layers: Vec<usize> = match text && depth == 2 * PAPER_PIXART.len() && count == PAPER_PIXART.len() {
        true => PAPER_PIXART.to_vec(),
        false => (0..count).map(|i| i * depth / count).collect(),
    };
    layers.into_iter().for_each(|i| blocks[i].attn = Spec::new(&args.operator));
    Ok(sizes)
}

fn is_text(size: &str) -> bool {
    [PIXART, "pixart-sigma", "PixArt-Sigma"].contains(&size)
}

/// FLOPs of a sample and tokens of a model.
fn costs<C: SiteConfig>(config: &C) -> Result<(f64, f64)> {
    Ok((Counter::new(config).model()?.flops, config.dims().tokens() as f64))
}

/// A model with everything that a forward pass reads besides the noisy latents.
pub enum Subjected {
    /// Times and labels.
    Dit(Dit, Tensor, Tensor),
    /// Times, and keys and values of the texts: they are made once for an image.
    Text(PixArt, Tensor, Keys),
}

impl Subjected {
    fn new(sizes: &Sizes, device: &Device, precision: Precision, work: Work, batch: usize) -> Result<Subjected> {
        // Inference stores its weights as it multiplies them; training keeps them in f32.
        let bf16 = precision == Precision::Bf16 && work != Work::TrainingStep;
        let t = Tensor::from_f32(device, &[batch], &vec![500.0; batch])?;
        match sizes {
            Sizes::Dit(config) => {
                let labels: Vec<i32> = (0..batch).map(|i| (i % config.classes) as i32).collect();
                let mut model = Dit::new(config.clone(), device, 1)?;
                if bf16 {
                    dit::to_bf16(&mut model)?;
                    device.trim();
                }
                Ok(Subjected::Dit(model, t, Tensor::from_i32(device, &[batch], &labels)?))
            }
            Sizes::Text(config) => {
                let shape = [batch, TEXT_TOKENS, config.caption_channels];
                let features = Tensor::from_f32(device, &shape, &vec![0.5; shape.iter().product()])?;
                let model = PixArt::random_in(config.clone(), device, 1, bf16)?;
                let g = Graph::inference(precision);
                let text = Text::new(&g, &Var::constant(features), None)?;
                let keys = model.keys(&g, &text)?;
                drop(g);
                Ok(Subjected::Text(model, t, keys))
            }
        }
    }

    /// A forward pass.
    ///
    /// # Errors
    /// When memory runs out, and those of the observer.
    pub fn forward<'m>(&'m self, g: &Graph<'m>, x: &Var, observer: Option<&mut Observer<'_>>) -> Result<Var> {
        match (self, observer) {
            (Subjected::Dit(model, t, y), observer) => {
                model.forward_observed(g, x, t, y, dit::Run::default(), observer)
            }
            (Subjected::Text(model, t, keys), None) => model.forward(g, x, t, keys, None, pixart::Run::default()),
            (Subjected::Text(model, t, keys), Some(observer)) => model.forward_observed(g, x, t, keys, None, observer),
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn measure(
    args: &Args,
    work: Work,
    device: &Device,
    precision: Precision,
    sizes: &Sizes,
    batch: usize,
    grafted: f64,
    ceilings: &[Row],
) -> Result<Vec<Row>> {
    if batch == 0 {
        return Err(Error::usage("--batch", "nothing to run").is(0).must("at least 1"));
    }
    let ((flops, tokens), shape) = match sizes {
        Sizes::Dit(c) => (costs(c)?, [batch, c.in_channels, c.input_size, c.input_size]),
        Sizes::Text(c) => (costs(c)?, [batch, c.in_channels, c.sample_size, c.sample_size]),
    };
    let model = Subjected::new(sizes, device, precision, work, batch)?;
    let x = Var::constant(Tensor::from_f32(device, &shape, &vec![0.5; shape.iter().product()])?);
    let size = if is_text(&args.size) { PIXART } else { args.size.as_str() };
    let case = args.depth.map_or(size.to_string(), |depth| format!("{size}, {depth} blocks"));
    device.reset_peak();
    let mut rows = Vec::new();
    if args.layers && work == Work::Forward {
        rows = layers::measure(device, precision, &model, &x, &case, ceilings)?;
        device.reset_peak();
    }
    let mut shortcut = None;
    let times = match (work, model) {
        (Work::Forward, model) => {
            if let (Subjected::Text(model, ..), 2) = (&model, batch) {
                shortcut = Some(text_model::guided_pair(model, precision, TEXT_TOKENS, args.samples)?);
            }
            let graph = Graph::inference(precision);
            device.time(args.samples, PATIENCE_MODEL, &mut || model.forward(&graph, &x, None).map(drop))?
        }
        (Work::TrainingStep, Subjected::Dit(model, t, y)) => {
            training(args, device, precision, model, [x.tensor(), &t, &y])?
        }
        (Work::Sampling, Subjected::Dit(model, ..)) => {
            let labels = (0..batch).map(|i| (i % model.config.classes) as i32).collect();
            let request = Request { steps: args.steps, batch, precision, ..Request::new(labels, 0) };
            let mut image = || pipeline::generate(&model, &request, &mut |_| {}).map(drop);
            paced(device, args.samples, &mut image)?
        }
        (Work::Sampling, Subjected::Text(model, ..)) => {
            text_model::pictures(&model, precision, [TEXT_TOKENS, args.steps, batch], args.samples)?
        }
        (Work::TrainingStep, Subjected::Text(..)) => {
            return Err(Error::usage("size", "no training of PixArt-Σ is measured").must("a DiT, as DiT-XL/2"));
        }
    };
    let (bench, words, passes) = match work {
        Work::Forward => ("model", "forward".to_string(), 1.0),
        // A backward pass is two products for each of the forward pass.
        Work::TrainingStep => ("train", "training step".to_string(), 3.0),
        // Guidance runs every image with its label and without.
        Work::Sampling if is_text(&args.size) => ("e2e", format!("{} steps", args.steps), 2.0 * args.steps as f64),
        Work::Sampling => ("e2e", format!("{} DDIM steps with guidance", args.steps), 2.0 * args.steps as f64),
    };
    let element = DType::from(precision);
    let pair = shortcut.map(|times| ("forward, null text of one token".to_string(), times));
    for (work, times) in std::iter::once((words, times)).chain(pair) {
        let mut row = Subject { bench, case: case.clone(), work }.row(device, element, times);
        row.flops = Some(passes * flops * batch as f64);
        row.peak_bytes = Some(device.memory().peak as u64);
        rows.push(row);
    }
    for row in &mut rows {
        for (name, value) in [("batch", batch as f64), ("tokens", tokens), ("percent grafted", grafted)] {
            row.axes.insert(name.to_string(), value);
        }
    }
    Ok(rows)
}

fn training(
    args: &Args,
    device: &Device,
    precision: Precision,
    mut model: Dit,
    [x, t, y]: [&Tensor; 3],
) -> Result<Vec<f64>> {
    let settings = AdamWSettings::PLAIN;
    let mut optimiser = AdamW::new(settings, &model.params)?;
    let flat = [x.dim(0), model.config.out_channels(), x.dim(2) * x.dim(3)];
    let target = Tensor::zeros(device, &flat)?;
    let mut step = || {
        let grads = {
            let g = Graph::training(precision);
            let out = model.forward(&g, &Var::constant(x.clone()), t, y, dit::Run::default())?;
            let (out, target) = (g.reshape(&out, &flat)?, Var::constant(target.clone()));
            let loss = g.loss_regression(&out, &target, loss_regression::Params { kind: 1, delta: 1.0 })?;
            g.backward(&loss)?
        };
        optimiser.update(&mut model.params, &grads, settings.lr)
    };
    paced(device, args.samples, &mut || step().map(drop))
}

/// Milliseconds of long work from its first launch to its end by the host's clock, as a user waits for it. It reads
/// results and changes its own inputs, so no graph of a GPU can hold it.
pub(super) fn paced(device: &Device, samples: usize, work: &mut dyn FnMut() -> Result<()>) -> Result<Vec<f64>> {
    if device.is_host() {
        return device.time(samples, PATIENCE_MODEL, work);
    }
    work()?;
    device.synchronize()?;
    let mut times = Vec::new();
    for _ in 0..samples.max(1) {
        let begun = Instant::now();
        work()?;
        device.synchronize()?;
        times.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::bench::LAYER;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(words: &[&str]) -> Args {
        Line::parse_from([&["bench"], words].concat()).args
    }

    fn blocks(sizes: &Sizes) -> &[dit::BlockSpec] {
        match sizes {
            Sizes::Dit(c) => &c.blocks,
            Sizes::Text(c) => &c.blocks,
        }
    }

    #[test]
    fn layers_are_grafted_evenly() {
        let found = sizes(&args(&["DiT-S/2"]), 256, 50.0).unwrap();
        let grafted: Vec<usize> = (0..12).filter(|&i| blocks(&found)[i].attn == Spec::new("hyena_x")).collect();
        assert_eq!(grafted, [0, 2, 4, 6, 8, 10]);
        let all = sizes(&args(&["pixart-sigma", "--depth", "3"]), 512, 100.0).unwrap();
        assert!(blocks(&all).len() == 3 && blocks(&all).iter().all(|b| b.attn == Spec::new("hyena_x")));
        for (pixels, percent) in [(100, 0.0), (256, 101.0), (0, 0.0)] {
            assert!(sizes(&args(&["DiT-S/2"]), pixels, percent).is_err());
        }
        assert!(sizes(&args(&["DiT-S/2", "--depth", "13"]), 256, 0.0).is_err());
    }

    fn rows(words: &[&str], work: Work) -> Result<Vec<Row>> {
        let args = args(&[words, &["--samples", "1", "--steps", "1"]].concat());
        let sizes = sizes(&args, 64, 0.0)?;
        measure(&args, work, &Device::cpu(), Precision::F32, &sizes, 2, 0.0, &[])
    }

    #[test]
    fn every_work_gives_a_row_with_its_axes() {
        for work in [Work::Forward, Work::TrainingStep, Work::Sampling] {
            let rows = rows(&["DiT-S/8"], work).unwrap();
            let [row] = &rows[..] else { panic!("{rows:?}") };
            assert!(row.ms > 0.0 && row.flops.unwrap() > 0.0 && row.peak_bytes.unwrap() > 0, "{row:?}");
            assert_eq!((row.axes["batch"], row.axes["tokens"]), (2.0, 1.0));
        }
    }

    #[test]
    fn every_operator_of_every_layer_has_a_row() {
        let rows = rows(&["DiT-S/8", "--depth", "2", "--layers"], Work::Forward).unwrap();
        let layers: Vec<f64> = rows.iter().filter(|r| r.bench == LAYER).map(|r| r.axes[LAYER]).collect();
        assert!([0.0, 1.0, 2.0, 3.0].iter().all(|l| layers.contains(l)), "{layers:?}");
        let of = |layer: f64| -> Vec<&str> {
            let of = rows.iter().filter(|r| r.bench == LAYER && r.axes[LAYER] == layer);
            of.map(|r| r.work.as_str()).collect()
        };
        assert_eq!(of(1.0), of(2.0));
        assert!(of(1.0).contains(&"attention") && of(0.0).contains(&"patchify") && of(3.0).contains(&"unpatchify"));
        let (parts, whole) = (rows.iter().filter(|r| r.bench == LAYER), rows.last().unwrap());
        // What the operators need together is what the model is counted with, to what streams compute.
        let flops: f64 = parts.filter_map(|r| r.flops).sum();
        assert!((0.95..1.3).contains(&(flops / whole.flops.unwrap())), "{flops} {whole:?}");
    }

    #[test]
    fn a_text_model_is_measured_forward_and_refused_elsewhere() {
        let words = ["PixArt-Σ", "--depth", "1"];
        let found = rows(&words, Work::Forward).unwrap();
        assert_eq!((found[0].case.as_str(), found[0].axes["tokens"]), ("PixArt-Σ, 1 blocks", 16.0));
        assert_eq!(found[1].work, "forward, null text of one token");
        assert!(rows(&words, Work::TrainingStep).is_err());
        let whole = sizes(&args(&["PixArt-Σ"]), 2048, 50.0).unwrap();
        let grafted: Vec<usize> = (0..28).filter(|&i| blocks(&whole)[i].attn == Spec::new("hyena_x")).collect();
        assert_eq!(grafted, PAPER_PIXART);
    }
}
