//! `graft eval`: scores in shards and in one piece, held-out loss, inpainting, and what it refuses.

use crate::support::{command, entries, folder, model, refuse, run, succeed};
use graft_engine::io::png::{self, Image};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

fn asset(relative: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets").join(relative).display().to_string()
}

/// `graft eval` with the shipped classifier and few reference images.
fn scoring(more: &[&str]) -> Vec<String> {
    let fixed = [
        "eval".to_string(),
        "--json".into(),
        format!("--ref=fashion-mnist={}", asset("fashion-mnist")),
        format!("--classifier={}", asset("fashion-classifier")),
        "--ref-n=400".into(),
        "--steps=2".into(),
    ];
    fixed.into_iter().chain(more.iter().map(|s| s.to_string())).collect()
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn good(here: &Path, args: &[String]) -> String {
    succeed(here, &args.iter().map(String::as_str).collect::<Vec<_>>()).text()
}

fn bad(here: &Path, args: &[String], code: i32, words: &[&str]) {
    refuse(here, &args.iter().map(String::as_str).collect::<Vec<_>>(), code, words);
}

#[test]
fn shards_make_the_samples_of_one_run_and_then_score_them() {
    let here = folder("eval-shards");
    let model = asset("fashion-dit/model");
    let whole = good(&here, &scoring(&[&model, "--n=120", "--seeds=0,1"]));
    let share = |i: &str| scoring(&[&model, "--n=120", "--seeds=0,1", "--samples-dir=kept", i]);
    let waiting = parsed(&good(&here, &share("--shard=1/2")));
    assert_eq!((&waiting["samples_made"], &waiting["samples_wanted"]), (&40.into(), &240.into()));
    assert_eq!(entries(&here.join("kept")), ["set-0", "set-1"]);
    assert_eq!(good(&here, &share("--shard=0/2")), whole);
    // Nothing is left to make; a lost part is made again, to the same bytes.
    let part = here.join("kept/set-1/samples-00000000-100.safetensors");
    let bytes = std::fs::read(&part).unwrap();
    std::fs::remove_file(&part).unwrap();
    assert_eq!(good(&here, &share("--batch=7")), whole);
    assert_eq!(std::fs::read(&part).unwrap(), bytes);
    let scores = parsed(&whole);
    assert_eq!((&scores["sets"], scores["scores"].as_array().unwrap().len()), (&serde_json::json!([0, 1]), 2));
    let frechet = |row: &Value| row["frechet"].as_f64().unwrap();
    let (mean, sd) = (frechet(&scores["samples"]), frechet(&scores["sd"]));
    let [a, b] = [0, 1].map(|i| frechet(&scores["scores"][i]));
    assert!((mean - (a + b) / 2.0).abs() < 1e-9 && (sd - (a - b).abs() / 2f64.sqrt()).abs() < 1e-9 && sd > 0.0);
    assert!(frechet(&scores["real"]["mean"]) < mean, "{scores}");
    bad(
        &here,
        &scoring(&[&model, "--n=120", "--samples-dir=kept", "--guidance-scale=3"]),
        1,
        &["samples of another recipe", "guidance_scale 1.5", "guidance_scale 3.0"],
    );
}

#[test]
fn pictures_and_arrays_are_scored_as_they_are() {
    let here = folder("eval-pictures");
    std::fs::create_dir(here.join("pictures")).unwrap();
    let pixels = |i: u32| (0..784u32).map(|p| ((p * (i + 3) * 7) % 251) as u8).collect::<Vec<u8>>();
    for i in 0..12 {
        let image = Image::new(28, 28, 1, pixels(i)).unwrap();
        png::write(&here.join(format!("pictures/{i:02}.png")), &image, &BTreeMap::new()).unwrap();
    }
    let found = parsed(&good(&here, &scoring(&["pictures"])));
    assert_eq!((&found["samples"]["n"], &found["samples"]["agreement"]), (&12.into(), &Value::Null));
    assert!(found["real"]["mean"]["frechet"].as_f64() < found["samples"]["frechet"].as_f64());
    // As a reference they are real images without others to hold samples to.
    let mut args = scoring(&["pictures", "--n=6"]);
    args[2] = "--ref=pictures".into();
    args.retain(|a| a != "--json" && a != "--ref-n=400");
    let text = good(&here, &args);
    assert!(
        text.contains("no other real images") && text.contains("6 samples") && text.contains("mostly bias"),
        "{text}"
    );
    bad(&here, &scoring(&["pictures", "--n=13"]), 2, &["--n", "is 13", "at most 12"]);
    bad(&here, &scoring(&["pictures", "--seeds=0,1"]), 2, &["--seeds", "there already"]);
    std::fs::write(here.join("broken.npz"), b"PK no").unwrap();
    bad(&here, &scoring(&["broken.npz"]), 1, &["broken.npz", "damaged zip archive"]);
}

#[test]
fn loss_and_inpainting_on_held_out_images() {
    let here = folder("eval-held-out");
    let model = asset("fashion-dit/model");
    let loss = |more: &[&str]| parsed(&good(&here, &scoring(&[&[&model[..], "--loss", "--n=60"], more].concat())));
    let found = loss(&[]);
    assert_eq!(found, loss(&["--batch=7", "--threads=1"]));
    let quarters: Vec<f64> =
        found["loss"]["quartiles"].as_array().unwrap().iter().map(|q| q.as_f64().unwrap()).collect();
    // Noise is easiest to tell where there is most of it; a trained model is far from the 1 of guessing nothing.
    assert!(quarters.windows(2).all(|w| w[0] > w[1]) && quarters[3] < 0.05, "{quarters:?}");
    let holes = |more: &[&str]| {
        let args = [&[&model[..], "--inpaint", "--n=10", "--steps=10"], more].concat();
        let mut args = scoring(&args);
        args.retain(|a| a != "--steps=2");
        parsed(&good(&here, &args))["inpainting"].clone()
    };
    let (once, again) = (holes(&[]), holes(&["--rounds=3"]));
    for found in [&once, &again] {
        assert_eq!((&found["n"], &found["hole"]), (&10.into(), &14.into()));
        assert!(found["psnr"].as_f64() > found["psnr_flat"].as_f64(), "{found}");
        assert!(found["agreement"].as_f64().unwrap() >= 0.5 && found["agreement_real"].as_f64().unwrap() >= 0.8);
    }
    assert_ne!(once["rmse"], again["rmse"]);
}

#[test]
fn sampling_keeps_what_the_mask_leaves_black() {
    let here = folder("eval-inpaint");
    model(&here, 1);
    let grey = |w: usize, pixels: Vec<u8>| Image::new(w, pixels.len() / w, 1, pixels).unwrap();
    let image = grey(8, (0..64).map(|i| 4 * i).collect());
    let mask = grey(8, (0..64).map(|i| if i % 8 < 4 { 255 } else { 0 }).collect());
    for (name, picture) in [("image.png", &image), ("mask.png", &mask), ("small.png", &grey(4, vec![0; 16]))] {
        png::write(&here.join(name), picture, &BTreeMap::new()).unwrap();
    }
    png::write(&here.join("black.png"), &grey(8, vec![0; 64]), &BTreeMap::new()).unwrap();
    let draw = ["sample", "--model", "model", "--class", "1", "--n", "2", "--steps", "4", "-o", "out/"];
    let fill = |more: &[&'static str]| [&draw[..], &["--inpaint", "image.png", "--mask"], more].concat();
    succeed(&here, &fill(&["mask.png", "--rounds", "2"]));
    for seed in ["0", "1"] {
        let (drawn, metadata) = png::read(&here.join(format!("out/{seed}.png"))).unwrap();
        let kept = |i: usize| drawn.pixels()[i] == image.pixels()[i];
        assert!((0..64).filter(|i| i % 8 >= 4).all(kept) && !(0..64).all(kept));
        assert_eq!(parsed(&metadata["graft"])["rounds"], 2);
    }
    refuse(&here, &fill(&["small.png"]), 2, &["small.png", "does not fit the model", "is 4 x 4", "8 x 8"]);
    refuse(&here, &fill(&["black.png"]), 2, &["--mask", "nothing to fill in"]);
    refuse(&here, &fill(&["mask.png", "--rounds", "0"]), 2, &["--rounds", "is 0"]);
    refuse(&here, &fill(&["mask.png", "--rounds", "2", "--sampler", "dpm++"]), 2, &["--rounds", "ddim or ddpm"]);
    assert_eq!(run(&here, &[&draw[..], &["--inpaint", "image.png"]].concat()).code, 2);
}

#[test]
fn impossible_evaluations() {
    let here = folder("eval-errors");
    model(&here, 1);
    let shipped = asset("fashion-dit/model");
    bad(&here, &scoring(&["model"]), 2, &["does not make the images", "8 x 8", "--features inception"]);
    bad(&here, &scoring(&["model", "--loss"]), 2, &["does not take the images", "[1, 28, 28]"]);
    bad(&here, &scoring(&["model", "--inpaint"]), 2, &["does not take the images"]);
    bad(&here, &scoring(&["nowhere"]), 1, &["nowhere"]);
    bad(&here, &scoring(&[&shipped, "--n=401"]), 2, &["--n", "is 401"]);
    bad(&here, &scoring(&[&shipped, "--seeds=1,1"]), 2, &["--seeds", "is 1"]);
    bad(&here, &scoring(&[&shipped, "--logits=x"]), 2, &["--logits", "--features inception"]);
    bad(&here, &scoring(&[&shipped, "--loss", "--n=2001"]), 2, &["--n", "is 2001", "1 to 2000"]);
    let mut args = scoring(&[&shipped]);
    args[2] = "--ref=imagenet".into();
    bad(&here, &args, 2, &["--ref", "imagenet", "cifar10"]);
    for more in [&["--shard=0/2"][..], &["--samples-dir=s", "--shard=2/2"], &["--loss", "--inpaint"]] {
        assert_eq!(run(&here, &scoring(&[&[&shipped[..]], more].concat())).code, 2, "{more:?}");
    }
    let named = command(&here, &scoring(&[&shipped, "--features=inception"]))
        .env("GRAFT_INCEPTION", "missing.pt")
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&named.stderr).into_owned();
    assert!(named.status.code() == Some(1) && message.contains("GRAFT_INCEPTION: no such file"), "{message}");
    let absent = command(&here, &scoring(&[&shipped, "--features=inception"])).env_remove("GRAFT_INCEPTION").output();
    let message = String::from_utf8_lossy(&absent.unwrap().stderr).into_owned();
    assert!(message.contains("no network") && message.contains("fetch_data.py inception"), "{message}");
    assert_eq!(entries(&here), ["model"]);
}
