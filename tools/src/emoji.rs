//! Renders the emoji that four sets draw under the same names, for the small text-to-image model:
//! `cargo run --release -p graft-tools --features emoji --bin emoji [CACHE]`.
//!
//! Reads `CACHE/emoji-<style>/icons.json` and writes `CACHE/emoji/sheet.png`, whose rows are pictures of 32x32, and
//! `CACHE/emoji/captions.jsonl`, a line for every row: caption, concept, style, and whether the pair is held out.

use resvg::tiny_skia::{Color, Pixmap, Transform};
use resvg::usvg::{Options, Tree};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Styles, as captions name them; each is the folder `emoji-<style>`.
const STYLES: [&str; 4] = ["fluent", "noto", "openmoji", "twemoji"];
/// Side of a picture, and pixels rendered along a side of each of its pixels.
const SIDE: usize = 32;
const FINER: usize = 4;
/// Of 256 concepts so many have one style held out: 8 % of all pairs.
const HELD_OUT: u8 = 82;

fn main() -> ExitCode {
    let cache = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("data-cache"), PathBuf::from);
    match run(&cache) {
        Ok(message) => {
            println!("{message}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn run(cache: &Path) -> Result<String, String> {
    let sets = STYLES.map(|style| Set::read(&cache.join(format!("emoji-{style}/icons.json"))));
    let sets = sets.into_iter().collect::<Result<Vec<Set>, String>>()?;
    let mut concepts = sets[0].names();
    for set in &sets[1..] {
        concepts = concepts.intersection(&set.names()).cloned().collect();
    }
    let (mut pixels, mut lines, mut held) = (Vec::new(), String::new(), 0);
    for concept in &concepts {
        let without = held_out(concept);
        for (style, set) in sets.iter().enumerate() {
            pixels.extend(set.render(concept)?);
            let caption = format!("{}, {} style", concept.replace('-', " "), STYLES[style]);
            let out = without == Some(style);
            held += usize::from(out);
            let line = json!({ "caption": caption, "concept": concept, "style": STYLES[style], "held_out": out });
            lines.push_str(&format!("{line}\n"));
        }
    }
    let rows = concepts.len() * STYLES.len();
    let folder = cache.join("emoji");
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    replace(&folder.join("sheet.png"), &sheet(rows, &pixels)?)?;
    replace(&folder.join("captions.jsonl"), lines.as_bytes())?;
    Ok(format!("{}: {} concepts in {} styles, {held} pairs held out", folder.display(), concepts.len(), STYLES.len()))
}

/// The style that a concept is not shown in when a model trains: a function of its name.
fn held_out(concept: &str) -> Option<usize> {
    let digest = Sha256::digest(concept.as_bytes());
    (digest[0] < HELD_OUT).then_some(usize::from(digest[1]) % STYLES.len())
}

/// A set of vector pictures.
struct Set {
    place: String,
    icons: Map<String, Value>,
    /// Size of a picture that does not state its own.
    size: [f64; 2],
}

impl Set {
    fn read(path: &Path) -> Result<Set, String> {
        let place = path.display().to_string();
        let fix = "fix: fetch it with tools/setup/fetch_data.py";
        let bytes = std::fs::read(path).map_err(|e| format!("{place}: {e}; {fix}"))?;
        let mut value: Value = serde_json::from_slice(&bytes).map_err(|e| format!("{place}: {e}; {fix}"))?;
        let side = |name: &str| value.get(name).and_then(Value::as_f64).unwrap_or(16.0);
        let size = [side("width"), side("height")];
        match value["icons"].take() {
            Value::Object(icons) => Ok(Set { place, icons, size }),
            _ => Err(format!("{place}: no icons; {fix}")),
        }
    }

    /// Names of the pictures. Tones of skin are named otherwise in every set, so that none is shared.
    fn names(&self) -> BTreeSet<String> {
        self.icons.keys().cloned().collect()
    }

    /// A picture on white, `[SIDE, SIDE, 3]`: rendered finer, then averaged.
    fn render(&self, name: &str) -> Result<Vec<u8>, String> {
        let wrong = |what: String| format!("{}: {name}: {what}", self.place);
        let icon = &self.icons[name];
        let body = icon["body"].as_str().ok_or_else(|| wrong("no picture".into()))?;
        let number = |key: &str, default: f64| icon[key].as_f64().unwrap_or(default);
        let (x, y) = (number("left", 0.0), number("top", 0.0));
        let (w, h) = (number("width", self.size[0]), number("height", self.size[1]));
        let side = SIDE * FINER;
        let text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" xmlns:xlink=\"http://www.w3.org/1999/xlink\" \
             width=\"{side}\" height=\"{side}\" viewBox=\"{x} {y} {w} {h}\">{body}</svg>"
        );
        let tree = Tree::from_str(&text, &Options::default()).map_err(|e| wrong(e.to_string()))?;
        let mut canvas = Pixmap::new(side as u32, side as u32).ok_or_else(|| wrong("no canvas".into()))?;
        canvas.fill(Color::WHITE);
        resvg::render(&tree, Transform::identity(), &mut canvas.as_mut());
        let fine = canvas.data();
        let mut out = Vec::with_capacity(SIDE * SIDE * 3);
        for at in 0..SIDE * SIDE {
            let (row, column) = (at / SIDE * FINER, at % SIDE * FINER);
            for channel in 0..3 {
                let cells = (0..FINER * FINER).map(|i| (row + i / FINER) * side + column + i % FINER);
                let sum: usize = cells.map(|cell| usize::from(fine[cell * 4 + channel])).sum();
                out.push(((sum + FINER * FINER / 2) / (FINER * FINER)) as u8);
            }
        }
        Ok(out)
    }
}

fn sheet(rows: usize, pixels: &[u8]) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, (SIDE * SIDE) as u32, rows as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().map_err(|e| e.to_string())?;
    writer.write_image_data(pixels).map_err(|e| e.to_string())?;
    writer.finish().map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// Writes a file under another name first, so that it is never half there.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), String> {
    let beside = path.with_extension("tmp");
    let written = std::fs::write(&beside, bytes).and_then(|()| std::fs::rename(&beside, path));
    written.map_err(|e| format!("{}: {e}", path.display()))
}
