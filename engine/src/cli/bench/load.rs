//! Loading a model against the disk, and starting the program.

use super::{Keep, Subject};
use crate::backend::Device;
use crate::cli::{out, table::Table};
use crate::error::{Error, Result};
use crate::io::jsonl::JsonLog;
use crate::io::{atomic, files, system};
use crate::models::pixart::{self, PixArt, PixArtConfig, SaveAs};
use crate::tensor::DType;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Bytes of a read when the disk is measured.
const PART: usize = 8 << 20;
/// Blocks of the largest model.
const DEPTH: usize = 28;

/// Arguments of `load`.
#[derive(clap::Args)]
pub struct LoadArgs {
    /// Gigabytes of the transformer, PixArt-Σ with as many blocks as fit; 2.44 is all of it.
    #[arg(long, default_value_t = 2.44)]
    gb: f64,
    /// Folder on the disk to be measured; the model is written there first and removed at the end.
    #[arg(long, value_name = "DIR", default_value = "target/bench-load")]
    dir: PathBuf,
    /// Round the weights of products to bf16 as they are read.
    #[arg(long)]
    bf16: bool,
    /// Leave the model in the folder, and use the one that is there.
    #[arg(long)]
    keep_model: bool,
    /// Measurements of each, in turns.
    #[arg(long, default_value_t = 3)]
    samples: usize,
    /// Add the row to this file.
    #[arg(long, value_name = "FILE")]
    rows: Option<PathBuf>,
}

/// `graft bench load`.
pub fn run(args: &LoadArgs, json: bool) -> Result<()> {
    if !(args.gb > 0.0 && args.gb <= 3.0) || args.samples == 0 {
        return Err(Error::usage("--gb", "out of range").is(args.gb).must("above 0 and at most 3, with a sample"));
    }
    atomic::ensure_writable_dir(&args.dir)?;
    let folder = args.dir.join("transformer");
    let weights = folder.join("diffusion_pytorch_model.safetensors");
    if !(args.keep_model && weights.is_file()) {
        write(args.gb, &folder)?;
    }
    let outcome = measure(args, &folder, &weights);
    if !args.keep_model {
        files::list(&folder)?.iter().try_for_each(|file| atomic::remove(file))?;
    }
    let row = outcome?;
    if let Some(path) = &args.rows {
        JsonLog::resume(path, u64::MAX)?.append(&row)?;
    }
    if json {
        return out::line(row.to_string());
    }
    let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
    let rate = |key: &str| format!("{:.2}", number("bytes") / number(key) / 1e6);
    let mut table = Table::new(&["what", "seconds", "GB/s"]);
    table.row(["sequential read".into(), format!("{:.2}", number("read_ms") / 1e3), rate("read_ms")]);
    table.row(["loading".into(), format!("{:.2}", number("load_ms") / 1e3), rate("load_ms")]);
    out::line(format!("{table}{:.0} % of the disk's rate", 100.0 * number("share")))
}

/// Writes a transformer of random weights.
fn write(gb: f64, folder: &Path) -> Result<()> {
    let bytes = |depth: usize| -> Result<f64> {
        let config = PixArtConfig { blocks: vec![block()?; depth], ..PixArtConfig::sigma_xl(512)? };
        Ok(4.0 * PixArt::unset(config, &Device::dry())?.params.elements() as f64 / 1e9)
    };
    let (one, two) = (bytes(1)?, bytes(2)?);
    let depth = (1.0 + (gb - one) / (two - one)).round().clamp(1.0, DEPTH as f64) as usize;
    let config = PixArtConfig { blocks: vec![block()?; depth], ..PixArtConfig::sigma_xl(512)? };
    let model = PixArt::random(config, &Device::cpu(), 1)?;
    pixart::save(&model, folder, SaveAs::F32, &BTreeMap::new())
}

