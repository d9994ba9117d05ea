//! Models that read text: `graft sample -p`, `graft encode`, `graft forward`.

use crate::support::{entries, folder, golden, refuse, run, succeed};
use graft_engine::backend::Device;
use graft_engine::io::png;
use graft_engine::io::safetensors::{TensorFile, TensorRecord, write};
use graft_engine::models::pixart::{PixArt, PixArtConfig};
use graft_engine::models::t5::{T5, T5Config};
use std::collections::BTreeMap;
use std::path::Path;

fn copy(from: &str, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for file in std::fs::read_dir(golden(from)).unwrap() {
        let file = file.unwrap().path();
        if file.is_file() {
            std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
        }
    }
}

/// A whole small model: transformer in the original's names, text encoder, the recorded tokenizer and autoencoder.
pub fn pipeline(here: &Path) {
    let device = Device::cpu();
    let config = PixArtConfig { sample_size: 8, caption_channels: 24, ..PixArtConfig::plain(2, 48, 3) };
    let model = PixArt::random(config, &device, 3).unwrap();
    let folder = here.join("model/transformer");
    std::fs::create_dir_all(&folder).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<f32>)> = model
        .params
        .iter()
        .map(|(_, p)| (p.name.clone(), p.value.shape().dims().to_vec(), p.value.to_vec().unwrap()))
        .collect();
    let records = tensors.iter().map(|(n, s, v)| TensorRecord::f32(n.clone(), s, v));
    write(&folder.join("model.safetensors"), records, &BTreeMap::new()).unwrap();
    let stated = r#"{"num_heads": 3, "sample_size": 8, "interpolation_scale": 1, "max_tokens": 12}"#;
    std::fs::write(folder.join("config.json"), stated).unwrap();

    let sizes =
        T5Config { width: 24, heads: 2, head_width: 8, hidden: 32, depth: 2, vocabulary: 300, ..T5Config::xxl() };
    let encoder = T5::new(sizes, &device, 5).unwrap();
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    for (_, param) in encoder.params.iter() {
        let (shape, values) = (param.value.shape().dims().to_vec(), param.value.to_vec().unwrap());
        match param.name.split_once(".qkv.") {
            None => tensors.push((param.name.clone(), shape, values)),
            Some((layer, end)) => {
                for (part, values) in ["q", "k", "v"].iter().zip(values.chunks(values.len() / 3)) {
                    tensors.push((format!("{layer}.{part}.{end}"), vec![shape[0] / 3, shape[1]], values.to_vec()));
                }
            }
        }
    }
    let folder = here.join("model/text_encoder");
    std::fs::create_dir_all(&folder).unwrap();
    let records = tensors.iter().map(|(n, s, v)| TensorRecord::f32(n.clone(), s, v));
    write(&folder.join("model.safetensors"), records, &BTreeMap::new()).unwrap();
    copy("t5/tokenizer/model", &here.join("model/tokenizer"));
    copy("vae/kl_diffusers/model", &here.join("model/vae"));
    copy("samplers/dpm_solver_pp_2m_n10/model/scheduler", &here.join("model/scheduler"));
}

const BASE: [&str; 6] = ["sample", "--model", "model", "--steps", "3", "-p"];

#[test]
fn pictures_from_text_are_reproducible_and_say_how_they_were_made() {
    let here = folder("text");
    pipeline(&here);
    let draw = |file: &str, more: &[&str]| {
        succeed(&here, &[&BASE[..], &["a red fox", "-o", file], more].concat());
        std::fs::read(here.join(file)).unwrap()
    };
    let first = draw("a.png", &["--seed", "4"]);
    assert_eq!(first, draw("a.png", &["--seed", "4", "--threads", "1"]));
    assert_eq!(first, draw("a.png", &["--seed", "4", "--text-encoder", "stream"]));
    for more in [
        &["--seed", "5"][..],
        &["--seed", "4", "--negative-prompt", "blue"],
        &["--seed", "4", "--compat", "official"],
        &["--seed", "4", "--guidance-scale", "1"],
        &["--seed", "4", "--sampler", "ddim"],
        &["--seed", "4", "--dtype", "bf16"],
    ] {
        assert_ne!(first, draw("b.png", more), "{more:?}");
    }
    let (image, metadata) = png::read(&here.join("a.png")).unwrap();
    assert_eq!((image.width(), image.height(), image.channels()), (32, 32, 3));
    let record: serde_json::Value = serde_json::from_str(&metadata["graft"]).unwrap();
    assert_eq!(record["prompts"], serde_json::json!(["a red fox"]));
    assert_eq!((&record["seed"], &record["steps"], &record["sampler"]), (&4.into(), &3.into(), &"dpm++".into()));
    assert_eq!((&record["guidance_scale"], &record["compat"]), (&4.5.into(), &"diffusers".into()));
    assert!(succeed(&here, &["inspect", "a.png"]).text().contains("a red fox"));
    assert!(succeed(&here, &["inspect", "model"]).text().contains("PixArt"));
}

