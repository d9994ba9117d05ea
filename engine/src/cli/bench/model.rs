//! Whole DiT models with random weights: forward passes, training steps, and sampling, over what is varied.
//!
//! Lists of `--batch`, `--pixels` and `--grafted` are gone through in all combinations, a row each, so that a page can
//! show how cost grows.

use super::{Keep, Subject, ceilings, finish, show};
use crate::autograd::{Graph, Precision, Var};
use crate::backend::{self, Device};
use crate::error::{Error, Result};
use crate::graft::cost::Counter;
use crate::models::dit::{self, Dit, DitConfig, Run};
use crate::nn::operators::Spec;
use crate::ops::contracts::loss_regression;
use crate::report::bench::Row;
use crate::sample::pipeline::{self, Request};
use crate::tensor::{DType, Tensor};
use crate::train::optimizer::{AdamW, AdamWSettings};
use std::time::Duration;

/// Time after which a model on the host takes no further sample.
const PATIENCE: Duration = Duration::from_secs(20);
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
    /// Published size, as DiT-XL/2.
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
    let mut rows = ceilings(&device, json)?;
    for &pixels in &args.pixels {
        for &grafted in &args.grafted {
            let config = config(args, pixels, grafted)?;
            for &batch in &args.batch {
                let row = measure(args, work, &device, precision, config.clone(), batch, grafted)?;
                show(&row, json)?;
                rows.push(row);
            }
        }
    }
    finish(rows, &args.keep, json)
}

/// The model at a resolution with a share of its layers grafted, evenly spread.
fn config(args: &Args, pixels: usize, grafted: f64) -> Result<DitConfig> {
    let mut config = DitConfig::named(&args.size)?;
    let unit = PIXELS * config.patch;
    if pixels == 0 || !pixels.is_multiple_of(unit) {
        return Err(Error::usage("--pixels", "no such resolution").is(pixels).must(format!("a multiple of {unit}")));
    }
    if !(0.0..=100.0).contains(&grafted) {
        return Err(Error::usage("--grafted", "no share of the layers").is(grafted).must("0 to 100 percent"));
    }
    config.input_size = pixels / PIXELS;
    let depth = config.blocks.len();
    let count = (grafted / 100.0 * depth as f64).round() as usize;
    for i in 0..count {
        config.blocks[i * depth / count].attn = Spec::new(&args.operator);
    }
    Ok(config)
}

fn measure(
    args: &Args,
    work: Work,
    device: &Device,
    precision: Precision,
    config: DitConfig,
    batch: usize,
    grafted: f64,
) -> Result<Row> {
    if batch == 0 {
        return Err(Error::usage("--batch", "nothing to run").is(0).must("at least 1"));
    }
    let flops = Counter::new(&config).model()?.flops * batch as f64;
    let (tokens, classes) = (config.tokens() as f64, config.classes);
    let mut model = Dit::new(config, device, 1)?;
    if work != Work::TrainingStep && device.element() == DType::BF16 {
        dit::to_bf16(&mut model)?;
        device.trim();
    }
    device.reset_peak();
    let times = match work {
        Work::Forward => forward(args, device, precision, &model, batch)?,
        Work::TrainingStep => training(args, device, precision, model, batch)?,
        Work::Sampling => {
            let labels = (0..batch).map(|i| (i % classes) as i32).collect();
            let request = Request { steps: args.steps, batch, precision, ..Request::new(labels, 0) };
            let mut image = || pipeline::generate(&model, &request, &mut |_| {}).map(drop);
            device.time(args.samples, PATIENCE, &mut image)?
        }
    };
    let (bench, words, passes) = match work {
        Work::Forward => ("model", "forward".to_string(), 1.0),
        // A backward pass is two products for each of the forward pass.
        Work::TrainingStep => ("train", "training step".to_string(), 3.0),
        // Guidance runs every image with its label and without.
        Work::Sampling => ("e2e", format!("{} DDIM steps with guidance", args.steps), 2.0 * args.steps as f64),
    };
    let element = if precision == Precision::Bf16 { DType::BF16 } else { DType::F32 };
    let mut row = Subject { bench, case: args.size.clone(), work: words }.row(device, element, times);
    row.flops = Some(passes * flops);
    row.peak_bytes = Some(device.memory().peak as u64);
    for (name, value) in [("batch", batch as f64), ("tokens", tokens), ("percent grafted", grafted)] {
        row.axes.insert(name.to_string(), value);
    }
    Ok(row)
}

