//! Allocations of fixed small pieces of work on one thread.
//!
//! They are counted in a process of their own, in which nothing else runs: [`probe`] is this very test program.

use super::Outcome;
use super::counting;
use super::table::Measured;
use graft_engine::autograd::{Graph, Precision, Var};
use graft_engine::backend::{Device, cpu};
use graft_engine::models::dit::{Dit, DitConfig, Run};
use graft_engine::nn::operators::Spec;
use graft_engine::ops::contracts::loss_regression;
use graft_engine::sample::pipeline::{Request, generate};
use graft_engine::tensor::Tensor;
use graft_engine::train::optimizer::{AdamW, AdamWSettings};
use std::process::Command;

/// The word of `GRAFT_GUARD` that asks for the probe.
pub const PROBE: &str = "probe";
/// Begins a line of the probe.
const MARK: &str = "allocated ";

/// Runs the probe and reads what it counted.
pub fn measure() -> Outcome {
    let this = std::env::current_exe().map_err(|e| e.to_string())?;
    let arguments = ["--exact", "nothing_grew", "--nocapture", "--test-threads=1"];
    let output = Command::new(this).args(arguments).env("GRAFT_GUARD", PROBE).output().map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "the probe failed: {text}{}", String::from_utf8_lossy(&output.stderr));
    // The fast paths differ in their scratch memory.
    let on = cpu::instruction_sets().first().copied().unwrap_or("baseline").to_string();
    let values = text.lines().filter_map(|line| line.split_once(MARK)).map(|(_, rest)| {
        let fields: Vec<&str> = rest.split(',').collect();
        let value = fields[2].parse().unwrap();
        Measured { on: on.clone(), case: fields[0].into(), what: fields[1].into(), value }
    });
    Ok(values.collect())
}

fn model(device: &Device) -> Dit {
    let mut config = DitConfig { patch: 2, input_size: 16, in_channels: 3, classes: 10, ..DitConfig::plain(3, 64, 4) };
    config.blocks[1].attn = Spec::new("hyena_x");
    Dit::new(config, device, 1).unwrap()
}

/// Prints what `work` allocates the second time: the first fills the pools.
fn report<R>(case: &str, mut work: impl FnMut() -> R) {
    work();
    let before = (counting::allocations(), counting::bytes());
    work();
    let after = (counting::allocations(), counting::bytes());
    println!("{MARK}{case},calls,{}", after.0 - before.0);
    println!("{MARK}{case},bytes,{}", after.1 - before.1);
}

/// What is counted, in the process that [`measure`] has started.
pub fn probe() {
    cpu::set_threads(1).unwrap();
    let device = Device::cpu();
    report("model from a seed", || model(&device));
    let mut model = model(&device);
    let (b, side) = (2, 16);
    let x = Tensor::zeros(&device, &[b, 3, side, side]).unwrap();
    let t = Tensor::from_f32(&device, &[b], &[500.0, 20.0]).unwrap();
    let y = Tensor::from_i32(&device, &[b], &[1, 2]).unwrap();
    for (name, precision) in [("forward pass in f32", Precision::F32), ("forward pass in bf16", Precision::Bf16)] {
        report(name, || {
            let g = Graph::inference(precision);
            model.forward(&g, &Var::constant(x.clone()), &t, &y, Run::default()).unwrap();
        });
    }
    let request = Request { steps: 4, guidance: 4.0, ..Request::new(vec![1, 2], 5) };
    report("image of 4 steps", || generate(&model, &request, &mut |_| {}).unwrap());
    let settings = AdamWSettings::PLAIN;
    let mut optimiser = AdamW::new(settings, &model.params).unwrap();
    let flat = [b, model.config.out_channels(), side * side];
    let target = Tensor::zeros(&device, &flat).unwrap();
    report("training step", || {
        let grads = {
            let g = Graph::training(Precision::F32);
            let out = model.forward(&g, &Var::constant(x.clone()), &t, &y, Run::default()).unwrap();
            let (out, target) = (g.reshape(&out, &flat).unwrap(), Var::constant(target.clone()));
            let params = loss_regression::Params { kind: 1, delta: 1.0 };
            let loss = g.loss_regression(&out, &target, params).unwrap();
            g.backward(&loss).unwrap()
        };
        optimiser.update(&mut model.params, &grads, settings.lr).unwrap();
    });
}
