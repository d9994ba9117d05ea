//! `graft locality MODEL`: how much of each layer's attention stays near the diagonal.

use super::model_args::{class_names, parse_labels, short_name};
use super::{out, progress, table::Table};
use crate::backend;
use crate::error::{Error, Result};
use crate::graft::locality::{self, FILE, Locality, Protocol};
use crate::io::png;
use crate::models::dit;
use crate::report::heat::HeatMap;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Model folder, or a checkpoint file.
    model: PathBuf,
    /// Half widths of the band: tokens at most this far apart in raster order are near. Powers of two where not given.
    #[arg(short, long, value_delimiter = ',', value_name = "K,K,…")]
    k: Vec<usize>,
    /// Images sampled, as published where not given.
    #[arg(long, default_value_t = Protocol::PUBLISHED.samples, value_name = "N")]
    samples: usize,
    /// DDIM steps of each.
    #[arg(long, default_value_t = Protocol::PUBLISHED.steps, value_name = "N")]
    steps: usize,
    /// Classifier-free guidance scale; 1 is none.
    #[arg(long, default_value_t = Protocol::PUBLISHED.guidance, value_name = "S", alias = "cfg-scale")]
    guidance_scale: f64,
    /// Seed of the first image.
    #[arg(short, long, default_value_t = Protocol::PUBLISHED.seed)]
    seed: u64,
    /// Classes of the images in turn, by number or name; all where not given.
    #[arg(long, value_name = "CLASSES")]
    classes: Option<String>,
    /// Heat map to write: layers by half widths.
    #[arg(short, long, value_name = "PNG")]
    output: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: &Args, json: bool) -> Result<()> {
    if args.samples == 0 {
        return Err(Error::usage("--samples", "no images").is(0).must("at least 1"));
    }
    let model = dit::load(&args.model, &backend::open("cpu")?)?;
    let classes = match &args.classes {
        Some(text) => parse_labels(text, &class_names(&args.model, model.config.classes)?, model.config.classes)?,
        None => Vec::new(),
    };
    let protocol =
        Protocol { samples: args.samples, steps: args.steps, guidance: args.guidance_scale, seed: args.seed };
    let beside = args.model.is_dir().then(|| args.model.join(FILE));
    let files: Vec<&Path> = beside.iter().map(AsRef::as_ref).collect();
    let bar = progress::bar((args.samples * args.steps) as u64, "sample");
    let found = locality::measured(&model, protocol, &classes, &files, &mut |done, _| bar.set_position(done))?;
    bar.finish();
    let ks = if args.k.is_empty() { powers(found.tokens) } else { args.k.clone() };
    if let Some(path) = &args.output {
        let picture = heat_map(args, &found, &ks).draw()?;
        let metadata = BTreeMap::from([(png::RECORD_KEY.to_string(), record(args, &found, &ks).to_string())]);
        if path.as_os_str() == "-" {
            return out::bytes(&png::encode(&picture, &metadata)?);
        }
        png::write(path, &picture, &metadata)?;
    }
    if json {
        return out::line(format!("{:#}", record(args, &found, &ks)));
    }
    out::line(text(&found, &ks))
}

/// 1, 2, 4, … below the number of tokens.
fn powers(tokens: usize) -> Vec<usize> {
    std::iter::successors(Some(1usize), |k| k.checked_mul(2)).take_while(|k| *k < tokens.max(2)).collect()
}

fn described(p: &Protocol) -> String {
    format!("{} images, {} DDIM steps, guidance {}, seed {}", p.samples, p.steps, p.guidance, p.seed)
}

fn text(found: &Locality, ks: &[usize]) -> String {
    let mut head = vec!["layer".to_string()];
    head.extend(ks.iter().map(|k| format!("k={k}")));
    let mut table = Table::new(&head.iter().map(String::as_str).collect::<Vec<_>>());
    let bands: Vec<Vec<Option<f64>>> = ks.iter().map(|k| found.band(*k)).collect();
    for layer in 0..found.layers.len() {
        let mut cells = vec![layer.to_string()];
        cells.extend(bands.iter().map(|band| band[layer].map_or("-".into(), |l| format!("{l:.4}"))));
        table.row(cells);
    }
    format!("attention within k tokens, of {}; {}\n{table}", found.tokens, described(&found.protocol))
        .trim_end()
        .to_string()
}

fn record(args: &Args, found: &Locality, ks: &[usize]) -> Value {
    let bands: Vec<Value> = ks.iter().map(|k| json!({ "k": k, "layers": found.band(*k) })).collect();
    json!({
        "model": args.model.display().to_string(), "model_digest": found.model, "tokens": found.tokens,
        "protocol": found.protocol, "classes": found.classes, "bands": bands,
    })
}

fn heat_map(args: &Args, found: &Locality, ks: &[usize]) -> HeatMap {
    let bands: Vec<Vec<Option<f64>>> = ks.iter().map(|k| found.band(*k)).collect();
    HeatMap {
        title: format!("Attention within k tokens: {}", short_name(&args.model)),
        note: format!("share of {} tokens in raster order; {}", found.tokens, described(&found.protocol)),
        rows: (0..found.layers.len()).map(|i| format!("layer {i}")).collect(),
        columns: ks.iter().map(|k| format!("k={k}")).collect(),
        cells: (0..found.layers.len()).map(|i| bands.iter().map(|band| band[i]).collect()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_widths_by_default() {
        assert_eq!(powers(49), [1, 2, 4, 8, 16, 32]);
        assert_eq!(powers(256), [1, 2, 4, 8, 16, 32, 64, 128]);
        assert_eq!(powers(1), [1]);
    }
}
