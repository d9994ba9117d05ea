//! The forward pass of a DiT with random weights on a GPU, by the device's own clock.

use crate::autograd::{Graph, Precision, Var};
use crate::backend;
use crate::cli::out;
use crate::error::Result;
use crate::models::dit::{self, Dit, DitConfig, Run};
use crate::tensor::{DType, Tensor};
use serde_json::json;
use std::time::Duration;

/// Images of a batch: one with its label and one without, as guidance has them.
const BATCH: usize = 2;

/// Measures the model called `size`, as `DiT-XL/2`, at 256² pixels, in either working type.
pub fn run(size: &str, json: bool) -> Result<()> {
    [Precision::F32, Precision::Bf16].into_iter().try_for_each(|precision| measure(size, precision, json))
}

fn measure(size: &str, precision: Precision, json: bool) -> Result<()> {
    let (config, element) = (DitConfig::named(size)?, DType::from(precision));
    let device = backend::open_as("cuda", element)?;
    let side = config.input_size;
    let shape = [BATCH, config.in_channels, side, side];
    let mut model = Dit::new(config, &device, 1)?;
    dit::to_bf16(&mut model)?;
    let x = Var::constant(Tensor::from_f32(&device, &shape, &vec![0.5; shape.iter().product()])?);
    let (t, y) = (Tensor::from_f32(&device, &[BATCH], &[500.0; BATCH])?, Tensor::from_i32(&device, &[BATCH], &[1, 2])?);
    let graph = Graph::inference(precision);
    let mut forward = || model.forward(&graph, &x, &t, &y, Run::default()).map(drop);
    let mut times = device.time(20, Duration::from_secs(30), &mut forward)?;
    times.sort_by(f64::total_cmp);
    let row = json!({ "model": size, "pass": "forward", "batch": BATCH, "element": element.to_string(), "device": device.describe(), "ms": times[times.len() / 2], "ms_min": times[0], "samples": times.len() });
    let text = format!("{size} in {element}: {:.3} ms a forward pass of {BATCH} images", times[times.len() / 2]);
    out::line(if json { row.to_string() } else { text })
}
