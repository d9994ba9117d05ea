//! `graft inspect FILE|DIR`: what a model, a tensor file or a picture is.

use super::{inspect_text, layers, out, table::Table};
use crate::error::{Error, Result};
use crate::graft::cost::Counter;
use crate::io::safetensors::TensorFile;
use crate::io::torch_zip::TorchFile;
use crate::io::{files, png};
use crate::models::dit::{self, DitConfig};
use crate::models::{component, pixart};
use crate::nn::operators;
use crate::report::format::{count, seconds};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Model folder, tensor file (safetensors, .pt) or PNG.
    path: PathBuf,
    /// Predict the time of every layer on a GPU: h100, a100 or h200.
    #[arg(long, value_name = "NAME")]
    gpu: Option<String>,
    /// Samples of a forward pass in the prediction; an image with guidance is two.
    #[arg(long, default_value_t = 2, value_name = "N", requires = "gpu",
          value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    batch: u64,
}

/// Runs the command.
pub fn run(args: &Args, json: bool) -> Result<()> {
    let path = &args.path;
    if !path.exists() {
        return Err(Error::failure(path.display().to_string(), "no such file or folder").fix("check the path"));
    }
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    let (record, text) = if path.is_dir() {
        model(path, args)?
    } else {
        match extension.as_str() {
            "png" => picture(path)?,
            "safetensors" => tensors(path, &safetensors(path)?),
            "pt" | "pth" | "bin" => checkpoint(path, args)?,
            other => {
                return Err(Error::failure(path.display().to_string(), "unknown kind of file")
                    .is(format!("{other:?}"))
                    .must("a model folder, .safetensors, .pt, .pth, .bin or .png"));
            }
        }
    };
    if json { out::line(format!("{record:#}")) } else { out::bytes(text.as_bytes()) }
}

/// A tensor as a file has it: name, dtype, shape.
type Entry = (String, String, Vec<usize>);

/// Tensors and metadata of a file.
type Listing = (Vec<Entry>, BTreeMap<String, String>);

fn safetensors(path: &Path) -> Result<Listing> {
    let file = TensorFile::open(path)?;
    let entries = file.iter().map(|t| (t.name.to_string(), t.dtype.to_string(), t.shape.to_vec())).collect();
    Ok((entries, file.metadata().clone()))
}

fn torch(path: &Path) -> Result<Listing> {
    let file = TorchFile::open(path)?;
    let tensors = file.state_dict()?;
    let entries = tensors.iter().map(|(name, t)| ((*name).to_string(), t.dtype().to_string(), t.shape().to_vec()));
    Ok((entries.collect(), BTreeMap::new()))
}

/// A `torch.save` file: the model or the operator that it holds, and its tensors.
fn checkpoint(path: &Path, args: &Args) -> Result<(Value, String)> {
    let listing = torch(path)?;
    let (mut record, text) = tensors(path, &listing);
    let head = if listing.0.iter().any(|(name, ..)| name.starts_with("blocks.")) {
        match model(path, args) {
            Ok((model, text)) => {
                record["describes"] = model;
                text
            }
            // Its tensors are worth showing nevertheless.
            Err(e) => format!("not readable as a model: {e}\n"),
        }
    } else {
        let shapes = listing.0.iter().map(|(name, _, shape)| (name.clone(), shape.clone())).collect();
        match operators::recognise_alone(&shapes, DitConfig::heads_of_width) {
            Some((site, dims, known)) => {
                record["operator"] = json!({ "site": site, "width": dims.width, "operator": known.spec.to_string() });
                format!("operator {} for site {site} of width {}{}\n", known.spec, dims.width, assumed(known.assumed))
            }
            None => String::new(),
        }
    };
    Ok((record, head + &text))
}

/// Says which options a checkpoint leaves open.
fn assumed(options: &[&str]) -> String {
    match options {
        [] => String::new(),
        open => format!(
            "; {} as published, since the file does not say (`graft convert` can state another)",
            open.join(", ")
        ),
    }
}

fn tensors(path: &Path, (entries, metadata): &Listing) -> (Value, String) {
    let mut table = Table::new(&["tensor", "dtype", "shape"]);
    for (name, dtype, shape) in entries {
        table.row([name.clone(), dtype.clone(), format!("{shape:?}")]);
    }
    let elements: usize = entries.iter().map(|(_, _, shape)| shape.iter().product::<usize>()).sum();
    let mut text = format!("{}: {} tensors, {elements} elements\n{table}", path.display(), entries.len());
    for (key, value) in metadata {
        text.push_str(&format!("{key} = {value}\n"));
    }
    let list: Vec<Value> = entries.iter().map(|(n, d, s)| json!({ "name": n, "dtype": d, "shape": s })).collect();
    (json!({ "file": path.display().to_string(), "elements": elements, "tensors": list, "metadata": metadata }), text)
}

