//! `graft sample` and `graft forward`: results, reproducibility, files.

use crate::support::{command, entries, folder, golden, model, run, succeed};
use graft_engine::io::png;
use graft_engine::io::safetensors::TensorFile;

#[test]
fn a_seed_gives_the_same_bytes_whatever_the_batch_and_threads() {
    let here = folder("same");
    model(&here, 1);
    for sampler in ["ddim", "ddpm", "dpm-solver++"] {
        let draw = |file: &str, more: &[&str]| {
            let base =
                ["sample", "--model", "model", "--grid", "rows", "--n", "2", "--steps", "4", "-s", "3", "-o", file];
            succeed(&here, &[&base[..], &["--sampler", sampler], more].concat());
            std::fs::read(here.join(file)).unwrap()
        };
        let first = draw("a.png", &[]);
        assert_eq!(first, draw("a.png", &[]), "{sampler}: second run");
        assert_eq!(first, draw("a.png", &["--batch", "1"]), "{sampler}: batch 1");
        assert_eq!(first, draw("a.png", &["--batch", "4", "--threads", "1"]), "{sampler}: batch 4");
        assert_ne!(first, draw("a.png", &["--guidance", "2"]), "{sampler}: guidance");
        assert_ne!(first, draw("a.png", &["--dtype", "bf16"]), "{sampler}: dtype");
    }
}

#[test]
fn the_picture_says_how_it_was_made() {
    let here = folder("record");
    model(&here, 1);
    succeed(
        &here,
        &["sample", "--model", "model", "--class-labels", "Bag,0", "--cfg-scale", "3", "--steps", "2", "-o", "x.png"],
    );
    let (image, metadata) = png::read(&here.join("x.png")).unwrap();
    assert!(image.width() > 112 && image.height() > 2 * 64, "{} x {}", image.width(), image.height());
    let record: serde_json::Value = serde_json::from_str(&metadata["graft"]).unwrap();
    assert_eq!(record["labels"], serde_json::json!([1, 0]));
    assert_eq!(record["guidance_scale"], 3.0);
    assert_eq!((&record["sampler"], &record["steps"], &record["seed"]), (&"ddim".into(), &2.into(), &0.into()));
    let weights = here.join("model/diffusion_pytorch_model.safetensors");
    assert_eq!(record["weights_sha256"], graft_engine::io::hash::sha256_file(&weights).unwrap());
    let shown = succeed(&here, &["inspect", "x.png"]).text();
    assert!(shown.contains("weights_sha256"), "{shown}");
}

#[test]
fn one_file_per_image_and_standard_output() {
    let here = folder("files");
    model(&here, 1);
    let base = ["sample", "--model", "model", "--class", "2,1", "--steps", "2", "--seed", "7"];
    succeed(&here, &[&base[..], &["-o", "shot-%seed%.png"]].concat());
    succeed(&here, &[&base[..], &["-o", "out/"]].concat());
    succeed(&here, &[&base[..], &["--separate", "-o", "one.png"]].concat());
    let files = entries(&here);
    for name in ["shot-7.png", "shot-8.png", "one-7.png", "one-8.png"] {
        assert!(files.contains(&name.to_string()), "{files:?}");
    }
    assert_eq!(entries(&here.join("out")), ["7.png", "8.png"]);
    let stdout = succeed(&here, &[&base[..], &["-o", "-"]].concat()).stdout;
    assert!(png::decode("stdout", &stdout).is_ok());
    // The second image alone is the second image of the pair.
    succeed(
        &here,
        &["sample", "--model", "model", "--class", "1", "--steps", "2", "--seed", "8", "-o", "alone-%seed%.png"],
    );
    assert_eq!(png::read(&here.join("alone-8.png")).unwrap().0, png::read(&here.join("shot-8.png")).unwrap().0);
}

#[test]
fn a_random_seed_is_echoed_and_repeats() {
    let here = folder("random");
    model(&here, 1);
    let ran =
        succeed(&here, &["sample", "--model", "model", "--class", "0", "--steps", "2", "--seed", "-1", "-o", "a.png"]);
    let seed = ran.stderr.lines().find_map(|l| l.strip_prefix("seed ")).unwrap().to_string();
    succeed(&here, &["sample", "--model", "model", "--class", "0", "--steps", "2", "--seed", &seed, "-o", "b.png"]);
    assert_eq!(std::fs::read(here.join("a.png")).unwrap(), std::fs::read(here.join("b.png")).unwrap());
}

