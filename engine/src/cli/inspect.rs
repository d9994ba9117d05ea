//! `graft inspect FILE|DIR`: what a model, a tensor file or a picture is.

use super::{out, table::Table};
use crate::error::{Error, Result};
use crate::io::safetensors::TensorFile;
use crate::io::torch_zip::TorchFile;
use crate::io::{files, png};
use crate::models::dit::{self, DitConfig};
use crate::nn::operators::{self, Site, SiteFlops};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    /// Model folder, tensor file (safetensors, .pt) or PNG.
    path: PathBuf,
}

/// Runs the command.
pub fn run(args: &Args, json: bool) -> Result<()> {
    let path = &args.path;
    if !path.exists() {
        return Err(Error::failure(path.display().to_string(), "no such file or folder").fix("check the path"));
    }
    let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
    let (record, text) = if path.is_dir() {
        model(path)?
    } else {
        match extension.as_str() {
            "png" => picture(path)?,
            "safetensors" => tensors(path, &safetensors(path)?),
            "pt" | "pth" | "bin" => checkpoint(path)?,
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
fn checkpoint(path: &Path) -> Result<(Value, String)> {
    let listing = torch(path)?;
    let (mut record, text) = tensors(path, &listing);
    let head = if listing.0.iter().any(|(name, ..)| name.starts_with("blocks.")) {
        match model(path) {
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

fn model(path: &Path) -> Result<(Value, String)> {
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
    let sites = sites(&config)?;
    let total: f64 = sites.iter().map(|s| s.flops.total()).sum();
    let mut table = Table::new(&["site", "layers", "operator", "GFLOP operator", "GFLOP projections"]);
    for site in grouped(&sites) {
        let (layers, first) = (site.0, site.1);
        let giga = |v: f64| format!("{:.4}", v / 1e9);
        table.row([
            first.site.to_string(),
            layers,
            first.operator.clone(),
            giga(first.flops.operator),
            giga(first.flops.projections),
        ]);
    }
    let mut open: Vec<&str> = dit::assumptions(path)?.iter().map(|a| a.option).collect();
    open.dedup();
    let c = &config;
    let text = format!(
        "{}: DiT, {} blocks{}, width {}, {} heads, patch {}, input {}x{}x{}, {} tokens, {} classes{}\n\
         {} parameters in {} ({elements} stored elements, {})\n\
         {:.3} GFLOP per image and step in its sites (per layer below){}\n{table}{}",
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
        parameters(&config)?,
        weights.iter().map(|f| files::file_name(f)).collect::<Vec<_>>().join(", "),
        dtypes.iter().map(|(d, n)| format!("{n} {d}")).collect::<Vec<_>>().join(", "),
        total / 1e9,
        assumed(&open),
        metadata.iter().map(|(k, v)| format!("{k} = {v}\n")).collect::<String>(),
    );
    let layers: Vec<Value> = sites
        .iter()
        .map(|s| json!({ "layer": s.layer, "site": s.site, "operator": s.operator, "flops_operator": s.flops.operator, "flops_projections": s.flops.projections }))
        .collect();
    let record = json!({
        "model": path.display().to_string(), "class": "DiT", "depth": c.depth(), "serial_depth": c.serial_depth(), "pairs": c.pairs, "width": c.width, "heads": c.heads,
        "patch": c.patch, "input_size": c.input_size, "in_channels": c.in_channels, "out_channels": c.out_channels(),
        "tokens": c.tokens(), "classes": c.classes, "learn_sigma": c.learn_sigma, "parameters": parameters(&config)?,
        "dtypes": dtypes, "metadata": metadata, "sites": layers, "site_flops": total, "assumed": open,
    });
    Ok((record, text))
}

/// ` (pairs 0-3 in parallel, serial depth 4)`, or nothing.
fn parallel(config: &DitConfig) -> String {
    match config.pairs.as_slice() {
        [] => String::new(),
        pairs => format!(" (pairs {} in parallel, serial depth {})", ranges(pairs), config.serial_depth()),
    }
}

/// One site of one layer.
struct SiteRow {
    layer: usize,
    site: Site,
    operator: String,
    flops: SiteFlops,
}

fn sites(config: &DitConfig) -> Result<Vec<SiteRow>> {
    let mut rows = Vec::new();
    for (layer, block) in config.blocks.iter().enumerate() {
        for (site, spec) in [(Site::Attn, &block.attn), (Site::Mlp, &block.mlp)] {
            let (flops, _) = dit::site_cost(config, spec, site)?;
            rows.push(SiteRow { layer, site, operator: spec.to_string(), flops });
        }
    }
    Ok(rows)
}

/// Number of parameters with the operators that the blocks have.
fn parameters(config: &DitConfig) -> Result<usize> {
    let plain = DitConfig { blocks: vec![DitConfig::plain_block(config.heads, 4.0); config.depth()], ..config.clone() };
    let mut count = plain.parameters();
    for (block, plain) in config.blocks.iter().zip(&plain.blocks) {
        for (site, own, usual) in [(Site::Attn, &block.attn, &plain.attn), (Site::Mlp, &block.mlp, &plain.mlp)] {
            count += dit::site_cost(config, own, site)?.1;
            count -= dit::site_cost(config, usual, site)?.1;
        }
    }
    Ok(count)
}

/// Layers with the same operator at the same site in one line: `0-3,5`.
fn grouped(sites: &[SiteRow]) -> Vec<(String, &SiteRow)> {
    let mut groups: Vec<(Vec<usize>, &SiteRow)> = Vec::new();
    for row in sites {
        match groups.iter_mut().find(|(_, first)| first.site == row.site && first.operator == row.operator) {
            Some((layers, _)) => layers.push(row.layer),
            None => groups.push((vec![row.layer], row)),
        }
    }
    groups.into_iter().map(|(layers, first)| (ranges(&layers), first)).collect()
}

/// Ascending numbers as ranges.
fn ranges(numbers: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &n in numbers {
        match parts.last_mut() {
            Some((_, end)) if *end + 1 == n => *end = n,
            _ => parts.push((n, n)),
        }
    }
    let part = |&(a, b): &(usize, usize)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    parts.iter().map(part).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_ranges() {
        assert_eq!(ranges(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn parameters_follow_the_operators() {
        let mut config = DitConfig::named("DiT-XL/2").unwrap();
        assert_eq!(parameters(&config).unwrap(), 674_834_720);
        // Hyena-X with four taps: the projections of attention, and 3·D filters of four taps and a bias.
        config.blocks[0].attn = crate::nn::operators::Spec::new("hyena_x").with("taps", 4.0);
        assert_eq!(parameters(&config).unwrap(), 674_834_720 + 3 * 1152 * 5);
    }
}
