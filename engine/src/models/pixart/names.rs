//! Parameter names of the two layouts: the original's (ours) and diffusers'.

use crate::models::Source;
use crate::nn::operators::Shapes;

/// Names of a model's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `blocks.0.cross_attn.q_linear.weight` …
    Original,
    /// `transformer_blocks.0.attn2.to_q.weight` …
    Diffusers,
}

/// Beginnings of names outside the blocks: ours, and diffusers'.
const GLOBAL: [(&str, &str); 12] = [
    ("x_embedder.proj.", "pos_embed.proj."),
    ("t_embedder.mlp.0.", "adaln_single.emb.timestep_embedder.linear_1."),
    ("t_embedder.mlp.2.", "adaln_single.emb.timestep_embedder.linear_2."),
    ("csize_embedder.mlp.0.", "adaln_single.emb.resolution_embedder.linear_1."),
    ("csize_embedder.mlp.2.", "adaln_single.emb.resolution_embedder.linear_2."),
    ("ar_embedder.mlp.0.", "adaln_single.emb.aspect_ratio_embedder.linear_1."),
    ("ar_embedder.mlp.2.", "adaln_single.emb.aspect_ratio_embedder.linear_2."),
    ("t_block.1.", "adaln_single.linear."),
    ("y_embedder.y_proj.fc1.", "caption_projection.linear_1."),
    ("y_embedder.y_proj.fc2.", "caption_projection.linear_2."),
    ("final_layer.linear.", "proj_out."),
    ("final_layer.scale_shift_table", "scale_shift_table"),
];

/// Beginnings of names in a block: ours, and diffusers', which holds equal parts of it. The first that fits counts.
const BLOCK: [(&str, &[&str]); 11] = [
    ("attn.qkv.", &["attn1.to_q.", "attn1.to_k.", "attn1.to_v."]),
    ("attn.proj.", &["attn1.to_out.0."]),
    ("cross_attn.q_linear.", &["attn2.to_q."]),
    ("cross_attn.kv_linear.", &["attn2.to_k.", "attn2.to_v."]),
    ("cross_attn.proj.", &["attn2.to_out.0."]),
    ("mlp.fc1.", &["ff.net.0.proj."]),
    ("mlp.fc2.", &["ff.net.2."]),
    // Other operators keep their own names below the site.
    ("attn.", &["attn1."]),
    ("mlp.", &["ff."]),
    ("scale_shift_table", &["scale_shift_table"]),
    ("", &[""]),
];

impl Layout {
    /// Recognises a layout by its block names.
    pub fn of(source: &dyn Source) -> Option<Layout> {
        source.names().iter().find_map(|n| {
            if n.starts_with("blocks.") {
                Some(Layout::Original)
            } else if n.starts_with("transformer_blocks.") {
                Some(Layout::Diffusers)
            } else {
                None
            }
        })
    }

    /// The tensors of this layout that hold one of our parameters, to be joined along the first axis.
    pub fn parts(self, ours: &str) -> Vec<String> {
        match self {
            Layout::Original => vec![ours.to_string()],
            Layout::Diffusers => diffusers_parts(ours),
        }
    }

    /// Shapes of all tensors under our names.
    pub fn shapes(self, source: &dyn Source) -> Shapes {
        let found = source.shapes();
        if self == Layout::Original {
            return found;
        }
        let mut ours = Shapes::new();
        for (name, mut shape) in found {
            let (name, part, parts) = from_diffusers(&name);
            if part == 0 {
                if let Some(first) = shape.first_mut() {
                    *first *= parts;
                }
                ours.insert(name, shape);
            }
        }
        ours
    }
}

/// The diffusers tensors that hold one of our parameters.
pub fn diffusers_parts(ours: &str) -> Vec<String> {
    for (from, to) in GLOBAL {
        if let Some(rest) = ours.strip_prefix(from) {
            return vec![format!("{to}{rest}")];
        }
    }
    let Some((block, rest)) = ours.strip_prefix("blocks.").and_then(|n| n.split_once('.')) else {
        return vec![ours.to_string()];
    };
    let found = BLOCK.iter().find_map(|(from, to)| Some((rest.strip_prefix(from)?, to)));
    let Some((end, to)) = found else { return vec![ours.to_string()] };
    to.iter().map(|to| format!("transformer_blocks.{block}.{to}{end}")).collect()
}

/// Our parameter that a tensor of diffusers is a part of, which part, and of how many.
pub fn from_diffusers(theirs: &str) -> (String, usize, usize) {
    for (ours, from) in GLOBAL {
        if let Some(rest) = theirs.strip_prefix(from) {
            return (format!("{ours}{rest}"), 0, 1);
        }
    }
    let Some((block, rest)) = theirs.strip_prefix("transformer_blocks.").and_then(|n| n.split_once('.')) else {
        return (theirs.to_string(), 0, 1);
    };
    for (ours, parts) in BLOCK {
        for (part, from) in parts.iter().enumerate() {
            if let Some(end) = rest.strip_prefix(from) {
                return (format!("blocks.{block}.{ours}{end}"), part, parts.len());
            }
        }
    }
    (theirs.to_string(), 0, 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_there_and_back() {
        for (ours, theirs) in [
            ("x_embedder.proj.bias", "pos_embed.proj.bias"),
            ("t_block.1.weight", "adaln_single.linear.weight"),
            ("final_layer.scale_shift_table", "scale_shift_table"),
            ("blocks.12.scale_shift_table", "transformer_blocks.12.scale_shift_table"),
            ("blocks.3.mlp.fc1.weight", "transformer_blocks.3.ff.net.0.proj.weight"),
            ("blocks.3.cross_attn.proj.bias", "transformer_blocks.3.attn2.to_out.0.bias"),
            ("blocks.3.attn.sr.weight", "transformer_blocks.3.attn1.sr.weight"),
        ] {
            assert_eq!(diffusers_parts(ours), [theirs]);
            assert_eq!(from_diffusers(theirs), (ours.to_string(), 0, 1));
        }
        let kv = diffusers_parts("blocks.0.cross_attn.kv_linear.weight");
        assert_eq!(kv, ["transformer_blocks.0.attn2.to_k.weight", "transformer_blocks.0.attn2.to_v.weight"]);
        assert_eq!(from_diffusers(&kv[1]), ("blocks.0.cross_attn.kv_linear.weight".to_string(), 1, 2));
        assert_eq!(diffusers_parts("blocks.1.attn.qkv.bias").len(), 3);
    }
}
