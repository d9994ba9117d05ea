//! Bad input: one line that names the place, what is, what must be; the right code; nothing half-written.

use crate::support::{entries, folder, golden, model, refuse};
use graft_engine::io::safetensors::{TensorRecord, write};
use std::collections::BTreeMap;
use std::path::Path;

fn sample(here: &Path, more: &[&str], code: i32, words: &[&str]) {
    let mut args = vec!["sample", "--model", "model", "--steps", "2"];
    if !more.iter().any(|a| a.starts_with("--class") || *a == "--grid") {
        args.extend(["--class", "0"]);
    }
    args.extend(more);
    refuse(here, &args, code, words);
}

#[test]
fn impossible_requests() {
    let here = folder("requests");
    model(&here, 1);
    sample(&here, &["--class", "3"], 2, &["--class-labels", "class out of range", "is 3", "must be 0 to 2"]);
    sample(&here, &["--class", "-1"], 2, &["class out of range", "is -1"]);
    sample(&here, &["--class", "hat"], 2, &["unknown class", "\"hat\"", "ankle boot, bag, coat"]);
    sample(&here, &["--n", "0"], 2, &["--n", "is 0"]);
    sample(&here, &["--batch", "0"], 2, &["--batch", "at least 1"]);
    sample(&here, &["--seed", "-2"], 2, &["--seed", "is -2"]);
    sample(&here, &["--guidance", "nan"], 2, &["--guidance-scale", "finite"]);
    sample(&here, &["--cfg-channels", "2"], 2, &["--cfg-channels", "is 2"]);
    sample(&here, &["--backend", "abacus"], 2, &["--backend", "abacus", "cpu, oracle, emu or cuda"]);
    sample(&here, &["--threads", "0"], 2, &["--threads", "at least 1"]);
    sample(&here, &["--sampler", "ddpm", "--eta", "0.5"], 2, &["--eta"]);
    for steps in ["0", "1001"] {
        let args = ["sample", "--model", "model", "--class", "0", "--steps", steps];
        refuse(&here, &args, 2, &["steps", &format!("is {steps}"), "1 to 1000"]);
    }
    refuse(&here, &["sample", "--model", "model"], 2, &["--class-labels", "--grid rows"]);
    assert_eq!(entries(&here), ["model"]);
}

#[test]
fn models_that_are_not() {
    let here = folder("models");
    let refused = |model: &str, words: &[&str]| {
        refuse(&here, &["sample", "--model", model, "--class", "0", "-o", "x.png"], 1, words);
        assert!(entries(&here).iter().all(|n| n != "x.png"));
    };
    refused("nowhere", &["nowhere", "no such file or folder"]);
    for (case, words) in [
        ("model_config_missing", &["config.json missing"][..]),
        ("model_config_invalid_json", &["config.json", "not valid json"]),
        ("model_config_wrong_class", &["unsupported model class", "UNet2DConditionModel"]),
        ("model_tensor_missing", &["missing tensor", "to_q.weight"]),
        ("model_tensor_extra", &["unexpected tensor", "mystery"]),
        ("model_tensor_wrong_shape", &["wrong shape", "to_q.weight", "must be ["]),
        ("model_tensor_wrong_dtype_int", &["unsupported dtype for a weight"]),
        ("model_weights_nan", &["non-finite weights", "to_q.weight"]),
        ("model_shard_missing", &["shard file missing"]),
        ("model_shard_path_escapes", &["shard path leaves the folder"]),
        ("model_weights_file_missing", &["weights missing"]),
    ] {
        // These models work on latents.
        let model = golden(&format!("safetensors_bad/{case}/model"));
        refuse(&here, &["sample", "--model", &model, "--class", "0", "--output-latents", "x.safetensors"], 1, words);
        assert!(entries(&here).is_empty(), "{case}");
    }
    let pickle = golden("dit_original/pickle_must_be_refused/model/checkpoint.pt");
    refused(&pickle, &["forbidden pickle global", "system"]);
    assert!(entries(&here).is_empty());
}

