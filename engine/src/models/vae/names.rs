//! Names of an autoencoder's tensors in other files than those of diffusers today.

/// Our name of the projection that files keep in three parts.
const QKV: &str = ".to_qkv.";
/// Older names in diffusers' attention.
const OLDER: [(&str, &str); 4] =
    [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")];
/// Names of latent diffusion's files below a half of the network.
const LDM: [(&str, &str); 9] = [
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
    ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
    ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
    ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
    ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
    ("norm_out.", "conv_norm_out."),
    ("conv_", "conv_"),
];

/// The tensors of a file under diffusers' names that hold one of our parameters.
pub(super) fn parts(ours: &str) -> Vec<String> {
    match ours.split_once(QKV) {
        None => vec![ours.to_string()],
        Some((layer, end)) => ["q", "k", "v"].iter().map(|part| format!("{layer}.to_{part}.{end}")).collect(),
    }
}

/// Diffusers' name of a tensor in any known file whose decoder has so many levels; none for what is no part of an
/// autoencoder.
pub(super) fn diffusers_name(name: &str, levels: usize) -> Option<String> {
    if name.starts_with("quant_conv.") || name.starts_with("post_quant_conv.") {
        return Some(name.to_string());
    }
    let (half, rest) = name.split_once('.').filter(|(half, _)| ["encoder", "decoder"].contains(half))?;
    for (from, to) in LDM {
        if let Some(end) = rest.strip_prefix(from) {
            return Some(format!("{half}.{to}{end}"));
        }
    }
    let level = |rest: &str| -> Option<(usize, String)> {
        let (index, rest) = rest.split_once('.')?;
        Some((index.parse().ok()?, rest.to_string()))
    };
    if let Some((index, rest)) = rest.strip_prefix("down.").and_then(level) {
        return Some(format!("{half}.down_blocks.{index}.{}", in_level(&rest)));
    }
    if let Some((index, rest)) = rest.strip_prefix("up.").and_then(level) {
        return Some(format!("{half}.up_blocks.{}.{}", levels.checked_sub(index + 1)?, in_level(&rest)));
    }
    let older = OLDER.iter().find(|(from, _)| rest.contains("attentions.") && rest.contains(from));
    Some(older.map_or(name.to_string(), |(from, to)| name.replace(from, to)))
}

fn in_level(rest: &str) -> String {
    if let Some(end) = rest.strip_prefix("block.") {
        return format!("resnets.{}", end.replace(".nin_shortcut.", ".conv_shortcut."));
    }
    rest.replace("downsample.conv.", "downsamplers.0.conv.").replace("upsample.conv.", "upsamplers.0.conv.")
}

/// Levels of a decoder, by the names of its tensors.
pub(super) fn levels<'n>(names: impl Iterator<Item = &'n str>) -> usize {
    let index = |name: &str| -> Option<usize> {
        let rest = name.strip_prefix("decoder.up_blocks.").or_else(|| name.strip_prefix("decoder.up."))?;
        rest.split_once('.')?.0.parse().ok()
    };
    names.filter_map(index).filter(|i| *i < 64).max().map_or(0, |last| last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_file() {
        for (theirs, ours) in [
            ("decoder.up.3.block.1.nin_shortcut.weight", "decoder.up_blocks.0.resnets.1.conv_shortcut.weight"),
            ("decoder.up.1.upsample.conv.bias", "decoder.up_blocks.2.upsamplers.0.conv.bias"),
            ("encoder.down.2.block.0.norm1.weight", "encoder.down_blocks.2.resnets.0.norm1.weight"),
            ("encoder.down.0.downsample.conv.weight", "encoder.down_blocks.0.downsamplers.0.conv.weight"),
            ("encoder.mid.attn_1.proj_out.bias", "encoder.mid_block.attentions.0.to_out.0.bias"),
            ("decoder.norm_out.weight", "decoder.conv_norm_out.weight"),
            ("decoder.conv_norm_out.weight", "decoder.conv_norm_out.weight"),
            ("decoder.mid_block.attentions.0.query.weight", "decoder.mid_block.attentions.0.to_q.weight"),
            ("encoder.mid_block.attentions.0.proj_attn.bias", "encoder.mid_block.attentions.0.to_out.0.bias"),
            ("decoder.up_blocks.3.resnets.0.conv1.weight", "decoder.up_blocks.3.resnets.0.conv1.weight"),
            ("quant_conv.bias", "quant_conv.bias"),
        ] {
            assert_eq!(diffusers_name(theirs, 4).as_deref(), Some(ours));
        }
        assert_eq!(diffusers_name("model.diffusion_model.x", 4), None);
        assert_eq!(diffusers_name("decoder.up.9.block.0.conv1.bias", 4), None);
        assert_eq!(levels(["decoder.up.2.block.0.norm1.weight", "decoder.up_blocks.x"].into_iter()), 3);
        assert_eq!(parts("a.to_qkv.bias"), ["a.to_q.bias", "a.to_k.bias", "a.to_v.bias"]);
    }
}
