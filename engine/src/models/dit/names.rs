//! Parameter names of the two layouts: the original's (ours) and diffusers'.

use super::DitConfig;

/// Names of a model's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `blocks.0.attn.qkv.weight` …
    Original,
    /// `transformer_blocks.0.attn1.to_q.weight` …
    Diffusers,
}

impl Layout {
    /// Recognises a layout by its block names.
    pub fn of<'n>(mut names: impl Iterator<Item = &'n str>) -> Option<Layout> {
        names.find_map(|n| {
            if n.starts_with("blocks.") {
                Some(Layout::Original)
            } else if n.starts_with("transformer_blocks.") {
                Some(Layout::Diffusers)
            } else {
                None
            }
        })
    }
}

/// Name in a diffusers folder of a position table that does not follow from the sizes; usually absent.
pub(super) const POSITIONS: &str = "pos_embed.pos_embed";

/// The diffusers tensors that hold one of our parameters, to be joined along the first axis; empty where the layout
/// does not store it.
pub fn diffusers_parts(ours: &str) -> Vec<String> {
    if ours == "pos_embed" {
        return Vec::new();
    }
    let replacements = [
        ("x_embedder.proj.", "pos_embed.proj."),
        ("t_embedder.mlp.0.", "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1."),
        ("t_embedder.mlp.2.", "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2."),
        ("y_embedder.", "transformer_blocks.0.norm1.emb.class_embedder."),
        ("final_layer.linear.", "proj_out_2."),
        ("final_layer.adaLN_modulation.1.", "proj_out_1."),
    ];
    for (from, to) in replacements {
        if let Some(rest) = ours.strip_prefix(from) {
            return vec![format!("{to}{rest}")];
        }
    }
    let Some((block, rest)) = ours.strip_prefix("blocks.").and_then(|n| n.split_once('.')) else {
        return vec![ours.to_string()];
    };
    let block = format!("transformer_blocks.{block}.");
    if let Some(end) = rest.strip_prefix("attn.qkv.") {
        return ["q", "k", "v"].iter().map(|p| format!("{block}attn1.to_{p}.{end}")).collect();
    }
    let site = [
        ("attn.proj.", "attn1.to_out.0."),
        ("mlp.fc1.", "ff.net.0.proj."),
        ("mlp.fc2.", "ff.net.2."),
        ("adaLN_modulation.1.", "norm1.linear."),
        // Grafted operators keep their own names below the site.
        ("attn.", "attn1."),
        ("mlp.", "ff."),
    ];
    site.iter()
        .find_map(|(from, to)| rest.strip_prefix(from).map(|end| vec![format!("{block}{to}{end}")]))
        .unwrap_or_else(|| vec![format!("{block}{rest}")])
}

/// Copies of the embedders that diffusers stores in every block after the first: `(copy, original)` pairs.
pub fn diffusers_copies(config: &DitConfig) -> Vec<(String, String)> {
    let parts = [
        "timestep_embedder.linear_1.weight",
        "timestep_embedder.linear_1.bias",
        "timestep_embedder.linear_2.weight",
        "timestep_embedder.linear_2.bias",
        "class_embedder.embedding_table.weight",
    ];
    let name = |block: usize, part: &str| format!("transformer_blocks.{block}.norm1.emb.{part}");
    (1..config.depth()).flat_map(|i| parts.iter().map(move |p| (name(i, p), name(0, p)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_names() {
        assert_eq!(
            diffusers_parts("blocks.3.attn.qkv.bias").join(" "),
            "transformer_blocks.3.attn1.to_q.bias transformer_blocks.3.attn1.to_k.bias transformer_blocks.3.attn1.to_v.bias"
        );
        assert_eq!(diffusers_parts("blocks.3.mlp.fc1.weight"), ["transformer_blocks.3.ff.net.0.proj.weight"]);
        assert_eq!(
            diffusers_parts("blocks.3.attn.short_filter.weight"),
            ["transformer_blocks.3.attn1.short_filter.weight"]
        );
        assert_eq!(diffusers_parts("final_layer.adaLN_modulation.1.bias"), ["proj_out_1.bias"]);
        assert!(diffusers_parts("pos_embed").is_empty());
    }
}
