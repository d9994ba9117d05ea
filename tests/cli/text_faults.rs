//! Models that read text when something is wrong, or stopped: one clear error, no picture, nothing half-written; and
//! what a run says about itself.

use crate::support::{command, entries, folder, golden, refuse, run, succeed};
use crate::text::{BASE, pipeline};
use graft_engine::io::png;
use graft_engine::io::safetensors::{TensorFile, TensorRecord, write};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// Rewrites a file of tensors after `change` saw the values of each.
fn rewrite(path: &Path, change: impl Fn(&str, &mut Vec<f32>)) {
    let file = TensorFile::open(path).unwrap();
    let mut tensors: Vec<_> =
        file.iter().map(|t| (t.name.to_string(), t.shape.to_vec(), t.to_f32().unwrap())).collect();
    tensors.iter_mut().for_each(|(name, _, values)| change(name, values));
    let records = tensors.iter().map(|(n, s, v)| TensorRecord::f32(n.clone(), s, v));
    write(path, records, &BTreeMap::new()).unwrap();
}

#[test]
fn a_block_that_overflows_is_named_with_its_step() {
    let here = folder("text_overflow");
    pipeline(&here);
    rewrite(&here.join("model/transformer/model.safetensors"), |name, values| {
        if name == "blocks.1.attn.qkv.weight" {
            values.fill(3e38);
        }
    });
    let args = [&BASE[..], &["fox", "-o", "a.png", "--output-latents", "a.safetensors"]].concat();
    refuse(&here, &args, 1, &["step 1 of 3, block 1: value is not finite"]);
    assert_eq!(entries(&here), ["model"]);
}

#[test]
fn text_that_overflows_is_named_with_its_block() {
    let here = folder("text_encoder_overflow");
    pipeline(&here);
    rewrite(&here.join("model/text_encoder/model.safetensors"), |name, values| {
        if name.starts_with("encoder.block.1.layer.0.SelfAttention.") {
            values.fill(3e38);
        }
    });
    for more in [&[][..], &["--text-encoder", "stream"]] {
        refuse(&here, &[&BASE[..], &["fox", "-o", "a.png"], more].concat(), 1, &["text encoder: block 1"]);
    }
    assert_eq!(entries(&here), ["model"]);
}

#[test]
fn damaged_and_missing_parts_are_named() {
    let here = folder("text_damaged");
    pipeline(&here);
    let encoder = here.join("model/text_encoder");
    let file = TensorFile::open(&encoder.join("model.safetensors")).unwrap();
    let tensors: Vec<_> = file.iter().map(|t| (t.name.to_string(), t.shape.to_vec(), t.to_f32().unwrap())).collect();
    let mut map = serde_json::Map::new();
    for (i, half) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", i + 1);
        let records = half.iter().map(|(n, s, v)| TensorRecord::f32(n.clone(), s, v));
        write(&encoder.join(&name), records, &BTreeMap::new()).unwrap();
        half.iter().for_each(|(tensor, ..)| drop(map.insert(tensor.clone(), name.clone().into())));
    }
    drop(file);
    std::fs::remove_file(encoder.join("model.safetensors")).unwrap();
    let index = serde_json::json!({ "weight_map": map }).to_string();
    std::fs::write(encoder.join("model.safetensors.index.json"), index).unwrap();
    let args = [&BASE[..], &["fox", "-o", "a.png"]].concat();
    succeed(&here, &args);
    std::fs::remove_file(here.join("a.png")).unwrap();

    let second = encoder.join("model-00002-of-00002.safetensors");
    let bytes = std::fs::read(&second).unwrap();
    std::fs::write(&second, &bytes[..bytes.len() - 5]).unwrap();
    refuse(&here, &args, 1, &["model-00002-of-00002.safetensors", "data truncated"]);
    std::fs::remove_file(&second).unwrap();
    refuse(&here, &args, 1, &["model-00002-of-00002.safetensors: shard file missing"]);
    std::fs::remove_dir_all(&encoder).unwrap();
    refuse(&here, &args, 2, &["the text encoder is missing", "--text-encoder"]);
    std::fs::remove_dir_all(here.join("model/vae")).unwrap();
    refuse(&here, &args, 2, &["the autoencoder is missing", "--vae"]);
    assert_eq!(entries(&here), ["model"]);
}