fn picture(path: &Path) -> Result<(Value, String)> {
    let (image, metadata) = png::read(path)?;
    let (width, height, channels) = (image.width(), image.height(), image.channels());
    let mut text = format!("{}: {width} x {height}, {}\n", path.display(), if channels == 1 { "grey" } else { "RGB" });
    for (key, value) in &metadata {
        text.push_str(&format!("{key} = {value}\n"));
    }
    let parsed: BTreeMap<&String, Value> =
        metadata.iter().map(|(k, v)| (k, serde_json::from_str(v).unwrap_or_else(|_| json!(v)))).collect();
    let record = json!({ "file": path.display().to_string(), "width": width, "height": height, "channels": channels, "metadata": parsed });
    Ok((record, text))
}

fn model(path: &Path, args: &Args) -> Result<(Value, String)> {
    // What is wrong with a model that cannot be opened is said below.
    if pixart::is_pixart(&component(path, "transformer")).unwrap_or(false) {
        return inspect_text::model(path);
    }
    let config = dit::describe(path)?;
    let weights = dit::weight_files(path)?;
    let (mut dtypes, mut metadata, mut elements) = (BTreeMap::new(), BTreeMap::new(), 0usize);
    for file in &weights {
        let is_safe = file.extension().is_some_and(|e| e == "safetensors");
        let (entries, extra) = if is_safe { safetensors(file)? } else { torch(file)? };
        for (_, dtype, shape) in entries {
            elements += shape.iter().product::<usize>();
            *dtypes.entry(dtype).or_insert(0usize) += 1;
        }
        metadata.extend(extra);
    }
    let batch = args.batch as usize;
    let predicted = match &args.gpu {
        Some(gpu) => layers::predictions(&config, Some(gpu), batch)?,
        None => Vec::new(),
    };
    let rows = layers::rows(&config, &[], &predicted)?;
    let cost = Counter::new(&config).model()?;
    let mut table = layers::table(&rows).to_string();
    for p in &predicted {
        let whole = p.total();
        table += &format!("{}\n{}: {} for the whole model\n", layers::remark(batch), p.gpu, seconds(whole));
    }
    let mut open: Vec<&str> = dit::assumptions(path)?.iter().map(|a| a.option).collect();
    open.dedup();
    let c = &config;
    let text = format!(
        "{}: DiT, {} blocks{}, width {}, {} heads, patch {}, input {}x{}x{}, {} tokens, {} classes{}\n\
         {} parameters in {} ({elements} stored elements, {})\n\
         {}FLOP per image and step, {}FLOP of them in its sites (one layer of each line below){}\n{table}{}",
        path.display(),
        c.depth(),
        parallel(c),
        c.width,
        c.heads,
        c.patch,
        c.in_channels,
        c.input_size,
        c.input_size,
        c.tokens(),
        c.classes,
        if c.learn_sigma { ", learned variance" } else { "" },
        cost.params,
        weights.iter().map(|f| files::file_name(f)).collect::<Vec<_>>().join(", "),
        dtypes.iter().map(|(d, n)| format!("{n} {d}")).collect::<Vec<_>>().join(", "),
        count(cost.flops),
        count(cost.attn.flops() + cost.mlp.flops()),
        assumed(&open),
        metadata.iter().map(|(k, v)| format!("{k} = {v}\n")).collect::<String>(),
    );
    let record = json!({
        "model": path.display().to_string(), "class": "DiT", "depth": c.depth(), "serial_depth": c.serial_depth(), "pairs": c.pairs, "width": c.width, "heads": c.heads,
        "patch": c.patch, "input_size": c.input_size, "in_channels": c.in_channels, "out_channels": c.out_channels(),
        "tokens": c.tokens(), "classes": c.classes, "learn_sigma": c.learn_sigma, "parameters": cost.params,
        "dtypes": dtypes, "metadata": metadata, "sites": layers::json(&rows), "flops": cost.flops,
        "site_flops": cost.attn.flops() + cost.mlp.flops(), "predicted": predicted, "assumed": open,
    });
    Ok((record, text))
}

/// ` (pairs 0-3 in parallel, serial depth 4)`, or nothing.
fn parallel(config: &DitConfig) -> String {
    match config.pairs.as_slice() {
        [] => String::new(),
        pairs => format!(" (pairs {} in parallel, serial depth {})", layers::ranges(pairs), config.serial_depth()),
    }
}
