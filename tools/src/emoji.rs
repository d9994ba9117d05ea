//! Renders the emoji that four sets draw under the same names, for the small text-to-image model:
//! `cargo run --release -p graft-tools --features emoji --bin emoji [CACHE]`.
//!
//! Reads `CACHE/emoji-<style>/icons.json` and writes `CACHE/emoji/sheet.png`, whose rows are pictures of 32x32, and
//! `CACHE/emoji/captions.jsonl`, a line for every row: caption, concept, style, and whether the pair is held out. The
//! same for animals, plants, food and drink alone goes to `CACHE/emoji-nature`.

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
/// The set whose groups of concepts are used, and those of the smaller selection.
const GROUPED: &str = "noto";
const NATURE: [&str; 2] = ["Animals & Nature", "Food & Drink"];
const FIX_FETCH: &str = "fix: fetch the emoji sets with tools/setup/fetch_data.py";
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
    let members = nature(&cache.join(format!("emoji-{GROUPED}/metadata.json")))?;
    let (mut all, mut some) = (Selection::default(), Selection::default());
    for concept in &concepts {
        for (style, set) in sets.iter().enumerate() {
            let picture = set.render(concept)?;
            all.add(concept, style, &picture);
            if members.contains(concept) {
                some.add(concept, style, &picture);
            }
        }
    }
    Ok(format!("{}\n{}", all.write(&cache.join("emoji"))?, some.write(&cache.join("emoji-nature"))?))
}

/// Concepts of the groups of the smaller selection.
fn nature(path: &Path) -> Result<BTreeSet<String>, String> {
    let value = read_json(path)?;
    let mut members = BTreeSet::new();
    for group in NATURE {
        let names = value["categories"][group].as_array();
        let names = names.ok_or_else(|| format!("{}: no group {group}; {FIX_FETCH}", path.display()))?;
        members.extend(names.iter().filter_map(Value::as_str).map(str::to_string));
    }
    Ok(members)
}

/// Pictures with captions.
#[derive(Default)]
struct Selection {
    pixels: Vec<u8>,
    lines: String,
    rows: usize,
    held_out: usize,
}

impl Selection {
    fn add(&mut self, concept: &str, style: usize, picture: &[u8]) {
        let out = held_out(concept) == Some(style);
        let style = STYLES[style];
        let caption = format!("{}, {style} style", concept.replace('-', " "));
        let line = json!({ "caption": caption, "concept": concept, "style": style, "held_out": out });
        self.pixels.extend_from_slice(picture);
        self.lines.push_str(&format!("{line}\n"));
        self.rows += 1;
        self.held_out += usize::from(out);
    }

    fn write(&self, folder: &Path) -> Result<String, String> {
        std::fs::create_dir_all(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        replace(&folder.join("sheet.png"), &sheet(self.rows, &self.pixels)?)?;
        replace(&folder.join("captions.jsonl"), self.lines.as_bytes())?;
        Ok(format!("{}: {} pictures, {} of them held out", folder.display(), self.rows, self.held_out))
    }
}

/// The style that a concept is not shown in when a model trains: a function of its name.
fn held_out(concept: &str) -> Option<usize> {
    let digest = Sha256::digest(concept.as_bytes());
    (digest[0] < HELD_OUT).then_some(usize::from(digest[1]) % STYLES.len())
}

fn read_json(path: &Path) -> Result<Value, String> {
    let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}; {FIX_FETCH}", path.display()))?;
    serde_json::from_slice(&bytes).map_err(|e| format!("{}: {e}; {FIX_FETCH}", path.display()))
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
        let mut value = read_json(path)?;
        let side = |name: &str| value.get(name).and_then(Value::as_f64).unwrap_or(16.0);
        let size = [side("width"), side("height")];
        match value["icons"].take() {
            Value::Object(icons) => Ok(Set { place, icons, size }),
            _ => Err(format!("{place}: no icons; {FIX_FETCH}")),
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
