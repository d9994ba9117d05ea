//! The operator of a configuration: its name, its site, and the options in a file of its own.

use super::{Reader, quoted};
use crate::error::{Error, Result};
use crate::io::files;
use crate::io::yaml::{self, Node};
use crate::models::dit::DitConfig;
use crate::nn::operators::{Kind, REGISTRY, Site};
use std::path::{Path, PathBuf};

/// An operator as it goes into the plan.
pub(super) struct Operator {
    pub site: Site,
    /// `{ kind = …, … }`.
    pub text: String,
}

/// Keys of operator files that are an option, with the names that it may have.
const OPTIONS: [(&str, &[&str]); 9] = [
    ("short_filter_order", &["taps"]),
    ("num_heads", &["heads"]),
    ("expansion_ratio", &["ratio"]),
    ("window_size", &["half_window", "window"]),
    ("d_state", &["d_state", "state"]),
    ("d_conv", &["d_conv", "taps"]),
    ("expand", &["expand"]),
    ("headdim", &["headdim", "head_width"]),
    ("inner_filter_len", &["inner_taps"]),
];

/// Keys whose operators exist with one value alone, with the spellings of it.
const FIXED: [(&str, &[&str]); 16] = [
    ("order", &["2"]),
    ("inner_factor", &["1"]),
    ("num_blocks", &["1"]),
    ("qkv_bias", &["True", "true"]),
    ("qkv_proj_bias", &["True", "true"]),
    ("out_proj_bias", &["True", "true"]),
    ("cross_attn", &["False", "false"]),
    ("causal", &["False", "false"]),
    ("dwconv", &["False", "false"]),
    ("return_residual", &["False", "false"]),
    ("rotary_emb_dim", &["0"]),
    ("dropout", &["0", "0.0"]),
    ("num_heads_kv", &[]),
    ("softmax_scale", &[]),
    ("rotary_emb_scale_base", &[]),
    ("num_heads", &["1"]),
];

/// Keys that change nothing about what an operator computes.
const INERT: [&str; 10] = [
    "l_max",
    "fused_bias_fc",
    "use_flash_attn",
    "layer_idx",
    "checkpointing",
    "device",
    "dtype",
    "rotary_emb_base",
    "rotary_emb_interleaved",
    "activation",
];

/// Keys for the model's width.
const WIDTH: [&str; 3] = ["dim", "embed_dim", "d_model"];

/// Reads the operator.
///
/// # Errors
/// An operator that this version does not have, or an option that is no number.
pub(super) fn read(r: &mut Reader<'_>, root: &Node, folder: &Path, model: &DitConfig) -> Result<Operator> {
    let node = r.map(root, "operator")?;
    r.unknown_keys(node, &["type", "name", "config_filepath"]);
    let name = node.get("name").ok_or_else(|| r.refuse(node, "the operator has no name"))?;
    let options = options(r, node, folder)?;
    let kind = kind(r, name, options.as_ref())?;
    check_site(r, node, kind);
    let mut parts = vec![format!("kind = {}", quoted(kind.name))];
    if let Some((file, options)) = &options {
        let mut own = Reader { file, warnings: Vec::new() };
        for (key, value) in options.entries().unwrap_or_default() {
            if let Some((option, number)) = option(&mut own, kind, key, value, model)? {
                parts.push(format!("{option} = {number}"));
            }
        }
        r.warnings.append(&mut own.warnings);
    }
    Ok(Operator { site: kind.site, text: format!("{{ {} }}", parts.join(", ")) })
}

/// The operator's own file, with the name it goes by in messages; none, with a warning, where there is no such file.
fn options(r: &mut Reader<'_>, operator: &Node, folder: &Path) -> Result<Option<(String, Node)>> {
    let Some(path) = operator.get("config_filepath").filter(|p| !p.is_none()) else {
        r.warn(operator, "the operator has no config_filepath: it takes its published options");
        return Ok(None);
    };
    let text = path.text().ok_or_else(|| r.refuse(path, "config_filepath is not a path"))?;
    // Paths count from the root of the authors' repository, somewhere above the configuration.
    let found: Option<PathBuf> = folder.ancestors().map(|above| above.join(text)).find(|p| p.is_file());
    let Some(found) = found else {
        r.warn(path, format!("there is no operator file {text}: the operator takes its published options"));
        return Ok(None);
    };
    let name = found.display().to_string();
    let node = yaml::parse(&name, &files::read_text(&found)?)?;
    Ok(Some((name, node)))
}

