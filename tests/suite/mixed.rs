//! Whole models in bf16 on the emulated GPU, beside the CPU: inference with weights held in bf16, and training that keeps
//! its parameters in f32.

use super::devices::{configs, emulator_of};
use graft_engine::autograd::{Graph, ParamStore, Precision, Var};
use graft_engine::backend::Device;
use graft_engine::io::datasets::ImageSet;
use graft_engine::models::dit::{self, Dit, DitConfig, Run};
use graft_engine::models::pixart::{PixArt, PixArtConfig};
use graft_engine::models::t5::{T5, T5Config, Tokens};
use graft_engine::models::vae::{Vae, VaeConfig};
use graft_engine::nn::operators::Spec;
use graft_engine::ops::{to_f32, to_working};
use graft_engine::sample::pipeline::{self, Request};
use graft_engine::sample::text;
use graft_engine::tensor::{DType, Tensor};
use graft_engine::train::batches::Batches;
use graft_engine::train::optimizer::AdamWSettings;
use graft_engine::train::trainer::{LoopSettings, Trainer};
use graft_kernels::check::{Tolerance, compare};
use graft_kernels::rng::Philox;
use half::bf16;
use std::ops::ControlFlow;

/// A host device and an emulated GPU that computes in bf16.
fn devices() -> Option<[Device; 2]> {
    Some([Device::cpu(), emulator_of(DType::BF16)?])
}

/// Makes every parameter count: a fresh model's last layers are zero.
fn stir(params: &mut ParamStore, deviation: f32) {
    let ids: Vec<_> = params.iter().map(|(id, _)| id).collect();
    for id in ids {
        let mut value = params.get(id).value.copy().unwrap();
        let mut noise = vec![0.0; value.len()];
        Philox::new(3, 1000 + id.index() as u64).fill_normal(&mut noise);
        value.edit(|v| v.iter_mut().zip(&noise).for_each(|(v, n)| *v += deviation * n)).unwrap();
        params.set(id, value).unwrap();
    }
}

fn drawn(device: &Device, shape: &[usize], seed: u64) -> Tensor {
    let mut values = vec![0.0; shape.iter().product()];
    Philox::new(seed, 0).fill_normal(&mut values);
    Tensor::from_f32(device, shape, &values).unwrap()
}

/// Relative error in the mean square, and the largest against the largest value: a few roundings to 2^-8 of every layer.
fn near(what: &str, [want, got]: &[Vec<f32>; 2], rms: f64) {
    let size = want.iter().fold(0.0f64, |m, v| m.max(f64::from(v.abs())));
    let result = compare(got, want, Tolerance { atol: 4.0 * rms * size, rtol: 0.0, rms });
    println!("{what}: {result:?}");
    assert!(size > 0.0 && result.pass, "{what}: {result:?}");
    // Computed in bf16 indeed: f32 would agree a hundred times better.
    assert!(result.rel_rms > 1e-4, "{what}: {result:?}");
}

#[test]
fn casting_rounds_to_even_and_keeps_what_is_no_number() {
    let Some([_, gpu]) = devices() else { return };
    let words = [0u32, 0x8000_0000, 0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x7f7f_ffff, 0x7f80_0000, 0xff80_0000, 1];
    let mut values: Vec<f32> = words.map(f32::from_bits).to_vec();
    values.push(f32::NAN);
    let x = Tensor::from_f32(&gpu, &[2, 5], &values).unwrap();
    let narrow = to_working(&x).unwrap();
    assert_eq!((narrow.dtype(), narrow.shape().dims()), (DType::BF16, &[2, 5][..]));
    let wide = to_f32(&narrow).unwrap();
    assert_eq!((wide.dtype(), wide.shape().dims()), (DType::F32, &[2, 5][..]));
    for (got, value) in wide.to_vec().unwrap().into_iter().zip(values) {
        let want = bf16::from_f32(value).to_f32();
        assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{value:e}: {got:e}");
    }
}

