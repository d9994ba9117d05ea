//! The sampling loop allocates nothing after its warm-up, on any thread.
//!
//! A test of its own binary, because it replaces the allocator of the whole process by one that counts.

#[path = "counting.rs"]
mod counting;

use graft_engine::autograd::Precision;
use graft_engine::backend::Device;
use graft_engine::models::dit::{Dit, DitConfig};
use graft_engine::nn::operators::Spec;
use graft_engine::sample::pipeline::{Request, generate};

/// Steps before the loop must be quiet.
const WARM_UP: usize = 2;
const STEPS: usize = 12;
/// Runs of which one must be quiet.
const ATTEMPTS: usize = 4;

/// Allocations of every step from the second on, on all threads.
fn per_step(model: &Dit, request: &Request) -> Vec<usize> {
    let mut counts = [0usize; STEPS];
    generate(model, request, &mut |p| counts[p.step - 1] = counting::allocations()).unwrap();
    counts.windows(2).map(|w| w[1] - w[0]).collect()
}

#[test]
fn no_allocation_after_the_warm_up() {
    let config = DitConfig { patch: 2, input_size: 16, in_channels: 3, classes: 10, ..DitConfig::plain(3, 64, 4) };
    let mut grafted = config.clone();
    grafted.blocks[0].attn = Spec::new("hyena_2d").with("variant", "se");
    grafted.blocks[0].mlp = Spec::new("mlp_hyena_x");
    grafted.blocks[1].attn = Spec::new("hyena_x").with("taps", 4.0).with("direction", "bidirectional");
    grafted.blocks[2].attn = Spec::new("long_conv").with("direction", "centred");
    let models = [("plain", config), ("grafted", grafted)].map(|(n, c)| (n, Dit::new(c, &Device::cpu(), 1).unwrap()));
    let mut report = String::new();
    for (name, model) in &models {
        for (sampler, guidance) in [("ddim", 1.0), ("ddim", 4.0), ("ddpm", 4.0), ("dpm++", 4.0)] {
            for precision in [Precision::F32, Precision::Bf16] {
                let request = Request {
                    sampler: sampler.parse().unwrap(),
                    steps: STEPS,
                    guidance,
                    precision,
                    ..Request::new(vec![1, 2, 3, 4], 5)
                };
                // A worker's scratch grows when it first meets its largest task, which may be late: hence the attempts.
                // An allocation that belongs to a step is there in all of them.
                let attempts: Vec<Vec<usize>> = (0..ATTEMPTS).map(|_| per_step(model, &request)).collect();
                if !attempts.iter().any(|counts| counts[WARM_UP - 1..].iter().all(|&n| n == 0)) {
                    report.push_str(&format!("{name} {sampler} guidance {guidance} {precision:?}: {attempts:?}\n"));
                }
            }
        }
    }
    assert!(report.is_empty(), "allocations in steps 2, 3, …:\n{report}");
}
