//! Grafting a model that reads text: pairs, both stages, the report, and pictures of what results.

use crate::support::{command, entries, folder, refuse, succeed};
use crate::text::pipeline;
use graft_engine::io::png;
use std::path::Path;
use std::time::{Duration, Instant};

const PROMPTS: &str = "a red fox\nsnow\n\na house\nthe sea at night\nfox in snow\na boat\nred house\nnight\n";

const PLAN: &str = r#"
[base]
model = "model"

[[graft]]
site = "attn"
layers = "all"
operator = { kind = "hyena_x" }
start = "teacher"

[data]
kind = "pairs"
dir = "pairs"

[synthesize]
prompts = "prompts.txt"
steps = 2
shard = 3

[distill]
steps = 12
batch = 4
held_out = 1
optimizer = { lr = 3e-3 }

[finetune]
steps = 4
batch = 4
method = "lora"
lora = { rank = 2, keep_adapters = true }

[eval]
samples = 1
steps = 2
sampler = "dpm++"
guidance = 2.0
"#;

fn begin(name: &str) -> crate::scratch::Scratch {
    let here = folder(name);
    pipeline(&here);
    std::fs::write(here.join("prompts.txt"), PROMPTS).unwrap();
    std::fs::write(here.join("plan.toml"), PLAN).unwrap();
    here
}

fn pairs(here: &Path, name: &str) -> Vec<(String, Vec<u8>)> {
    let names = entries(&here.join(name)).into_iter().filter(|name| !name.starts_with('.'));
    names.map(|file| (file.clone(), std::fs::read(here.join(name).join(&file)).unwrap())).collect()
}

const SYNTHESIZE: [&str; 9] =
    ["synthesize", "--model", "model", "--prompts", "prompts.txt", "--steps", "2", "--shard", "3"];

#[test]
fn synthesizing_goes_on_after_a_kill_and_a_stop() {
    let here = begin("synthesize");
    let whole = succeed(&here, &[&SYNTHESIZE[..], &["-o", "whole"]].concat());
    assert!(whole.text().contains("8 pairs in 3 shards in whole"), "{}", whole.text());
    let want = pairs(&here, "whole");
    assert_eq!(want.len(), 7);
    // Killed as soon as it has written something, wherever that is.
    let mut child = command(&here, &[&SYNTHESIZE[..], &["-o", "killed"]].concat()).spawn().unwrap();
    let start = Instant::now();
    let begun = || here.join("killed").is_dir() && !entries(&here.join("killed")).is_empty();
    while !begun() && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    succeed(&here, &[&SYNTHESIZE[..], &["-o", "killed"]].concat());
    assert_eq!(pairs(&here, "killed"), want);
    assert!(entries(&here.join("killed")).iter().all(|name| !name.ends_with(".tmp")));
    let stopped = succeed(&here, &[&SYNTHESIZE[..], &["-o", "stopped", "--stop-after", "1"]].concat());
    assert!(stopped.text().contains("stopped"));
    assert_eq!(pairs(&here, "stopped").len(), 5);
    succeed(&here, &[&SYNTHESIZE[..], &["-o", "stopped", "--batch", "2"]].concat());
    assert_eq!(pairs(&here, "stopped"), want);
    refuse(&here, &[&SYNTHESIZE[..], &["-o", "stopped", "--seed", "1"]].concat(), 2, &["holds other pairs (seed)"]);
    refuse(&here, &[&SYNTHESIZE[..8], &["0", "-o", "x"]].concat(), 2, &["shard", "nothing to do"]);
    std::fs::write(here.join("prompts.txt"), "\n").unwrap();
    refuse(&here, &[&SYNTHESIZE[..], &["-o", "x"]].concat(), 2, &["prompts.txt: no text"]);
    std::fs::remove_dir_all(here.join("model/text_encoder")).unwrap();
    std::fs::write(here.join("prompts.txt"), PROMPTS).unwrap();
    refuse(&here, &[&SYNTHESIZE[..], &["-o", "x"]].concat(), 2, &["the text encoder is missing"]);
}

#[test]
fn one_command_goes_from_the_plan_to_the_report() {
    let here = begin("text_graft");
    let checked = succeed(&here, &["plan", "check", "plan.toml"]).text();
    assert!(checked.contains("2 of 4 sites change") && checked.contains("hyena_x"), "{checked}");
    let shown = succeed(&here, &["plan", "show", "plan.toml"]).text();
    assert!(shown.contains("[synthesize]") && shown.contains("guidance = 4.5"), "{shown}");
    let ran = succeed(&here, &["run", "plan.toml", "--run", "run"]);
    assert!(ran.text().contains("blocks.1.attn"), "{}", ran.text());
    assert!(ran.stderr.contains("memory of stage 2"), "{}", ran.stderr);
    let page = std::fs::read_to_string(here.join("run/report.html")).unwrap();
    assert!(page.contains("Nearness to the base model") && page.contains("data:image/png"));
    let summary: serde_json::Value =
        serde_json::from_slice(&std::fs::read(here.join("run/summary.json")).unwrap()).unwrap();
    let stages = summary["evaluation"]["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 4);
    assert_eq!(stages[0]["fidelity"]["sample"], 0.0);
    assert!(stages[3]["fidelity"]["loss"].as_f64().unwrap().is_finite());
    let memory = succeed(&here, &["plan", "check", "plan.toml", "--memory"]).text();
    assert!(memory.contains("memory of stage 1"), "{memory}");
    // The run is a model: the last of its stages, with the base's other parts.
    let draw = |model: &str, file: &str, more: &[&str]| {
        let base = ["sample", "--model", model, "-p", "a red fox", "--steps", "2", "--seed", "3", "-o", file];
        succeed(&here, &[&base[..], more].concat());
        png::read(&here.join(file)).unwrap().0
    };
    let (base, grafted) = (draw("model", "a.png", &[]), draw("run", "b.png", &[]));
    assert_ne!(base, grafted);
    assert_eq!(grafted, draw("run/stage2", "c.png", &[]));
    let weights =
        |stage: &str| std::fs::read(here.join("run").join(stage).join("diffusion_pytorch_model.safetensors")).unwrap();
    assert_ne!(weights("stage1"), weights("stage2"));
    // Stage 1 with the adapters is stage 2, but for rounding.
    let applied = draw("run/stage1", "e.png", &["--lora", "run/stage2-adapter"]);
    let far = applied.pixels().iter().zip(grafted.pixels()).filter(|(a, b)| a.abs_diff(**b) > 1).count();
    assert_eq!(far, 0);
    assert!(succeed(&here, &["inspect", "run"]).text().contains("hyena_x"));
    // What does not fit.
    let text = PLAN.replace("kind = \"pairs\"", "kind = \"mnist\"");
    std::fs::write(here.join("bad.toml"), text).unwrap();
    refuse(&here, &["run", "bad.toml", "--run", "bad"], 2, &["nothing is synthesized for this data"]);
    std::fs::write(here.join("bad.toml"), PLAN.replace("\"all\"", "\"paper-pixart\"")).unwrap();
    refuse(&here, &["plan", "check", "bad.toml"], 2, &["bad.toml:7:10", "must be a base of 28 blocks"]);
    let path = here.join("pairs/latents-00001.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 64;
    std::fs::write(&path, bytes).unwrap();
    refuse(&here, &["finetune", "--run", "run"], 1, &["latents-00001.safetensors: damaged shard"]);
}
