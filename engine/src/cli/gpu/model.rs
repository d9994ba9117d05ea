//! The forward pass of a DiT with random weights on a GPU, by the device's own clock.

use crate::autograd::{Graph, Precision, Var};
use crate::backend;
use crate::cli::out;
use crate::error::Result;
use crate::models::dit::{Dit, DitConfig, Run};
use crate::tensor::{DType, Tensor};
use serde_json::json;
use std::time::Duration;

/// Images of a batch: one with its label and one without, as guidance has them.
const BATCH: usize = 2;

/// Measures the model called `size`, as `DiT-XL/2`, at 256² pixels.
pub fn run(size: &str, json: bool) -> Result<()> {
    let config = DitConfig::named(size)?;
    let device = backend::open_as("cuda", DType::F32)?;
    let side = config.input_size;
    let shape = [BATCH, config.in_channels, side, side];
    let model = Dit::new(config, &device, 1)?;
    let x = Var::constant(Tensor::from_f32(&device, &shape, &vec![0.5; shape.iter().product()])?);
    let (t, y) = (Tensor::from_f32(&device, &[BATCH], &[500.0; BATCH])?, Tensor::from_i32(&device, &[BATCH], &[1, 2])?);
    let graph = Graph::inference(Precision::F32);
    let mut forward = || model.forward(&graph, &x, &t, &y, Run::default()).map(drop);
    let mut times = device.time(20, Duration::from_secs(30), &mut forward)?;
    times.sort_by(f64::total_cmp);
    let row = json!({ "model": size, "pass": "forward", "batch": BATCH, "element": "f32", "device": device.describe(), "ms": times[times.len() / 2], "ms_min": times[0], "samples": times.len() });
    let text = format!("{size}: {:.3} ms a forward pass of {BATCH} images", times[times.len() / 2]);
    out::line(if json { row.to_string() } else { text })
}
