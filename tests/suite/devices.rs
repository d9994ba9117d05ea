//! The whole model through the CUDA kernels: sampling and training on the emulated GPU, beside the CPU.

use graft_engine::autograd::Precision;
use graft_engine::backend::{Device, emu};
use graft_engine::io::datasets::ImageSet;
use graft_engine::models::dit::{Dit, DitConfig};
use graft_engine::nn::operators::Spec;
use graft_engine::ops::{contracts, ln_modulate};
use graft_engine::sample::pipeline::{Request, generate};
use graft_engine::tensor::{DType, Tensor};
use graft_engine::train::batches::Batches;
use graft_engine::train::optimizer::AdamWSettings;
use graft_engine::train::trainer::{LoopSettings, Trainer};
use graft_kernels::check::{Tolerance, compare};

/// An emulated GPU in f32; none where there is no C++ compiler, which `REQUIRE_EMU=1` does not allow.
fn emulator() -> Option<Device> {
    match emu::open(DType::F32, 1) {
        Ok(device) => Some(device),
        Err(why) => {
            assert!(std::env::var_os("REQUIRE_EMU").is_none_or(|v| v == "0"), "{why}");
            println!("SKIP {why}");
            None
        }
    }
}

fn configs() -> [(&'static str, DitConfig); 2] {
    let plain = DitConfig { patch: 2, input_size: 8, in_channels: 3, classes: 4, ..DitConfig::plain(2, 32, 4) };
    let mut grafted = plain.clone();
    grafted.blocks[0].attn = Spec::new("hyena_x").with("taps", 4.0);
    grafted.blocks[1].attn = Spec::new("hyena_se").with("taps", 4.0);
    [("plain", plain), ("grafted", grafted)]
}

#[test]
fn sampling_on_the_emulated_gpu_gives_the_images_of_the_cpu() {
    let Some(gpu) = emulator() else { return };
    for (name, config) in configs() {
        for sampler in ["ddim", "ddpm", "dpm++"] {
            let images = [Device::cpu(), gpu.clone()].map(|device| {
                let model = Dit::new(config.clone(), &device, 1).unwrap();
                let request = Request {
                    sampler: sampler.parse().unwrap(),
                    steps: 2,
                    guidance: 3.0,
                    precision: Precision::F32,
                    ..Request::new(vec![1, 2], 5)
                };
                generate(&model, &request, &mut |_| {}).unwrap().to_vec().unwrap()
            });
            let result = compare(&images[1], &images[0], Tolerance { atol: 1e-3, rtol: 1e-3, rms: 1e-4 });
            assert!(result.pass, "{name}, {sampler}: {result:?}");
        }
    }
}

#[test]
fn training_on_the_emulated_gpu_follows_that_on_the_cpu() {
    let Some(gpu) = emulator() else { return };
    let pixels = (0..8 * 8 * 8 * 3).map(|i| (i * 37 % 251) as u8).collect();
    let data = ImageSet {
        n: 8,
        channels: 3,
        height: 8,
        width: 8,
        pixels,
        labels: (0..8).map(|i| i % 4).collect(),
        class_names: vec!["a", "b", "c", "d"],
    };
    for (name, config) in configs() {
        let runs = [Device::cpu(), gpu.clone()].map(|device| {
            let model = Dit::new(config.clone(), &device, 1).unwrap();
            let settings = LoopSettings {
                steps: 3,
                batch: 4,
                seed: 3,
                label_dropout: 0.1,
                precision: Precision::F32,
                checkpoint_every: 3,
                activation_checkpointing: false,
            };
            let mut trainer = Trainer::homeless(model, AdamWSettings::default(), settings).unwrap();
            let mut batches = Batches::new(&data, 4, 3).unwrap();
            let steps: Vec<f64> = (0..3)
                .flat_map(|_| {
                    let progress = trainer.update(&mut batches).unwrap();
                    [progress.loss, progress.grad_norm]
                })
                .collect();
            let last = trainer.model.params.iter().last().unwrap().1.value.to_vec().unwrap();
            (steps, last)
        });
        let [(cpu, cpu_last), (emu, emu_last)] = runs;
        for (c, e) in cpu.iter().zip(&emu) {
            assert!((c - e).abs() <= 1e-4 * c.abs(), "{name}: losses and norms {cpu:?} and {emu:?}");
        }
        let result = compare(&emu_last, &cpu_last, Tolerance { atol: 1e-4, rtol: 1e-3, rms: 1e-3 });
        assert!(result.pass, "{name}: {result:?}");
    }
}

/// The kernel reads x once and writes y once: the sectors that its accesses touch are those of the bound.
#[test]
fn ln_modulate_moves_what_its_bound_says() {
    if emulator().is_none() {
        return;
    }
    let (emu, device) = emu::open_counting(DType::BF16).unwrap();
    let [b, n, c, d] = [2, 17, 6, 384];
    let of = |shape: &[usize]| Tensor::zeros_of(&device, shape, DType::BF16).unwrap();
    let params = contracts::ln_modulate::Params { shift: 0, scale: 1, eps: 1e-6 };
    ln_modulate(&of(&[b, n, d]), &of(&[b, c, d]), params).unwrap();
    let counted = emu.counters().unwrap();
    let sectors = |what: &str| -> usize {
        let lines = counted.lines().filter(|l| l.split_whitespace().nth(2) == Some(what));
        let field = |l: &str| l.split("sectors=").nth(1)?.split(' ').next()?.parse::<usize>().ok();
        lines.filter_map(field).sum()
    };
    assert_eq!([sectors("load"), sectors("store")], [b * n * d * 2 / 32; 2], "counted:\n{counted}");
}