#[test]
fn damaged_and_impossible_models() {
    let here = folder("damaged");
    let path = model(&here, 1);
    let file = path.join("diffusion_pytorch_model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() - 5]).unwrap();
    sample(&here, &[], 1, &["diffusion_pytorch_model.safetensors", "data truncated"]);
    std::fs::write(&file, &whole[..4]).unwrap();
    sample(&here, &[], 1, &["file too short"]);
    std::fs::write(&file, &whole).unwrap();
    let config = std::fs::read_to_string(path.join("config.json")).unwrap();
    for (from, to, words) in [
        ("\"patch_size\": 2", "\"patch_size\": 3", &["patch", "impossible size"][..]),
        ("\"num_layers\": 2", "\"num_layers\": 99999999", &["num_layers", "1 to 1000"]),
        ("\"attention_head_dim\": 8", "\"attention_head_dim\": 99999999999", &["width"]),
        ("\"sample_size\": 8", "\"sample_size\": 1e30", &["sample_size"]),
        ("\"num_attention_heads\": 4", "\"num_attention_heads\": \"four\"", &["num_attention_heads", "four"]),
    ] {
        assert!(config.contains(from), "{config}");
        std::fs::write(path.join("config.json"), config.replace(from, to)).unwrap();
        sample(&here, &[], 1, words);
    }
}

#[test]
fn outputs_that_cannot_be_written() {
    let here = folder("outputs");
    model(&here, 1);
    std::fs::write(here.join("file"), b"").unwrap();
    sample(&here, &["-o", "file/x.png"], 1, &["file", "cannot create the folder"]);
    sample(&here, &["-o", "/proc/nowhere/x.png"], 1, &["/proc/nowhere", "cannot"]);
    sample(&here, &["-o", "/dev/full"], 1, &["/dev/full", "cannot write", "free disk space"]);
    let latents = ["--output-latents", "/dev/full", "-o", "x.png"];
    sample(&here, &latents, 1, &["/dev/full", "cannot write"]);
    assert_eq!(entries(&here), ["file", "model"]);
    // Standard output on a full disk.
    let mut command = crate::support::command(&here, &["op", "list"]);
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = command.stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("standard output"));
}

#[test]
fn a_latent_model_has_no_pictures() {
    let here = folder("latent");
    model(&here, 4);
    sample(&here, &["-o", "x.png"], 2, &["--output", "decoder", "--output-latents"]);
    sample(&here, &["--output-latents", "a.safetensors", "--latents", "none.safetensors"], 1, &["none.safetensors"]);
    let values = [0.0f32; 4];
    write(&here.join("bad.safetensors"), [TensorRecord::f32("latents", &[1, 4, 1, 1], &values)], &BTreeMap::new())
        .unwrap();
    let args = ["--output-latents", "a.safetensors", "--latents", "bad.safetensors"];
    sample(&here, &args, 2, &["--latents", "wrong shape", "[1, 4, 1, 1]", "[1, 4, 8, 8]"]);
}

#[test]
fn inputs_of_forward() {
    let here = folder("inputs");
    model(&here, 1);
    let (pixels, times, labels) = (vec![0.5f32; 128], vec![5.0f32; 2], vec![0i64, 3]);
    let inputs = |x: &[usize], labels: &[i64]| {
        let records = [
            TensorRecord::f32("x", x, &pixels),
            TensorRecord::f32("t", &[2], &times),
            TensorRecord::i64("y", &[labels.len()], labels),
        ];
        write(&here.join("in.safetensors"), records, &BTreeMap::new()).unwrap();
    };
    let args = ["forward", "--model", "model", "--inputs", "in.safetensors", "--output", "out.safetensors"];
    refuse(&here, &args, 1, &["in.safetensors"]);
    inputs(&[2, 1, 8, 8], &labels);
    crate::support::succeed(&here, &args);
    std::fs::remove_file(here.join("out.safetensors")).unwrap();
    inputs(&[2, 1, 4, 16], &labels);
    refuse(&here, &args, 1, &["wrong shape", "[2, 1, 4, 16]"]);
    inputs(&[2, 1, 8, 8], &[0, 4]);
    refuse(&here, &args, 1, &["y", "class out of range", "is 4"]);
    inputs(&[2, 1, 8, 8], &[0]);
    refuse(&here, &args, 1, &["must be"]);
    write(&here.join("in.safetensors"), [TensorRecord::f32("x", &[2, 1, 8, 8], &pixels)], &BTreeMap::new()).unwrap();
    refuse(&here, &args, 1, &["in.safetensors: t", "missing tensor"]);
    assert!(!here.join("out.safetensors").exists());
}
