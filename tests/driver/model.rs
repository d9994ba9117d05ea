//! A whole model through the backend: sampling and training, beside the CPU.

use super::Row;
use super::child::text;
use super::lab::{Lab, same};
use graft_engine::autograd::Precision;
use graft_engine::backend::{self, Device};
use graft_engine::io::datasets::ImageSet;
use graft_engine::models::dit::{Dit, DitConfig};
use graft_engine::sample::pipeline::{Request, generate};
use graft_engine::train::batches::Batches;
use graft_engine::train::optimizer::AdamWSettings;
use graft_engine::train::trainer::{LoopSettings, Trainer};
use graft_kernels::check::{Tolerance, compare};

pub const ROWS: &[Row] = &[("sampling and training of a model", model)];

pub const PARTS: &[super::child::Part] = &[("sample", sample), ("train", train)];

fn model(lab: &Lab) -> Result<(), String> {
    for part in ["sample", "train"] {
        let said = lab.done(part, &[])?;
        // Everything small comes out of one segment.
        same(&format!("allocations of {part}"), said.count("allocate"), 1)?;
    }
    Ok(())
}

fn config() -> DitConfig {
    DitConfig { patch: 2, input_size: 8, in_channels: 3, classes: 4, ..DitConfig::plain(2, 32, 4) }
}

/// The CPU and the device.
fn devices() -> Result<[Device; 2], String> {
    Ok([Device::cpu(), text(backend::open("cuda"))?])
}

fn near(what: &str, got: &[f32], want: &[f32]) -> Result<(), String> {
    let result = compare(got, want, Tolerance { atol: 1e-3, rtol: 1e-3, rms: 1e-4 });
    if result.pass { Ok(()) } else { Err(format!("{what}: {result:?}")) }
}

fn sample() -> Result<(), String> {
    let mut images = Vec::new();
    for device in devices()? {
        let model = text(Dit::new(config(), &device, 1))?;
        let request = Request {
            sampler: text("ddim".parse())?,
            steps: 2,
            guidance: 3.0,
            precision: Precision::F32,
            ..Request::new(vec![1, 2], 5)
        };
        images.push(text(text(generate(&model, &request, &mut |_| {}))?.to_vec())?);
    }
    near("images", &images[1], &images[0])
}

fn train() -> Result<(), String> {
    let data = ImageSet {
        n: 8,
        channels: 3,
        height: 8,
        width: 8,
        pixels: (0..8 * 8 * 8 * 3).map(|i| (i * 37 % 251) as u8).collect(),
        labels: (0..8).map(|i| i % 4).collect(),
        class_names: vec!["a", "b", "c", "d"],
    };
    let mut runs = Vec::new();
    for device in devices()? {
        let model = text(Dit::new(config(), &device, 1))?;
        let settings = LoopSettings {
            steps: 3,
            batch: 4,
            seed: 0,
            label_dropout: 0.1,
            precision: Precision::F32,
            checkpoint_every: 10,
            activation_checkpointing: false,
        };
        let mut trainer = text(Trainer::homeless(model, AdamWSettings::default(), settings))?;
        let mut batches = text(Batches::new(&data, 4, 3))?;
        let mut steps = Vec::new();
        for _ in 0..3 {
            let progress = text(trainer.update(&mut batches))?;
            steps.extend([progress.loss as f32, progress.grad_norm as f32]);
        }
        runs.push(steps);
    }
    near("loss and gradient norm", &runs[1], &runs[0])
}