/// Inputs of a batch: noise, times and labels.
fn inputs(device: &Device, model: &Dit, batch: usize) -> Result<(Tensor, Tensor, Tensor)> {
    let c = &model.config;
    let shape = [batch, c.in_channels, c.input_size, c.input_size];
    let x = Tensor::from_f32(device, &shape, &vec![0.5; shape.iter().product()])?;
    let labels: Vec<i32> = (0..batch).map(|i| (i % c.classes) as i32).collect();
    Ok((x, Tensor::from_f32(device, &[batch], &vec![500.0; batch])?, Tensor::from_i32(device, &[batch], &labels)?))
}

fn forward(args: &Args, device: &Device, precision: Precision, model: &Dit, batch: usize) -> Result<Vec<f64>> {
    let (x, t, y) = inputs(device, model, batch)?;
    let (x, graph) = (Var::constant(x), Graph::inference(precision));
    device.time(args.samples, PATIENCE, &mut || model.forward(&graph, &x, &t, &y, Run::default()).map(drop))
}

fn training(args: &Args, device: &Device, precision: Precision, mut model: Dit, batch: usize) -> Result<Vec<f64>> {
    let (x, t, y) = inputs(device, &model, batch)?;
    let settings = AdamWSettings::PLAIN;
    let mut optimiser = AdamW::new(settings, &model.params)?;
    let flat = [batch, model.config.out_channels(), x.dim(2) * x.dim(3)];
    let target = Tensor::zeros(device, &flat)?;
    let mut step = || {
        let grads = {
            let g = Graph::training(precision);
            let out = model.forward(&g, &Var::constant(x.clone()), &t, &y, Run::default())?;
            let (out, target) = (g.reshape(&out, &flat)?, Var::constant(target.clone()));
            let loss = g.loss_regression(&out, &target, loss_regression::Params { kind: 1, delta: 1.0 })?;
            g.backward(&loss)?
        };
        optimiser.update(&mut model.params, &grads, settings.lr)
    };
    device.time(args.samples, PATIENCE, &mut || step().map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(words: &[&str]) -> Args {
        Line::parse_from([&["bench"], words].concat()).args
    }

    #[test]
    fn layers_are_grafted_evenly() {
        let found = config(&args(&["DiT-S/2"]), 256, 50.0).unwrap();
        let grafted: Vec<usize> = (0..12).filter(|&i| found.blocks[i].attn == Spec::new("hyena_x")).collect();
        assert_eq!(grafted, [0, 2, 4, 6, 8, 10]);
        let all = config(&args(&["DiT-S/2"]), 512, 100.0).unwrap();
        assert!(all.blocks.iter().all(|b| b.attn == Spec::new("hyena_x")) && all.tokens() == 1024);
        for (pixels, percent) in [(100, 0.0), (256, 101.0), (0, 0.0)] {
            assert!(config(&args(&["DiT-S/2"]), pixels, percent).is_err());
        }
    }

    #[test]
    fn every_work_gives_a_row_with_its_axes() {
        let args = args(&["DiT-S/8", "--samples", "1", "--steps", "1"]);
        for work in [Work::Forward, Work::TrainingStep, Work::Sampling] {
            let config = config(&args, 64, 0.0).unwrap();
            let row = measure(&args, work, &Device::cpu(), Precision::F32, config, 2, 0.0).unwrap();
            assert!(row.ms > 0.0 && row.flops.unwrap() > 0.0 && row.peak_bytes.unwrap() > 0, "{row:?}");
            assert_eq!((row.axes["batch"], row.axes["tokens"]), (2.0, 1.0));
        }
    }
}
