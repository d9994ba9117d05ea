//! `graft forward`: one forward pass on tensors from a file.

use super::model_args::{Channels, ModelArgs};
use super::{Dtype, out};
use crate::autograd::{Graph, Var};
use crate::error::{Error, Result};
use crate::io::atomic;
use crate::io::safetensors::{self, TensorFile, TensorRecord, TensorView};
use crate::models::dit::Run;
use crate::models::{component, pixart};
use crate::sample::cfg;
use crate::tensor::{Device, Tensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// safetensors file with `x [B, C, H, W]`, `t [B]`, and `y [B]`, or `text [B, T, C]` and `text_mask [B, T]`.
    #[arg(long, value_name = "FILE")]
    inputs: PathBuf,
    /// safetensors file to write `output [B, out_channels, H, W]` to.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Guide: the batch holds labelled images or prompts, then null ones; the first half's x serves both.
    #[arg(long, visible_aliases = ["guidance-scale", "guidance"], value_name = "S", allow_hyphen_values = true)]
    cfg_scale: Option<f64>,
    /// Channels that are guided: a number, or all; where not given the first three, and all of a model that reads text.
    #[arg(long, value_name = "N|all")]
    cfg_channels: Option<Channels>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    if let Some(folder) = args.output.parent().filter(|p| !p.as_os_str().is_empty()) {
        atomic::ensure_writable_dir(folder)?;
    }
    let file = TensorFile::open(&args.inputs)?;
    let folder = component(&args.model.model, "transformer");
    // What is wrong with a model that cannot be opened is said by who loads it.
    let reads_text = pixart::is_pixart(&folder).unwrap_or(false);
    let result = if reads_text { from_text(args, &folder, &file)? } else { from_labels(args, &file)? };
    let shape = result.shape();
    safetensors::write(&args.output, [TensorRecord::f32("output", shape.dims(), result.values()?)], &BTreeMap::new())?;
    out::line(format!("output {shape} in {}", args.output.display()))
}

/// A model that reads labels.
fn from_labels(args: &Args, file: &TensorFile) -> Result<Tensor> {
    let model = args.model.load()?;
    let device = model.device();
    let (x, t) = (floats(file, device, "x")?, floats(file, device, "t")?);
    let view = tensor(file, "y")?;
    let out_of_range = |label: i64| {
        Error::failure(view.place(), "class out of range")
            .is(label)
            .must(format!("0 to {} (null)", model.config.classes))
    };
    let convert = |label: i64| match i32::try_from(label) {
        Ok(small) if small >= 0 && small as usize <= model.config.classes => Ok(small),
        _ => Err(out_of_range(label)),
    };
    let labels: Vec<i32> = view.to_i64()?.into_iter().map(convert).collect::<Result<_>>()?;
    let y = Tensor::from_i32(device, view.shape, &labels)?;
    let run = Run { semantics: args.model.semantics(&model), checkpoint: false };
    let g = Graph::inference(args.model.run.dtype.into());
    match args.cfg_scale {
        None => Ok(model.forward(&g, &Var::constant(x), &t, &y, run)?.into_tensor()),
        Some(scale) => {
            let channels = args
                .cfg_channels
                .map_or_else(|| cfg::default_channels(&model.config), |c| c.count(model.config.in_channels));
            cfg::forward(&model, &g, &x, &t, &y, run, scale, channels)
        }
    }
}

/// A model that reads text features.
fn from_text(args: &Args, folder: &Path, file: &TensorFile) -> Result<Tensor> {
    let device = args.model.run.device()?;
    let model = pixart::load(folder, &device, args.model.run.dtype == Dtype::Bf16)?;
    let (mut x, t, text) = (floats(file, &device, "x")?, floats(file, &device, "t")?, floats(file, &device, "text")?);
    let mask = match file.get("text_mask") {
        None => None,
        Some(view) => Some(view.to_i64()?.into_iter().map(|m| i32::from(m != 0)).collect::<Vec<i32>>()),
    };
    let micro = match (file.get("resolution"), file.get("aspect_ratio")) {
        (None, None) => None,
        _ => {
            let aspect = floats(file, &device, "aspect_ratio")?;
            let aspect = aspect.reshape(&[aspect.len()])?;
            Some(pixart::MicroConditions { size: floats(file, &device, "resolution")?, aspect })
        }
    };
    if args.cfg_scale.is_some() {
        if !x.dim(0).is_multiple_of(2) {
            return Err(Error::failure("guidance: x", "odd batch")
                .is(x.dim(0))
                .must("prompted and null halves of one size"));
        }
        cfg::repeat_first_half(&mut x)?;
    }
    let semantics =
        if args.model.run.as_diffusers() { pixart::Semantics::Diffusers } else { pixart::Semantics::Original };
    let g = Graph::inference(args.model.run.dtype.into());
    let keys = model.keys(&g, &pixart::Text::new(&g, &Var::constant(text), mask.as_deref())?)?;
    let run = pixart::Run { semantics, checkpoint: false };
    let mut out = model.forward(&g, &Var::constant(x), &t, &keys, micro.as_ref(), run)?.into_tensor();
    if let Some(scale) = args.cfg_scale {
        let channels = args.cfg_channels.map_or(model.config.out_channels, |c| c.count(model.config.in_channels));
        cfg::combine(&mut out, scale, channels)?;
    }
    Ok(out)
}

fn floats(file: &TensorFile, device: &Device, name: &str) -> Result<Tensor> {
    let view = tensor(file, name)?;
    Tensor::from_f32(device, view.shape, &view.to_f32()?)
}

fn tensor<'a>(file: &'a TensorFile, name: &str) -> Result<TensorView<'a>> {
    file.get(name).ok_or_else(|| {
        Error::failure(format!("{}: {name}", file.place()), "missing tensor")
            .must("present: inputs are x, t and y, or x, t, text and text_mask")
    })
}