#[test]
fn latents_go_out_and_come_in() {
    let here = folder("latents");
    model(&here, 4);
    let base = ["sample", "--model", "model", "--class", "0,1", "--steps", "3"];
    succeed(&here, &[&base[..], &["--output-latents", "a.safetensors"]].concat());
    let file = TensorFile::open(&here.join("a.safetensors")).unwrap();
    assert_eq!(file.get("latents").unwrap().shape, [2, 4, 8, 8]);
    assert!(file.metadata()["graft"].contains("weights_sha256"));
    let from = |out: &str, latents: &str| {
        succeed(&here, &[&base[..], &["--latents", latents, "--output-latents", out]].concat());
        TensorFile::open(&here.join(out)).unwrap().get("latents").unwrap().to_f32().unwrap()
    };
    let second = from("b.safetensors", "a.safetensors");
    assert_ne!(second, file.get("latents").unwrap().to_f32().unwrap());
    assert_eq!(second, from("c.safetensors", "a.safetensors"));
}

#[test]
fn forward_gives_the_recorded_output() {
    let here = folder("forward");
    let cases: [(&str, &str, &[&str], f32); 4] = [
        ("dit_diffusers/sharded", "output_original", &[], 5.2e-5),
        ("dit_diffusers/sharded", "output_diffusers", &["--semantics", "diffusers"], 6.1e-5),
        ("dit_original/head_dim_72_guided", "output", &[], 6.3e-5),
        ("dit_original/head_dim_72_guided", "output_guided", &["--cfg-scale", "4.0"], 1.5e-4),
    ];
    for (case, tensor, more, bound) in cases {
        let (model, inputs) = (golden(&format!("{case}/model")), golden(&format!("{case}/inputs.safetensors")));
        let base = ["forward", "--model", &model, "--inputs", &inputs, "--output", "o.safetensors"];
        succeed(&here, &[&base[..], more].concat());
        let read =
            |path: &std::path::Path, name: &str| TensorFile::open(path).unwrap().get(name).unwrap().to_f32().unwrap();
        let got = read(&here.join("o.safetensors"), "output");
        let want = read(golden(&format!("{case}/expected.safetensors")).as_ref(), tensor);
        assert_eq!(got.len(), want.len());
        let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst <= bound, "{case} {tensor}: {worst}");
    }
}

#[test]
fn an_interrupted_run_leaves_nothing() {
    let here = folder("interrupted");
    model(&here, 1);
    let args = [
        "sample",
        "--model",
        "model",
        "--class",
        "0",
        "--n",
        "500",
        "--sampler",
        "ddpm",
        "--steps",
        "1000",
        "-o",
        "out/never.png",
    ];
    let mut child = crate::support::command(&here, &args).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "it should still be at work");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(entries(&here.join("out")).is_empty());
    assert_eq!(run(&here, &["sample", "--model", "model", "--class", "0", "--steps", "1", "-o", "out/b.png"]).code, 0);
}

/// The process stays within the printed plan and 64 MiB for the program itself.
#[test]
fn memory_stays_within_the_plan() {
    let here = folder("memory");
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/fashion-dit/model");
    let request = ["sample", "--model", model, "--grid", "rows", "--n", "4", "--batch", "20", "--steps", "3"];
    let planned = succeed(&here, &[&request[..], &["--plan-memory"]].concat()).text();
    let mib: f64 = planned.split(' ').next().unwrap().parse().unwrap();
    let mut child = command(&here, &[&request[..], &["-o", "out.png"]].concat()).spawn().unwrap();
    let mut peak = 0.0f64;
    while child.try_wait().unwrap().is_none() {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<f64>().ok());
        peak = peak.max(kib.unwrap_or(0.0) / 1024.0);
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    assert!(here.join("out.png").exists());
    assert!(peak > 10.0 && peak <= mib + 64.0, "peak {peak:.1} MiB, planned {mib:.1} MiB");
}
