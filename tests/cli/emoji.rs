//! Text to image in pixels: a run that trains on captions, and the shipped model.

use crate::support::{entries, folder, refuse, run, succeed};
use graft_engine::eval::retrieval::{coarse, distance};
use graft_engine::io::png::{self, Image};
use std::collections::BTreeMap;
use std::path::Path;

/// Six rows as the emoji program writes them: three concepts in two styles, one pair held out.
fn data(folder: &Path) {
    let side = 32 * 32;
    let colours: [[u8; 3]; 6] = [[250, 0, 0], [200, 60, 60], [0, 250, 0], [60, 200, 60], [0, 0, 250], [60, 60, 200]];
    let pixels = colours.iter().flat_map(|c| c.repeat(side)).collect();
    std::fs::create_dir_all(folder).unwrap();
    png::write(&folder.join("sheet.png"), &Image::new(side, 6, 3, pixels).unwrap(), &BTreeMap::new()).unwrap();
    let lines = ["ant", "bee", "cow"].iter().flat_map(|concept| {
        ["noto", "twemoji"].map(|style| {
            let held_out = (*concept, style) == ("cow", "noto");
            format!(
                "{{\"caption\":\"{concept}, {style} style\",\"concept\":\"{concept}\",\"held_out\":{held_out},\
                 \"style\":\"{style}\"}}\n"
            )
        })
    });
    std::fs::write(folder.join("captions.jsonl"), lines.collect::<String>()).unwrap();
}

const CONFIG: &str = r#"
    [data]
    kind = "emoji"
    dir = "data"
    [model]
    depth = 2
    width = 32
    heads = 2
    patch = 8
    [text]
    depth = 1
    width = 16
    heads = 2
    hidden = 32
    max_tokens = 8
    [train]
    steps = 6
    batch = 4
    checkpoint_every = 2
    [optimizer]
    lr = 1e-3
    ema = 0.9
"#;