#[test]
fn several_prompts_and_images_have_seeds_of_their_own() {
    let here = folder("text_many");
    pipeline(&here);
    let args = [&BASE[..], &["a fox", "-p", "snow", "--n", "2", "--seed", "7", "-o", "out/", "-W", "48", "-H", "32"]];
    succeed(&here, &args.concat());
    assert_eq!(entries(&here.join("out")), ["10.png", "7.png", "8.png", "9.png"]);
    let one = [&BASE[..], &["snow", "--seed", "9", "-o", "one.png", "--size", "48x32"]];
    succeed(&here, &one.concat());
    let read = |name: &str| png::read(&here.join(name)).unwrap();
    let ((alone, _), (third, record)) = (read("one.png"), read("out/9.png"));
    assert_eq!(alone.pixels(), third.pixels());
    let record: serde_json::Value = serde_json::from_str(&record["graft"]).unwrap();
    assert_eq!((&record["seed"], &record["prompts"]), (&9.into(), &serde_json::json!(["snow"])));
}

#[test]
fn features_can_be_kept_and_latents_too() {
    let here = folder("text_encode");
    pipeline(&here);
    succeed(&here, &["encode", "--model", "model", "-p", "a red fox", "-p", "snow", "-o", "e.safetensors"]);
    let file = TensorFile::open(&here.join("e.safetensors")).unwrap();
    let (text, mask) = (file.get("text").unwrap(), file.get("text_mask").unwrap());
    assert_eq!((text.shape[0], text.shape[2], mask.shape), (2, 24, &text.shape[..2]));
    assert_eq!(file.get("negative_mask").unwrap().to_i64().unwrap(), [1, 1]);
    let tail = ["--seed", "1", "--output-latents"];
    succeed(&here, &[&BASE[..], &["a red fox", "-p", "snow"], &tail[..], &["p.safetensors"]].concat());
    let from_file = ["sample", "--model", "model", "--steps", "3", "--embeddings", "e.safetensors"];
    succeed(&here, &[&from_file[..], &tail[..], &["q.safetensors"]].concat());
    let latents = |name: &str| TensorFile::open(&here.join(name)).unwrap().get("latents").unwrap().to_f32().unwrap();
    assert_eq!(latents("p.safetensors"), latents("q.safetensors"));
    // Given noise replaces that of the seed: one step from noise and from the same noise in a file.
    let noise = [0.5f32; 4 * 8 * 8];
    let record = TensorRecord::f32("latents", &[1, 4, 8, 8], &noise);
    write(&here.join("n.safetensors"), [record], &BTreeMap::new()).unwrap();
    let given = |seed: &str, file: &str| {
        let more = ["fox", "--latents", "n.safetensors", "--seed", seed, "--output-latents", file];
        succeed(&here, &[&BASE[..], &more[..]].concat());
        latents(file)
    };
    assert_eq!(given("1", "r.safetensors"), given("2", "s.safetensors"));
}

#[test]
fn parts_may_lie_elsewhere_and_one_that_is_missing_is_named() {
    let here = folder("text_parts");
    pipeline(&here);
    std::fs::create_dir_all(here.join("bare")).unwrap();
    std::fs::rename(here.join("model/transformer"), here.join("bare/transformer")).unwrap();
    let base = ["sample", "--steps", "2", "-p", "fox", "-o", "a.png", "--model", "bare"];
    refuse(&here, &base, 2, &["the autoencoder is missing", "--components"]);
    succeed(&here, &[&base[..], &["--components", "model"]].concat());
    let each =
        ["--vae", "model/vae", "--text-encoder", "model/text_encoder", "--tokenizer", "model/tokenizer/spiece.model"];
    succeed(&here, &[&base[..], &each[..]].concat());
    refuse(&here, &[&base[..], &["--vae", "none"]].concat(), 2, &["--vae: no such file or folder"]);
    refuse(
        &here,
        &[&base[..], &each[..], &["--size", "40x20"]].concat(),
        2,
        &["sides do not divide", "multiples of 8"],
    );
    let single = golden("vae/kl_ldm_single_file/model/vae.safetensors");
    refuse(&here, &[&base[..], &each[2..], &["--vae", &single]].concat(), 1, &["norm_num_groups"]);
}