/// The kind in the registry.
fn kind(r: &Reader<'_>, name: &Node, options: Option<&(String, Node)>) -> Result<&'static Kind> {
    let text = name.text().unwrap_or_default();
    // The released code builds windowed attention under either name, by a key of the operator's file.
    let windowed = options.is_some_and(|(_, o)| o.get("use_flash_attn").is_some() || o.get("window_size").is_some());
    let wanted = if text == "mha" && windowed { "swa" } else { text };
    REGISTRY.iter().find(|k| k.name == wanted).ok_or_else(|| {
        let known: Vec<&str> = REGISTRY.iter().map(|k| k.name).collect();
        r.refuse(name, "this version has no such operator").must(format!("one of {}", known.join(", ")))
    })
}

fn check_site(r: &mut Reader<'_>, operator: &Node, kind: &Kind) {
    let want = if kind.site == Site::Attn { "mha" } else { "mlp" };
    if let Some(site) = operator.get("type").filter(|t| t.text() != Some(want)) {
        r.warn(site, format!("type does not fit operator {}, which replaces {want}", kind.name));
    }
    let path = operator.get("config_filepath").and_then(|p| Some((p, p.text()?)));
    let other = if kind.site == Site::Attn { "channel_mixers" } else { "sequence_mixers" };
    if let Some((node, _)) = path.filter(|(_, p)| p.contains(other) || kind.site == Site::Mlp && p.contains("/mha/")) {
        r.warn(node, format!("the file is for operators of the other site, {} replaces {want}", kind.name));
    }
}

/// An option of the plan from a key of the operator's file.
fn option(
    r: &mut Reader<'_>,
    kind: &Kind,
    key: &Node,
    value: &Node,
    model: &DitConfig,
) -> Result<Option<(&'static str, f64)>> {
    let name = key.text().unwrap_or_default();
    if WIDTH.contains(&name) {
        if value.number() != Some(model.width as f64) {
            r.warn(value, format!("{name} is not the model's width of {}", model.width));
        }
        return Ok(None);
    }
    let names = OPTIONS.iter().find(|(known, _)| *known == name).map_or(&[][..], |(_, names)| names);
    let known = names.iter().find(|n| kind.options.iter().any(|(option, _)| option == *n)).copied();
    if let Some(option) = known {
        let number = number(r, name, value)?;
        // The plan's operator takes the model's heads where it is not told otherwise.
        return Ok((option != "heads" || number != model.heads as f64).then_some((option, number)));
    }
    if name == "inner_filter_len" {
        // Hyena-SE and -Y size their inner filter by short_filter_order in the released code.
        return Ok(None);
    }
    match FIXED.iter().find(|(known, _)| *known == name) {
        Some((_, spellings)) if value.text().map_or(value.is_none(), |t| spellings.contains(&t)) => {}
        Some((_, spellings)) => {
            let must = spellings.first().unwrap_or(&"null");
            r.warn(value, format!("{name} is left out: operator {} has it at {must} only", kind.name));
        }
        None if INERT.contains(&name) => {}
        None => r.warn(key, format!("unknown key {name} is left out")),
    }
    Ok(None)
}

/// A number, or the half width of a window `[w, w]`.
fn number(r: &Reader<'_>, name: &str, value: &Node) -> Result<f64> {
    let wrong = |problem: String| -> Error { r.refuse(value, problem) };
    match value.items() {
        None => value.number().ok_or_else(|| wrong(format!("{name} is not a number"))),
        Some([left, right]) if left.number().is_some() && left.number() == right.number() => {
            left.number().ok_or_else(|| wrong(format!("{name} is not a number")))
        }
        Some(_) => Err(wrong(format!("{name} is not a symmetric window")).must("two equal numbers")),
    }
}