#[test]
fn a_run_on_captions_makes_a_model_that_draws() {
    let here = folder("emoji_train");
    data(&here.join("data"));
    std::fs::write(here.join("c.toml"), CONFIG).unwrap();
    let train = |run: &str, more: &[&str]| succeed(&here, &[&["pretrain", "c.toml", "--run", run], more].concat());
    train("whole", &[]);
    // In two parts it is the same run.
    train("parts", &["--stop-after", "3"]);
    train("parts", &[]);
    for file in [
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
    ] {
        let read = |run: &str| std::fs::read(here.join(run).join("model").join(file)).unwrap();
        assert_eq!(read("whole"), read("parts"), "{file}");
    }
    let log = std::fs::read_to_string(here.join("parts/loss.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 6);

    let base = ["sample", "--model", "whole/model", "--steps", "2", "-p", "ant"];
    let draw = |more: &[&str]| succeed(&here, &[&base[..], more].concat());
    draw(&["--styles", "noto", "-o", "one.png"]);
    let (image, record) = png::read(&here.join("one.png")).unwrap();
    assert_eq!((image.width(), image.height(), image.channels()), (32, 32, 3));
    assert!(record["graft"].contains("\"prompts\":[\"ant, noto style\"]"), "{}", record["graft"]);
    // Rows are prompts, columns are styles; every picture is what it is alone.
    draw(&["-p", "cow", "--styles", "noto,twemoji", "--grid", "rows", "-o", "sheet.png"]);
    draw(&["-p", "cow", "--styles", "noto,twemoji", "-o", "out/"]);
    assert_eq!(entries(&here.join("out")), ["0.png", "1.png", "2.png", "3.png"]);
    let alone = png::read(&here.join("out/0.png")).unwrap().0;
    assert_eq!(alone.pixels(), image.pixels());
    let sheet = png::read(&here.join("sheet.png")).unwrap().0;
    assert!(sheet.width() > 2 * 96 && sheet.height() > 2 * 96, "{} x {}", sheet.width(), sheet.height());
    // Pictures are latents here: one to begin with needs no autoencoder, and a mask keeps what it keeps.
    draw(&["--init-image", "one.png", "--strength", "0.5", "-o", "again.png"]);
    let mask = Image::new(32, 32, 3, (0..32 * 32).flat_map(|i| [if i < 512 { 0 } else { 255 }; 3]).collect());
    png::write(&here.join("mask.png"), &mask.unwrap(), &BTreeMap::new()).unwrap();
    draw(&["--inpaint", "one.png", "--mask", "mask.png", "-o", "filled.png"]);
    let filled = png::read(&here.join("filled.png")).unwrap().0;
    assert_eq!(filled.pixels()[..512 * 3], image.pixels()[..512 * 3]);
    assert_ne!(filled.pixels()[512 * 3..], image.pixels()[512 * 3..]);
    assert!(draw(&["--plan-memory"]).text().contains("transformer: "));

    let eval = ["eval", "whole/model", "--captions", "data", "--sampler", "dpm++", "--steps", "2", "--n", "3"];
    let text = succeed(&here, &eval).text();
    assert!(text.contains("seen in training: 3 pictures") && text.contains("held out: 1 pictures"), "{text}");
    std::fs::remove_file(here.join("data/sheet.png")).unwrap();
    refuse(&here, &eval, 1, &["sheet.png", "data file missing"]);
}

#[test]
fn configurations_that_cannot_be_are_named() {
    let here = folder("emoji_bad");
    data(&here.join("data"));
    for (from, to, word) in [
        ("kind = \"emoji\"", "kind = \"mnist\"", "no data set with captions"),
        ("heads = 2\n    hidden", "heads = 3\n    hidden", "text: heads"),
        ("patch = 8", "patch = 8\n    colour = 1", "colour"),
    ] {
        std::fs::write(here.join("c.toml"), CONFIG.replace(from, to)).unwrap();
        let ran = run(&here, &["pretrain", "c.toml", "--run", "r"]);
        assert!(ran.code != 0 && ran.stderr.contains(word), "{word}: {}", ran.stderr);
    }
}

/// Concepts on `assets/emoji-pixart/real.png`, from the left; the last two were never seen in this style.
const CONCEPTS: [&str; 8] = ["red apple", "banana", "panda", "strawberry", "frog", "whale", "broccoli", "crab"];

/// The shipped model is found, and of eight real pictures the one that was asked for is mostly the nearest.
#[test]
fn the_shipped_model_draws_what_it_is_asked_for() {
    let here = folder("emoji_shipped");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let real = png::read(&root.join("assets/emoji-pixart/real.png")).unwrap().0;
    let features = |image: &Image, left: usize| {
        let value = |c: usize, i: usize| {
            let at = (i / 32 * image.width() + left + i % 32) * 3 + c;
            f32::from(image.pixels()[at]) / 127.5 - 1.0
        };
        let planes: Vec<f32> =
            (0..3).flat_map(|c| (0..32 * 32).map(move |i| (c, i))).map(|(c, i)| value(c, i)).collect();
        coarse(&planes, 3, 32).unwrap()
    };
    let out = here.join("out").display().to_string() + "/";
    let mut args = vec!["sample", "--styles", "noto", "--steps", "12", "--dtype", "bf16", "-o", &out];
    CONCEPTS.iter().for_each(|concept| args.extend(["-p", concept]));
    succeed(&root, &args);
    let mut right = 0;
    for number in 0..CONCEPTS.len() {
        let drawn = features(&png::read(&here.join(format!("out/{number}.png"))).unwrap().0, 0);
        let distances: Vec<f64> = (0..CONCEPTS.len()).map(|i| distance(&drawn, &features(&real, 32 * i))).collect();
        let nearer = distances.iter().filter(|d| **d < distances[number]).count();
        right += usize::from(nearer == 0);
    }
    // By chance it is one of them.
    assert!(right >= 6, "{right} of {}", CONCEPTS.len());
}