#[test]
fn pictures_to_begin_with_and_to_fill_in() {
    let here = folder("text_edit");
    pipeline(&here);
    let grey = |name: &str, f: &dyn Fn(usize) -> u8| {
        let pixels = (0..32 * 32).flat_map(|i| [f(i); 3]).collect();
        png::write(&here.join(name), &png::Image::new(32, 32, 3, pixels).unwrap(), &BTreeMap::new()).unwrap();
    };
    grey("base.png", &|i| (i / 4) as u8);
    grey("mask.png", &|i| if i % 32 < 16 { 255 } else { 0 });
    succeed(&here, &[&BASE[..], &["fox", "--init-image", "base.png", "--strength", "0.5", "-o", "a.png"]].concat());
    succeed(&here, &[&BASE[..], &["fox", "--inpaint", "base.png", "--mask", "mask.png", "-o", "b.png"]].concat());
    let pixels = |name: &str| png::read(&here.join(name)).unwrap().0.pixels().to_vec();
    let (base, filled) = (pixels("base.png"), pixels("b.png"));
    for i in 0..32 * 32 {
        let same = base[3 * i..3 * i + 3] == filled[3 * i..3 * i + 3];
        assert!(same || i % 32 < 16, "pixel {i} is to be kept");
    }
    assert_ne!(base, filled);
    let tiny = golden("vae/tiny/model");
    let ran = run(&here, &[&BASE[..], &["fox", "--vae", &tiny, "--size", "64x64", "-o", "c.png"]].concat());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(png::read(&here.join("c.png")).unwrap().0.width(), 64);
}

#[test]
fn long_prompts_and_memory_are_told() {
    let here = folder("text_long");
    pipeline(&here);
    let long = "a fox in heavy snow beside the old lighthouse and the sea";
    let ran = succeed(&here, &[&BASE[..], &[long, "-o", "a.png"]].concat());
    assert!(ran.stderr.contains("longer than 12 tokens; not read: "), "{}", ran.stderr);
    let plan = succeed(&here, &[&BASE[..], &["fox", "--plan-memory"]].concat()).text();
    for word in ["text encoder: ", "transformer: ", "decoder: ", "at most "] {
        assert!(plan.contains(word), "{plan}");
    }
    let words = ["sample", "--model", "model", "-o", "b.png"];
    refuse(&here, &words, 2, &["--prompt: not given"]);
    assert!(!entries(&here).contains(&"b.png".to_string()));
}

#[test]
fn a_value_that_is_not_finite_stops_everything() {
    let here = folder("text_nan");
    pipeline(&here);
    let path = here.join("model/vae/diffusion_pytorch_model.safetensors");
    let file = TensorFile::open(&path).unwrap();
    let mut tensors: Vec<_> =
        file.iter().map(|t| (t.name.to_string(), t.shape.to_vec(), t.to_f32().unwrap())).collect();
    let last = tensors.iter_mut().find(|(name, ..)| name == "decoder.conv_out.weight").unwrap();
    last.2.fill(3e38);
    let records = tensors.iter().map(|(n, s, v)| TensorRecord::f32(n.clone(), s, v));
    write(&path, records, &BTreeMap::new()).unwrap();
    refuse(&here, &[&BASE[..], &["fox", "-o", "a.png"]].concat(), 1, &["vae: picture: result is not finite"]);
    assert!(!entries(&here).contains(&"a.png".to_string()));
}

#[test]
fn forward_reads_text_in_both_semantics() {
    let here = folder("text_forward");
    let case = golden("pixart_diffusers/rect_gradients");
    let want = TensorFile::open(&Path::new(&case).join("expected.safetensors")).unwrap();
    let want = want.get("output").unwrap().to_f32().unwrap();
    for semantics in ["original", "diffusers"] {
        let (model, inputs) = (format!("{case}/model"), format!("{case}/inputs.safetensors"));
        let base = ["forward", "--model", &model, "--inputs", &inputs, "-o", "o.safetensors", "--semantics", semantics];
        succeed(&here, &base);
        let got = TensorFile::open(&here.join("o.safetensors")).unwrap().get("output").unwrap().to_f32().unwrap();
        let worst = got.iter().zip(&want).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(worst < 5.4e-5, "{semantics}: {worst}");
    }
    let wrong = run(&here, &["sample", "--model", &golden("dit_diffusers/single_file/model"), "-p", "fox"]);
    assert!(wrong.code == 2 && wrong.stderr.contains("does not read text"), "{}", wrong.stderr);
}