#[test]
fn a_dit_in_bf16_predicts_what_it_predicts_on_the_cpu() {
    let Some(devices) = devices() else { return };
    for (name, config) in configs() {
        let outputs = devices.each_ref().map(|device| {
            let mut model = Dit::new(config.clone(), device, 1).unwrap();
            stir(&mut model.params, 0.1);
            if device.is_gpu() {
                dit::to_bf16(&mut model).unwrap();
                assert!(model.params.iter().all(|(_, p)| p.value.dtype() == DType::BF16));
            }
            let x = Var::constant(drawn(device, &[2, 3, 8, 8], 5));
            let t = Tensor::from_f32(device, &[2], &[17.0, 640.5]).unwrap();
            let y = Tensor::from_i32(device, &[2], &[1, 4]).unwrap();
            let g = Graph::inference(if device.is_gpu() { Precision::Bf16 } else { Precision::F32 });
            let out = model.forward(&g, &x, &t, &y, Run::default()).unwrap();
            assert_eq!(out.tensor().dtype(), DType::F32);
            out.tensor().to_vec().unwrap()
        });
        near(name, &outputs, 1.5e-2);
    }
}

#[test]
fn sampling_in_bf16_gives_the_images_of_the_cpu() {
    let Some(devices) = devices() else { return };
    let [_, (_, config)] = configs();
    for sampler in ["ddpm", "dpm++"] {
        let images = devices.each_ref().map(|device| {
            let mut model = Dit::new(config.clone(), device, 1).unwrap();
            stir(&mut model.params, 0.05);
            if device.is_gpu() {
                dit::to_bf16(&mut model).unwrap();
            }
            let precision = if device.is_gpu() { Precision::Bf16 } else { Precision::F32 };
            let sampler = sampler.parse().unwrap();
            let request = Request { sampler, steps: 2, guidance: 2.0, precision, ..Request::new(vec![1, 2], 5) };
            pipeline::generate(&model, &request, &mut |_| {}).unwrap().to_vec().unwrap()
        });
        near(sampler, &images, 2e-2);
    }
}

#[test]
fn a_text_becomes_a_picture_in_bf16() {
    let Some(devices) = devices() else { return };
    let t5 = T5Config { width: 24, heads: 2, head_width: 8, hidden: 40, depth: 2, vocabulary: 30, ..T5Config::xxl() };
    let config = PixArtConfig { sample_size: 4, caption_channels: 24, ..PixArtConfig::plain(2, 24, 3) };
    let vae = VaeConfig { channels: vec![8, 16], layers: 1, groups: 4, ..VaeConfig::released(0.5) };
    let found = devices.each_ref().map(|device| {
        let precision = if device.is_gpu() { Precision::Bf16 } else { Precision::F32 };
        let encoder = T5::new(t5.clone(), device, 2).unwrap();
        let texts = [vec![3, 7, 1], vec![5, 9, 11, 2, 1], vec![1]].map(Tokens::whole);
        let features = encoder.encode(&texts, precision).unwrap();
        let model = PixArt::random_in(config.clone(), device, 1, device.is_gpu()).unwrap();
        let (prompts, nulls) = (features[..2].to_vec(), vec![features[2].clone(); 2]);
        let request = text::Request { steps: 2, batch: 2, precision, ..text::Request::new(prompts, nulls, [4, 4], 5) };
        let latents = text::generate(&model, &request, &mut |_, _| Ok(())).unwrap();
        // The decoder by itself: of the same latents on both.
        let vae = Vae::new(vae.clone(), device, 3).unwrap();
        let given = drawn(device, &[1, 4, 5, 6], 9);
        let picture = vae.decode(&given, precision, &mut |_, _| {}).unwrap();
        let features: Vec<f32> = features.iter().flat_map(|f| f.to_vec().unwrap()).collect();
        [features, latents.to_vec().unwrap(), picture.to_vec().unwrap()]
    });
    let [cpu, gpu] = found;
    let [features, latents, picture] = [0, 1, 2].map(|i| [cpu[i].clone(), gpu[i].clone()]);
    near("features", &features, 2e-2);
    near("latents", &latents, 4e-2);
    near("picture", &picture, 3e-2);
}

fn images() -> ImageSet {
    let pixels = (0..8 * 8 * 8 * 3).map(|i| if i / 8 % 2 == 0 { 220 } else { (i * 37 % 60) as u8 }).collect();
    let labels = (0..8).map(|i| i % 4).collect();
    ImageSet { n: 8, channels: 3, height: 8, width: 8, pixels, labels, class_names: vec!["a", "b", "c", "d"] }
}

