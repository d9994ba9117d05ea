//! Saving: an encoder as a folder that the transformers library reads, and a tokenizer of whole words.

use super::T5;
use crate::error::{Error, Result};
use crate::io::{atomic, json, safetensors};
use crate::models::dit::SaveAs;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Writes `config.json` and `model.safetensors` to `folder`.
///
/// # Errors
/// An encoder whose blocks are not in memory, or a folder that cannot be written.
pub fn save(model: &T5, folder: &Path, dtype: SaveAs) -> Result<()> {
    model.is_whole()?;
    atomic::ensure_writable_dir(folder)?;
    let mut records = Vec::new();
    for (_, param) in model.params.iter() {
        let parts = match param.name.split_once(".qkv.") {
            None => vec![param.name.clone()],
            Some((layer, rest)) => ["q", "k", "v"].iter().map(|part| format!("{layer}.{part}.{rest}")).collect(),
        };
        records.extend(dtype.split(parts, &param.value)?);
    }
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::write(&folder.join("model.safetensors"), records, &metadata)?;
    let c = &model.config;
    let config = json!({
        "architectures": ["T5EncoderModel"],
        "d_ff": c.hidden,
        "d_kv": c.head_width,
        "d_model": c.width,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": true,
        "is_gated_act": true,
        "layer_norm_epsilon": c.eps,
        "model_type": "t5",
        "num_heads": c.heads,
        "num_layers": c.depth,
        "pad_token_id": 0,
        "relative_attention_max_distance": c.max_distance,
        "relative_attention_num_buckets": c.buckets,
        "tie_word_embeddings": false,
        "vocab_size": c.vocabulary,
    });
    json::write(&folder.join("config.json"), &config)
}

/// Writes `tokenizer.json` of a unigram model whose pieces are the words of some texts, all equally probable, in the
/// order of the alphabet behind `<pad>`, `</s>` and `<unk>`. A comma is a piece of its own; other words are unknown.
///
/// # Errors
/// No word at all, or a folder that cannot be written.
pub fn write_word_tokenizer<'t>(folder: &Path, texts: impl Iterator<Item = &'t str>) -> Result<()> {
    let mut words = BTreeSet::new();
    for text in texts {
        words.extend(text.split([' ', ',']).filter(|word| !word.is_empty()).map(|word| format!("\u{2581}{word}")));
    }
    if words.is_empty() {
        return Err(Error::failure("tokenizer", "texts without words").must("at least one word"));
    }
    words.insert(",".into());
    let score = -(words.len() as f64).ln();
    let special = ["<pad>", "</s>", "<unk>"];
    let mut vocabulary: Vec<Value> = special.iter().map(|piece| json!([piece, 0.0])).collect();
    vocabulary.extend(words.into_iter().map(|word| json!([word, score])));
    let added = special.iter().enumerate().map(|(id, piece)| {
        json!({ "id": id, "content": piece, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true })
    });
    let space = json!({ "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always" });
    let end = json!({ "SpecialToken": { "id": "</s>", "type_id": 0 } });
    let sequence = |id: &str| json!({ "Sequence": { "id": id, "type_id": 0 } });
    let value = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<Value>>(),
        "normalizer": null,
        "pre_tokenizer": space,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [sequence("A"), end],
            "pair": [sequence("A"), end, sequence("B"), end],
            "special_tokens": { "</s>": { "id": "</s>", "ids": [1], "tokens": ["</s>"] } },
        },
        "decoder": space,
        "model": { "type": "Unigram", "unk_id": 2, "vocab": vocabulary },
    });
    atomic::ensure_writable_dir(folder)?;
    json::write(&folder.join("tokenizer.json"), &value)
}
