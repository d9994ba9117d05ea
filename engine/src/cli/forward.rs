//! `graft forward`: one forward pass on tensors from a file.

use super::model_args::{Channels, ModelArgs};
use super::out;
use crate::autograd::{Graph, Var};
use crate::error::{Error, Result};
use crate::io::atomic;
use crate::io::safetensors::{self, TensorFile, TensorRecord, TensorView};
use crate::models::dit::Run;
use crate::sample::cfg;
use crate::tensor::Tensor;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// safetensors file with `x [B, C, S, S]`, `t [B]`, `y [B]`.
    #[arg(long, value_name = "FILE")]
    inputs: PathBuf,
    /// safetensors file to write `output [B, out_channels, S, S]` to.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Guide: the batch holds labelled images, then null-labelled ones; the first half's x serves both.
    #[arg(long, visible_aliases = ["guidance-scale", "guidance"], value_name = "S", allow_hyphen_values = true)]
    cfg_scale: Option<f64>,
    /// Channels that are guided: a number, or all; the first three where not given.
    #[arg(long, value_name = "N|all")]
    cfg_channels: Option<Channels>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    if let Some(folder) = args.output.parent().filter(|p| !p.as_os_str().is_empty()) {
        atomic::ensure_writable_dir(folder)?;
    }
    let model = args.model.load()?;
    let file = TensorFile::open(&args.inputs)?;
    let device = model.device();
    let floats = |name: &str| -> Result<Tensor> {
        let view = tensor(&file, name)?;
        Tensor::from_f32(device, view.shape, &view.to_f32()?)
    };
    let (x, t) = (floats("x")?, floats("t")?);
    let view = tensor(&file, "y")?;
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
    let g = Graph::inference(args.model.dtype.into());
    let result = match args.cfg_scale {
        None => model.forward(&g, &Var::constant(x), &t, &y, run)?.into_tensor(),
        Some(scale) => {
            let channels = args
                .cfg_channels
                .map_or_else(|| cfg::default_channels(&model.config), |c| c.count(model.config.in_channels));
            cfg::forward(&model, &g, &x, &t, &y, run, scale, channels)?
        }
    };
    let shape = result.shape();
    safetensors::write(&args.output, [TensorRecord::f32("output", shape.dims(), result.values()?)], &BTreeMap::new())?;
    out::line(format!("output {shape} in {}", args.output.display()))
}

fn tensor<'a>(file: &'a TensorFile, name: &str) -> Result<TensorView<'a>> {
    file.get(name).ok_or_else(|| {
        Error::failure(format!("{}: {name}", file.place()), "missing tensor").must("present: inputs are x, t and y")
    })
}
