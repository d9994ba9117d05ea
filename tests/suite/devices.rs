//! The whole model through the CUDA kernels: sampling and training on the emulated GPU, beside the CPU.

use graft_engine::autograd::Precision;
use graft_engine::backend::{Device, emu};
use graft_engine::io::datasets::ImageSet;
use graft_engine::models::dit::{Dit, DitConfig};
use graft_engine::models::pixart::{PixArt, PixArtConfig};
use graft_engine::models::vae::{Vae, VaeConfig};
use graft_engine::nn::operators::Spec;
use graft_engine::ops::{attention, attention_backward, contracts, ln_modulate};
use graft_engine::sample::pipeline::{Request, generate};
use graft_engine::sample::text;
use graft_engine::tensor::{DType, Tensor};
use graft_engine::train::batches::Batches;
use graft_engine::train::optimizer::AdamWSettings;
use graft_engine::train::trainer::{LoopSettings, Trainer};
use graft_engine::verify;
use graft_kernels::check::{Fill, Tolerance, compare, draw_f32};
use graft_kernels::rng::Philox;
use graft_kernels::ways::force;

/// An emulated GPU in f32; none where there is no C++ compiler, which `REQUIRE_EMU=1` does not allow.
fn emulator() -> Option<Device> {
    emulator_of(DType::F32)
}

/// One that computes in `element`.
pub fn emulator_of(element: DType) -> Option<Device> {
    match emu::open(element, 1) {
        Ok(device) => Some(device),
        Err(why) => {
            assert!(std::env::var_os("REQUIRE_EMU").is_none_or(|v| v == "0"), "{why}");
            println!("SKIP {why}");
            None
        }
    }
}

pub fn configs() -> [(&'static str, DitConfig); 2] {
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

/// A norm, its convolution and the residual are one operator on a GPU; in bf16 one kernel on the tensor cores.
#[test]
fn decoding_on_the_emulated_gpu_gives_the_picture_of_the_cpu() {
    let Some(gpu) = emulator() else { return };
    let config = VaeConfig { channels: vec![8, 16, 16], layers: 1, groups: 4, ..VaeConfig::released(0.5) };
    let values: Vec<f32> = (0..4 * 5 * 6).map(|i| ((i * 37 % 23) as f32 - 11.0) / 8.0).collect();
    let [cpu, gpu] = [Device::cpu(), gpu].map(|device| {
        let vae = Vae::new(config.clone(), &device, 3).unwrap();
        let latents = Tensor::from_f32_as(&device, &[1, 4, 5, 6], &values, device.element()).unwrap();
        vae.decode(&latents, Precision::F32, &mut |_, _| {}).unwrap().to_vec().unwrap()
    });
    let result = compare(&gpu, &cpu, Tolerance { atol: 1e-4, rtol: 1e-4, rms: 1e-5 });
    assert!(result.pass, "f32: {result:?}");
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

/// A small transformer with cross-attention, adaLN-single and a head of 72, forward and backward: the recorded cases of
/// PixArt, of the text encoder and of the autoencoder, through the kernels.
#[test]
fn recorded_models_that_read_text_pass_on_the_emulated_gpu() {
    let Some(gpu) = emulator() else { return };
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let cases = ["pixart_diffusers/rect_gradients", "t5/single_file", "vae/kl_diffusers", "vae/tiny"];
    let folders: Vec<_> = cases.iter().map(|case| golden.join(case)).collect();
    let outcomes = verify::run_on(&gpu, &folders, Precision::F32, &mut |_| {}).unwrap();
    assert_eq!(outcomes.len(), cases.len());
    for outcome in &outcomes {
        assert!(outcome.passed(), "{}: {:#?}", outcome.name, outcome.rows);
    }
    // The gradients are among what was compared.
    let names: Vec<&str> = outcomes[0].rows.iter().map(|row| row.tensor.as_str()).collect();
    assert!(names.iter().any(|name| name.contains("grad.transformer_blocks.0.attn2.to_k.weight")), "{names:?}");
}

/// A picture from a text: guided by a null text of one token, then decoded.
#[test]
fn a_picture_from_text_on_the_emulated_gpu_is_that_of_the_cpu() {
    let Some(gpu) = emulator() else { return };
    let config = PixArtConfig { sample_size: 4, caption_channels: 12, ..PixArtConfig::plain(2, 24, 3) };
    let vae_config = VaeConfig { channels: vec![8, 16], layers: 1, groups: 4, ..VaeConfig::released(0.5) };
    let pictures = [Device::cpu(), gpu].map(|device| {
        let model = PixArt::random(config.clone(), &device, 1).unwrap();
        let features = |tokens: usize, seed: u64| {
            let mut values = vec![0.0; tokens * 12];
            Philox::new(seed, 0).fill_normal(&mut values);
            Tensor::from_f32(&device, &[tokens, 12], &values).unwrap()
        };
        let (prompts, nulls) = (vec![features(3, 1), features(5, 2)], vec![features(1, 3); 2]);
        let request = text::Request { steps: 2, batch: 2, ..text::Request::new(prompts, nulls, [4, 4], 5) };
        let latents = text::generate(&model, &request, &mut |_, _| Ok(())).unwrap();
        let vae = Vae::new(vae_config.clone(), &device, 3).unwrap();
        vae.decode(&latents, Precision::F32, &mut |_, _| {}).unwrap().to_vec().unwrap()
    });
    let result = compare(&pictures[1], &pictures[0], Tolerance { atol: 1e-3, rtol: 1e-3, rms: 1e-4 });
    assert!(result.pass, "{result:?}");
}

/// A head is computed from its own columns alone, also by kernels that work on more columns than it has: NaN and infinity
/// in its neighbours leave it as it is, bit for bit.
#[test]
fn a_head_does_not_see_its_neighbours() {
    if emulator().is_none() {
        return;
    }
    let device = emu::open(DType::BF16, 1).unwrap();
    let poison = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    for (way, n, e) in [
        ("mma_whole", 131, 40),
        ("mma_128x64", 70, 72),
        ("mma_64x64", 70, 40),
        ("mma_64x64", 65, 72),
        ("wgmma_128x192", 200, 72),
        ("wgmma_128x128", 70, 64),
    ] {
        let h = 3;
        let head = |i: usize| i / e % h;
        let run = |poisoned: bool| {
            let of = |name: &str, shape: &[usize]| {
                let mut values = draw_f32("neighbours", name, shape.iter().product(), Fill::Normal);
                let others = values.iter_mut().enumerate().filter(|(i, _)| poisoned && head(*i) != 1);
                others.for_each(|(i, v)| *v = poison[i % 3]);
                Tensor::from_f32_as(&device, shape, &values, DType::BF16).unwrap()
            };
            let params = contracts::attention::Params { scale: 0.2 };
            let (qkv, dy) = (of("qkv", &[1, n, 3, h, e]), of("dy", &[1, n, h, e]));
            let work = || {
                let out = attention(&qkv, params).unwrap();
                let dqkv = attention_backward(&dy, &qkv, &out.y, &out.lse, true, params).unwrap().unwrap();
                [out.y, dqkv].map(|t| t.to_vec().unwrap())
            };
            let (results, forced) = force(way, work);
            assert!(forced, "{way}");
            results.map(|r| {
                let own = r.iter().enumerate().filter(|(i, _)| head(*i) == 1);
                own.map(|(_, v)| v.to_bits()).collect::<Vec<u32>>()
            })
        };
        let [clean, poisoned] = [run(false), run(true)];
        assert!(clean.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()), "{way}, {e} columns");
        assert!(clean == poisoned, "{way}, {e} columns");
    }
}