/// A block of the published model.
fn block() -> Result<crate::models::dit::BlockSpec> {
    let config = PixArtConfig::sigma_xl(512)?;
    config.blocks.into_iter().next().ok_or_else(|| Error::failure("bench load", "a model without blocks"))
}

/// The disk and the loader in turns, each with the file dropped from memory before.
fn measure(args: &LoadArgs, folder: &Path, weights: &Path) -> Result<Value> {
    let device = Device::cpu();
    let (mut reads, mut loads, mut bytes) = (Vec::new(), Vec::new(), 0);
    for _ in 0..args.samples {
        system::forget_file(weights)?;
        let begun = Instant::now();
        bytes = system::read_through(weights, PART)?;
        reads.push(1e3 * begun.elapsed().as_secs_f64());
        system::forget_file(weights)?;
        let begun = Instant::now();
        let model = pixart::load(folder, &device, args.bf16)?;
        loads.push(1e3 * begun.elapsed().as_secs_f64());
        drop(model);
        device.trim();
    }
    let work = if args.bf16 { "load, rounded to bf16" } else { "load" };
    let row = Subject { bench: "load", case: "safetensors".into(), work: work.into() }.row(
        &device,
        DType::F32,
        loads.clone(),
    );
    let median = |values: &[f64]| {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted[(sorted.len() - 1) / 2]
    };
    let (read, load) = (median(&reads), median(&loads));
    let mut value = serde_json::to_value(&row).unwrap_or_default();
    value["bytes"] = json!(bytes);
    value["read_ms"] = json!(read);
    value["load_ms"] = json!(load);
    value["ms"] = json!(load);
    value["read_all_ms"] = json!(reads);
    value["load_all_ms"] = json!(loads);
    value["share"] = json!(read / load);
    Ok(value)
}

/// Arguments of `start`.
#[derive(clap::Args)]
pub struct StartArgs {
    /// Measurements.
    #[arg(long, default_value_t = 30)]
    samples: usize,
    #[command(flatten)]
    keep: Keep,
}

/// `graft bench start`: from nothing to the end of `graft --help`.
pub fn start(args: &StartArgs, json: bool) -> Result<()> {
    let failed = |e: std::io::Error| Error::failure("bench start", format!("cannot run this program: {e}"));
    let this = std::env::current_exe().map_err(failed)?;
    let device = Device::cpu();
    let mut run = || {
        let status = Command::new(&this).arg("--help").stdout(Stdio::null()).status().map_err(failed)?;
        if status.success() { Ok(()) } else { Err(Error::failure("bench start", "graft --help failed")) }
    };
    let times = device.time(args.samples, Duration::from_secs(10), &mut run)?;
    let mut row =
        Subject { bench: "start", case: "graft --help".into(), work: "start".into() }.row(&device, DType::F32, times);
    row.threads = None;
    let mut rows = args.keep.open(json)?;
    rows.put(row)?;
    rows.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;

    #[test]
    fn a_small_model_is_written_loaded_and_measured() {
        let folder = test_dir("bench_load").join("transformer");
        let config = PixArtConfig { caption_channels: 8, ..PixArtConfig::plain(1, 32, 2) };
        let model = PixArt::random(config, &Device::cpu(), 1).unwrap();
        pixart::save(&model, &folder, SaveAs::F32, &BTreeMap::new()).unwrap();
        let args = LoadArgs { gb: 1.0, dir: folder.clone(), bf16: false, keep_model: true, samples: 2, rows: None };
        let weights = folder.join("diffusion_pytorch_model.safetensors");
        let row = measure(&args, &folder, &weights).unwrap();
        let number = |key: &str| row[key].as_f64().unwrap();
        assert_eq!(number("share"), number("read_ms") / number("load_ms"));
        assert_eq!(row["bytes"].as_u64().unwrap(), std::fs::metadata(&weights).unwrap().len());
        assert_eq!(row["load_all_ms"].as_array().unwrap().len(), 2);
    }
}
