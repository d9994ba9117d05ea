//! Sizes and operators of a checkpoint that does not state them, read off its tensors.

use super::DitConfig;
use super::names::Layout;
use crate::error::{Error, Result};
use crate::models::source::Source;
use crate::nn::operators::{self, Recognised, Shapes, Site};

/// An option that a checkpoint leaves open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assumed {
    /// Block of the operator.
    pub block: usize,
    /// Site in the block.
    pub site: Site,
    /// Name of the option.
    pub option: &'static str,
}

/// Reads the sizes of an original checkpoint off its tensors; the number of heads is that of the published width.
pub(super) fn sizes(source: &dyn Source) -> Result<DitConfig> {
    let place = source.place();
    let shape = |name: &str| -> Result<Vec<usize>> {
        let t = source.tensor(name).ok_or_else(|| {
            Error::failure(format!("{place}: {name}"), "missing tensor").must("present in an original DiT checkpoint")
        })?;
        Ok(t.shape().to_vec())
    };
    let names = source.names();
    if Layout::of(names.iter().map(String::as_str)) != Some(Layout::Original) {
        return Err(Error::failure(&place, "unknown layout")
            .is(format!("{} tensors, none named blocks.*", names.len()))
            .must("an original DiT checkpoint, or a folder with config.json"));
    }
    let unexpected = |name: &str, found: &[usize]| {
        Error::failure(format!("{place}: {name}"), "wrong shape").is(format!("{found:?}"))
    };
    let patch_shape = shape("x_embedder.proj.weight")?;
    let &[width, in_channels, patch, _] = patch_shape.as_slice() else {
        return Err(unexpected("x_embedder.proj.weight", &patch_shape));
    };
    let pos = shape("pos_embed")?;
    let &[1, tokens, _] = pos.as_slice() else { return Err(unexpected("pos_embed", &pos)) };
    let outputs = shape("final_layer.linear.bias")?;
    let labels = shape("y_embedder.embedding_table.weight")?;
    let per_patch = in_channels.saturating_mul(patch).saturating_mul(patch);
    let heads = DitConfig::heads_of_width(width).ok_or_else(|| {
        Error::failure(&place, "the number of heads cannot be told from the file")
            .is(format!("width {width}"))
            .must("a published width (384, 768, 1024, 1152)")
            .fix("put a config.json with num_heads beside the checkpoint")
    })?;
    let depth = (0..1000).take_while(|i| names.contains(&format!("blocks.{i}.adaLN_modulation.1.weight"))).count();
    let config = DitConfig {
        patch,
        input_size: tokens.isqrt().saturating_mul(patch),
        in_channels,
        learn_sigma: outputs.first() == Some(&per_patch.saturating_mul(2)),
        classes: labels.first().map_or(0, |n| n.saturating_sub(1)),
        ..DitConfig::plain(depth, width, heads)
    };
    config.check().map_err(|e| e.context(&place))?;
    Ok(config)
}

/// Sets the operators of every block, and the pairs that run in parallel, to what the tensors of an original layout
/// are; returns the options that they leave open. Other layouts are left as the configuration has them.
///
/// # Errors
/// A site whose tensors are those of no operator.
pub(super) fn operators(config: &mut DitConfig, source: &dyn Source) -> Result<Vec<Assumed>> {
    let shapes = source.shapes();
    if Layout::of(shapes.keys().map(String::as_str)) != Some(Layout::Original) {
        return Ok(Vec::new());
    }
    let dims = config.block_dims();
    let mut known: Vec<(Site, Shapes, Option<Recognised>)> = Vec::new();
    let mut assumed = Vec::new();
    for block in 0..config.depth() {
        for site in [Site::Attn, Site::Mlp] {
            let found = below(&shapes, &format!("blocks.{block}.{site}."));
            let recognised = match known.iter().find(|(s, f, _)| *s == site && *f == found) {
                Some((.., recognised)) => recognised.clone(),
                None => {
                    let recognised = operators::recognise(site, &found, dims);
                    known.push((site, found.clone(), recognised.clone()));
                    recognised
                }
            };
            match (recognised, config.spec_mut(block, site)) {
                (Some(Recognised { spec, assumed: open }), Some(place)) => {
                    *place = spec;
                    assumed.extend(open.iter().map(|option| Assumed { block, site, option }));
                }
                _ if plain_in_part(site, &found) => {}
                _ => {
                    let found: Vec<String> = found.iter().map(|(name, shape)| format!("{name} {shape:?}")).collect();
                    return Err(Error::failure(
                        format!("{}: blocks.{block}.{site}", source.place()),
                        "unknown operator",
                    )
                    .is(found.join(", "))
                    .must(format!("the tensors of {}", operators::recognisable(site).join(", ")))
                    .fix(
                        "check that the sizes are those of this model; other operators need a folder of this program",
                    ));
                }
            }
        }
    }
    config.pairs =
        (0..config.depth() / 2).filter(|j| shapes.contains_key(&format!("pairs.{j}.merge.weight"))).collect();
    Ok(assumed)
}

/// The entries whose names begin with `prefix`, named without it.
fn below(shapes: &Shapes, prefix: &str) -> Shapes {
    let range = shapes.range(prefix.to_string()..).map_while(|(name, shape)| Some((name.strip_prefix(prefix)?, shape)));
    range.map(|(name, shape)| (name.to_string(), shape.clone())).collect()
}

/// Whether these are some tensors of the plain operator and no others: loading then says which one is missing or what
/// its shape must be.
fn plain_in_part(site: Site, found: &Shapes) -> bool {
    let layers = if site == Site::Attn { ["qkv", "proj"] } else { ["fc1", "fc2"] };
    let is_plain =
        |name: &str| name.rsplit_once('.').is_some_and(|(l, p)| layers.contains(&l) && (p == "weight" || p == "bias"));
    found.keys().all(|name| is_plain(name))
}