#[test]
fn sizes_outside_the_bins_are_told() {
    let here = folder("text_bins");
    pipeline(&here);
    // 256 pixels are a published size; a latent's pixel has 4 here.
    let config = here.join("model/transformer/config.json");
    std::fs::write(&config, r#"{"num_heads": 3, "sample_size": 64, "interpolation_scale": 1, "max_tokens": 12}"#)
        .unwrap();
    let args = [&BASE[..], &["fox", "-o", "a.png", "--size", "64x256"]].concat();
    let drawn = |ran: &crate::support::Ran| {
        let record = png::read(&here.join("a.png")).unwrap().1;
        let record: serde_json::Value = serde_json::from_str(&record["graft"]).unwrap();
        (ran.stderr.contains("is no size that the model was trained at"), record["drawn"].to_string())
    };
    assert_eq!(drawn(&succeed(&here, &args)), (false, "[128,512]".to_string()));
    assert_eq!(png::read(&here.join("a.png")).unwrap().0.width(), 64);
    let exact = [&args[..], &["--no-binning"]].concat();
    assert_eq!(drawn(&succeed(&here, &exact)), (true, "[64,256]".to_string()));
}

#[test]
fn options_in_a_prompt_are_told_where_the_original_reads_them() {
    let here = folder("text_flags");
    pipeline(&here);
    let draw = |prompt: &str, compat: &str| {
        let ran = succeed(&here, &[&BASE[..], &[prompt, "-o", "a.png", "--compat", compat]].concat());
        (png::read(&here.join("a.png")).unwrap().0.pixels().to_vec(), ran.stderr.contains("--ar in the prompt"))
    };
    let (plain, _) = draw("a fox", "official");
    assert_eq!(draw("a fox --ar 16:9", "official"), (plain, true));
    // Cleaned, a prompt is the same in any case.
    assert_eq!(draw("A Fox", "diffusers").0, draw("a fox", "diffusers").0);
}

#[test]
fn stages_are_told_and_kept() {
    let here = folder("text_stages");
    pipeline(&here);
    let args = [&BASE[..], &["fox", "-o", "a.png", "--measure", "rows.jsonl"]].concat();
    for _ in 0..2 {
        let ran = succeed(&here, &args);
        for word in ["memory planned, in GiB: text encoder", "transformer: ", "GiB at most, planned "] {
            assert!(ran.stderr.contains(word), "{}", ran.stderr);
        }
    }
    let text = std::fs::read_to_string(here.join("rows.jsonl")).unwrap();
    let rows: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 2);
    let stages: Vec<&str> = rows[1]["stages"].as_array().unwrap().iter().filter_map(|s| s["stage"].as_str()).collect();
    assert_eq!(stages, ["text encoder", "transformer", "decoder"]);
    let laps = rows[1]["stages"][1]["laps"].as_array().unwrap();
    let names: Vec<&str> = laps.iter().filter_map(|lap| lap[0].as_str()).collect();
    assert_eq!(names, ["weights", "step", "step", "step"]);
    assert_eq!((&rows[1]["width"], &rows[1]["steps"]), (&32.into(), &3.into()));
    // The tensors that were alive at once are among what was planned.
    for stage in &rows[1]["stages"].as_array().unwrap()[1..] {
        let [planned, found] = ["bytes_planned", "bytes_of_tensors"].map(|key| stage[key].as_f64().unwrap());
        assert!(found <= 1.1 * planned, "{stage}");
    }
}

/// A preview after every step, then an interrupt: the preview is whole, and there is no picture.
#[test]
#[cfg(unix)]
fn an_interrupt_leaves_nothing_half_written() {
    let here = folder("text_interrupt");
    pipeline(&here);
    let decoder = golden("vae/tiny/model");
    let base = ["sample", "--model", "model", "--steps", "500", "--sampler", "ddim", "-p", "fox", "-o", "a.png"];
    let args = [&base[..], &["--preview", "p.png", "--preview-decoder", &decoder]].concat();
    let mut child = command(&here, &args).stderr(std::process::Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    while !here.join("p.png").exists() {
        assert!(begun.elapsed() < Duration::from_secs(120), "no preview");
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(Duration::from_millis(5));
    }
    let id = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    assert!(!child.wait().unwrap().success());
    assert!(png::read(&here.join("p.png")).unwrap().0.width() > 0);
    assert!(!here.join("a.png").exists());
    // What a preview was being written to is at most a temporary file, which the next run does not mind.
    let left = entries(&here).into_iter().filter(|name| name.contains("a.png"));
    assert_eq!(left.count(), 0);
    let again = run(&here, &[&BASE[..], &["fox", "-o", "a.png"]].concat());
    assert_eq!(again.code, 0, "{}", again.stderr);
}

#[test]
fn a_transformer_goes_from_one_layout_to_the_other_and_back() {
    let here = folder("text_convert");
    pipeline(&here);
    let there = succeed(&here, &["convert", "model/transformer", "there", "--to", "diffusers"]);
    assert!(there.text().contains("2 blocks, diffusers names, F32"), "{}", there.text());
    succeed(&here, &["convert", "there", "back", "--to", "original"]);
    let tensors = |path: &str| -> Vec<(String, Vec<u8>)> {
        let file = TensorFile::open(&here.join(path)).unwrap();
        file.iter().map(|t| (t.name.to_string(), t.bytes.to_vec())).collect()
    };
    assert!(tensors("model/transformer/model.safetensors") == tensors("back/model.safetensors"), "bits differ");
    let draw = |transformer: &str| {
        let parts = ["--transformer", transformer, "--components", "model", "--output-latents", "l.safetensors"];
        succeed(&here, &[&["sample", "--steps", "2", "-p", "fox"][..], &parts[..]].concat());
        tensors("l.safetensors")
    };
    assert!(draw("model/transformer") == draw("there"));
    let window = ["convert", "there", "no", "--to", "original", "--window", "3"];
    refuse(&here, &window, 2, &["--window", "no sliding windows"]);
}
