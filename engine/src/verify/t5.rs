//! Family `t5`: the encoder, and the tokenizer from either of its files.

use super::case::Case;
use super::checks::Checks;
use crate::autograd::Precision;
use crate::error::{Error, Result};
use crate::models::t5::{self, Residence, Tokenizer, Tokens};
use serde_json::Value;
use std::path::PathBuf;

/// Runs the part that the case has files for.
pub fn run(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    if case.has_input("ids") {
        return encoder(case, checks);
    }
    let stated = case.json("case.json")?;
    match stated.get("prompts") {
        Some(prompts) => vocabulary(case, checks, prompts),
        None => tokenizer(case, checks),
    }
}

/// Features of padded and of unpadded texts, from memory and read block by block.
fn encoder(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    let (ids, mask) = (case.input("ids")?, case.input("mask")?);
    let &[b, n] = ids.shape.as_slice() else {
        return Err(Error::failure("ids", "wrong rank").is(format!("{:?}", ids.shape)).must("[B, N]"));
    };
    let mut texts = Vec::new();
    for (ids, mask) in ids.data.chunks(n).zip(mask.data.chunks(n)) {
        let count = mask.iter().take_while(|m| **m != 0.0).count();
        if mask[count..].iter().any(|m| *m != 0.0) {
            return Err(Error::failure("mask", "has a hole").must("ones, then zeros"));
        }
        texts.push(Tokens { ids: ids.iter().map(|&id| id as u32).collect(), count });
    }
    let real: Vec<Tokens> = texts.iter().map(|t| Tokens::whole(t.ids[..t.count].to_vec())).collect();
    for (label, residence) in [("in memory", Residence::Memory), ("streamed", Residence::Stream)] {
        checks.label(label);
        let load =
            |precision: Precision| t5::load(&case.model(), &case.device, precision == Precision::Bf16, residence);
        let precision = checks.precision("hidden");
        let model = load(precision)?;
        let d = model.config.width;
        let mut hidden = Vec::with_capacity(b * n * d);
        for features in model.encode(&texts, precision)? {
            hidden.extend(features.to_vec()?.into_iter().map(f64::from));
        }
        checks.values("hidden", &[b, n, d], &hidden)?;
        let precision = checks.precision("hidden_unpadded_0");
        for (i, features) in load(precision)?.encode(&real, precision)?.iter().enumerate() {
            checks.tensor(&format!("hidden_unpadded_{i}"), features)?;
        }
    }
    Ok(())
}

/// Ids and masks of the recorded prompts, cut and padded.
fn tokenizer(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    let (tokenizer, most) = (Tokenizer::open(&case.model())?, case.whole("max_length")?);
    let prompts = case.json("prompts.json")?;
    let prompts = prompts.as_array().filter(|list| !list.is_empty());
    let prompts = prompts.ok_or_else(|| Error::failure("prompts.json", "no prompts").must("a list"))?;
    let (mut ids, mut mask) = (Vec::new(), Vec::new());
    for prompt in prompts {
        let text = prompt.get("prompt").and_then(Value::as_str).unwrap_or_default();
        let found = tokenizer.encode_at_most(text, most).ids;
        compare(checks, text, &found, prompt);
        ids.extend((0..most).map(|i| found.get(i).map_or(0.0, |id| f64::from(*id))));
        mask.extend((0..most).map(|i| f64::from(u8::from(i < found.len()))));
    }
    checks.values("ids", &[prompts.len(), most], &ids)?;
    checks.values("mask", &[prompts.len(), most], &mask)
}

/// Ids of the released vocabulary, whose file lies beside the cases.
fn vocabulary(case: &Case, checks: &mut Checks<'_>, prompts: &Value) -> Result<()> {
    let own = case.model().join("tokenizer.json");
    let above = case.folder.ancestors().map(|folder| folder.join("data/t5_tokenizer.json"));
    let Some(path) = std::iter::once(own).chain(above).find(|path: &PathBuf| path.is_file()) else {
        checks.skip("data/t5_tokenizer.json lies in no folder above the case".into());
        return Ok(());
    };
    let tokenizer = Tokenizer::open(&path)?;
    for prompt in prompts.as_array().into_iter().flatten() {
        let text = prompt.get("prompt").and_then(Value::as_str).unwrap_or_default();
        compare(checks, text, &tokenizer.encode(text), prompt);
    }
    Ok(())
}

fn compare(checks: &mut Checks<'_>, text: &str, found: &[u32], prompt: &Value) {
    let want = prompt.get("ids").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_u64);
    let want: Vec<u64> = want.collect();
    let same = found.iter().map(|id| u64::from(*id)).eq(want.iter().copied());
    let short: String = text.chars().take(24).collect();
    checks.verdict(&format!("{short:?}"), (!same).then(|| format!("ids are {found:?}; must be {want:?}")));
}