fn training(steps: u64, precision: Precision) -> LoopSettings {
    LoopSettings {
        steps,
        batch: 4,
        seed: 3,
        label_dropout: 0.1,
        precision,
        checkpoint_every: 2,
        activation_checkpointing: false,
    }
}

const OPTIMISER: AdamWSettings = AdamWSettings { lr: 3e-3, ema: 0.9, ..AdamWSettings::PLAIN };

/// Parameters stay in f32, so that steps smaller than 2^-8 of a weight count, and losses follow those of the CPU.
#[test]
fn training_in_bf16_follows_that_of_the_cpu() {
    let Some(devices) = devices() else { return };
    let data = images();
    // The second with blocks that are computed again in the backward pass.
    for ((name, config), steps) in configs().into_iter().zip([8, 2]) {
        let losses = devices.each_ref().map(|device| {
            let model = Dit::new(config.clone(), device, 1).unwrap();
            let settings = LoopSettings { activation_checkpointing: steps == 2, ..training(8, Precision::Bf16) };
            let mut trainer = Trainer::homeless(model, OPTIMISER, settings).unwrap();
            let mut batches = Batches::new(&data, 4, 3).unwrap();
            let losses: Vec<f64> = (0..steps).map(|_| trainer.update(&mut batches).unwrap().loss).collect();
            assert!(trainer.model.params.iter().all(|(_, p)| p.value.dtype() == DType::F32));
            losses
        });
        let [cpu, gpu] = &losses;
        println!("{name}: {cpu:?} {gpu:?}");
        for (c, g) in cpu.iter().zip(gpu) {
            assert!((c - g).abs() <= 5e-3 * c.abs(), "{name}: losses {cpu:?} and {gpu:?}");
        }
        assert!(gpu[steps - 1] < gpu[0] && (steps == 2 || gpu[steps - 1] < 0.9 * gpu[1]), "{name}: {gpu:?}");
    }
}

/// What is kept is f32, so that a run that was stopped goes on as if it had not been.
#[test]
fn a_stopped_run_in_bf16_goes_on_bit_for_bit() {
    let Some([_, gpu]) = devices() else { return };
    let (data, [_, (_, config)]) = (images(), configs());
    let bits = |stops: &[u64]| -> Vec<u32> {
        let dir = std::env::temp_dir().join(format!("graft-mixed-{}-{}", std::process::id(), stops.len()));
        let _ = std::fs::remove_dir_all(&dir);
        let mut last = Vec::new();
        for stop in stops {
            let model = Dit::new(config.clone(), &gpu, 1).unwrap();
            let settings = training(4, Precision::Bf16);
            let mut trainer = Trainer::open(model, OPTIMISER, settings, &dir, "mixed".into()).unwrap();
            let stopped = |step: u64| if step >= *stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
            trainer.run(&data, &mut |p| stopped(p.step)).unwrap();
            assert_eq!(trainer.step(), *stop);
            last = trainer.model.params.iter().flat_map(|(_, p)| p.value.to_vec().unwrap()).collect();
        }
        std::fs::remove_dir_all(&dir).unwrap();
        last.into_iter().map(f32::to_bits).collect()
    };
    assert!(bits(&[4]) == bits(&[1, 3, 4]));
}

/// What a filter network tells apart it computes in f32 on any device.
#[test]
fn filters_as_long_as_the_picture_keep_their_phases() {
    let Some(devices) = devices() else { return };
    let sizes = DitConfig { patch: 2, input_size: 16, in_channels: 1, classes: 2, ..DitConfig::plain(1, 16, 2) };
    let mut config = sizes;
    config.blocks[0].attn = Spec::new("long_conv");
    let outputs = devices.each_ref().map(|device| {
        let mut model = Dit::new(config.clone(), device, 1).unwrap();
        stir(&mut model.params, 0.1);
        let x = Var::constant(drawn(device, &[1, 1, 16, 16], 5));
        let t = Tensor::from_f32(device, &[1], &[300.0]).unwrap();
        let y = Tensor::from_i32(device, &[1], &[1]).unwrap();
        let g = Graph::inference(Precision::Bf16);
        model.forward(&g, &x, &t, &y, Run::default()).unwrap().tensor().to_vec().unwrap()
    });
    near("long filters", &outputs, 1.5e-2);
}
