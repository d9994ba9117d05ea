//! The tokenizer of T5: text to the most probable sequence of pieces (unigram, arXiv 1804.10959), from `spiece.model`
//! or `tokenizer.json`.
//!
//! Special tokens that stand in the text as such (`</s>`, `<extra_id_0>`) are matched first; the text between them is
//! normalised and cut on its own. The two files differ in one thing: a space at the end of the text is a token of its
//! own under `tokenizer.json`.

use super::charsmap::Charsmap;
use crate::error::{Error, Result};
use crate::io::sentencepiece::Kind;
use crate::io::{json, sentencepiece};
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// What a space becomes.
const SPACE: &str = "\u{2581}";
/// What a character that no piece matches costs more than the least probable piece.
const UNKNOWN_PENALTY: f64 = 10.0;
/// Sentinels that T5's vocabulary is followed by, where nothing else is said.
const SENTINELS: usize = 100;
/// Longest piece in bytes that is looked for.
const LONGEST: usize = 256;

/// A tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    pieces: HashMap<Vec<u8>, (u32, f64)>,
    longest: usize,
    specials: Vec<(String, u32)>,
    charsmap: Charsmap,
    /// Whether spaces at the ends go, and whether one is put in front.
    trims: bool,
    prefixed: bool,
    unknown: u32,
    unknown_score: f64,
    end: u32,
    size: usize,
}

/// An encoded text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Ids, the end token last.
    pub ids: Vec<u32>,
    /// The end of the text that did not fit, as far as it can be told from its pieces.
    pub cut: Option<String>,
}

impl Tokenizer {
    /// Opens a tokenizer: a folder with `spiece.model` or `tokenizer.json`, or one of these files.
    ///
    /// # Errors
    /// When there is none, or it is damaged or of another kind.
    pub fn open(path: &Path) -> Result<Tokenizer> {
        let file = match path.is_dir() {
            false => path.to_path_buf(),
            true => {
                let known = ["spiece.model", "tokenizer.json"].map(|name| path.join(name));
                known.into_iter().find(|file| file.is_file()).ok_or_else(|| {
                    Error::failure(path.display().to_string(), "no tokenizer")
                        .must("spiece.model or tokenizer.json in the folder")
                        .fix("download the folder tokenizer of the model")
                })?
            }
        };
        if file.extension().is_some_and(|e| e == "json") {
            Tokenizer::from_json(&file)
        } else {
            Tokenizer::from_model(&file)
        }
    }

    fn from_model(file: &Path) -> Result<Tokenizer> {
        let model = sentencepiece::read(file)?;
        let place = file.display().to_string();
        let beside = |name: &str| file.parent().map(|p: &Path| -> PathBuf { p.join(name) }).filter(|p| p.is_file());
        let sentinels = match beside("tokenizer_config.json") {
            None => SENTINELS,
            Some(path) => {
                let stated = json::read(&path)?.get("extra_ids").and_then(Value::as_u64);
                stated.map_or(SENTINELS, |n| usize::try_from(n).unwrap_or(SENTINELS).min(1 << 16))
            }
        };
        let count = model.pieces.len();
        let mut specials: Vec<(String, u32)> = Vec::new();
        let mut scored = Vec::new();
        let mut unknown = None;
        for (id, piece) in model.pieces.iter().enumerate() {
            match piece.kind {
                Kind::Normal | Kind::UserDefined => {
                    scored.push((piece.text.clone(), id as u32, f64::from(piece.score)))
                }
                Kind::Unknown => {
                    unknown = Some(id as u32);
                    specials.push((piece.text.clone(), id as u32));
                }
                Kind::Control => specials.push((piece.text.clone(), id as u32)),
                Kind::Unused | Kind::Byte => {}
            }
        }
        specials.extend((0..sentinels).map(|k| (format!("<extra_id_{k}>"), (count + sentinels - 1 - k) as u32)));
        let charsmap = Charsmap::parse(&place, &model.charsmap)?;
        let flags = (model.remove_extra_whitespaces, model.add_dummy_prefix);
        Tokenizer::assemble(&place, scored, specials, charsmap, flags, unknown, count + sentinels)
    }

    fn from_json(file: &Path) -> Result<Tokenizer> {
        let (place, value) = (file.display().to_string(), json::read(file)?);
        let wrong = |what: &str| {
            Error::failure(&place, "unsupported tokenizer")
                .is(what)
                .must("a unigram model as T5's")
                .fix("give the spiece.model instead")
        };
        let model = &value["model"];
        if model.get("type").and_then(Value::as_str).is_some_and(|kind| kind != "Unigram") {
            return Err(wrong("no Unigram model"));
        }
        let vocab = model.get("vocab").and_then(Value::as_array).ok_or_else(|| wrong("no vocabulary"))?;
        let mut specials: Vec<(String, u32)> = Vec::new();
        for token in value.get("added_tokens").and_then(Value::as_array).into_iter().flatten() {
            let (text, id) = (token.get("content").and_then(Value::as_str), token.get("id").and_then(Value::as_u64));
            let (Some(text), Some(id)) = (text, id) else { return Err(wrong("an added token without text or id")) };
            specials.push((text.to_string(), u32::try_from(id).map_err(|_| wrong("an impossible id"))?));
        }
        let mut scored = Vec::with_capacity(vocab.len());
        for (id, entry) in vocab.iter().enumerate() {
            let piece = entry.as_array().and_then(|e| Some((e.first()?.as_str()?, e.get(1)?.as_f64()?)));
            let (text, score) = piece.ok_or_else(|| wrong("a piece without text or score"))?;
            scored.push((text.to_string(), id as u32, score));
        }
        let unknown = model.get("unk_id").and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
        let mut charsmap = Charsmap::default();
        let normalizer = &value["normalizer"];
        let several = normalizer.get("normalizers").and_then(Value::as_array);
        for step in several.map_or(std::slice::from_ref(normalizer), Vec::as_slice) {
            match step.get("type").and_then(Value::as_str) {
                Some("Precompiled") => {
                    let text = step.get("precompiled_charsmap").and_then(Value::as_str).unwrap_or("");
                    let bytes = base64(text).ok_or_else(|| wrong("rules that are no base64"))?;
                    charsmap = Charsmap::parse(&place, &bytes)?;
                }
                // Several spaces become one, as they do here in any case.
                Some("Replace") | None => {}
                Some(other) => return Err(wrong(other)),
            }
        }
        let size = vocab.len();
        Tokenizer::assemble(&place, scored, specials, charsmap, (false, true), unknown, size)
    }

    fn assemble(
        place: &str,
        scored: Vec<(String, u32, f64)>,
        specials: Vec<(String, u32)>,
        charsmap: Charsmap,
        (trims, prefixed): (bool, bool),
        unknown: Option<u32>,
        size: usize,
    ) -> Result<Tokenizer> {
        let end = specials.iter().find(|(text, _)| text == "</s>").map(|(_, id)| *id);
        let (Some(unknown), Some(end)) = (unknown, end) else {
            return Err(Error::failure(place, "vocabulary without <unk> or </s>").must("both, as in T5"));
        };
        let least = scored.iter().map(|(.., score)| *score).fold(f64::INFINITY, f64::min);
        let longest = scored.iter().map(|(text, ..)| text.len()).max().unwrap_or(0).min(LONGEST);
        let taken: Vec<&str> = specials.iter().map(|(text, _)| text.as_str()).collect();
        let pieces = scored.iter().filter(|(text, ..)| !text.is_empty() && !taken.contains(&text.as_str()));
        let pieces = pieces.map(|(text, id, score)| (text.clone().into_bytes(), (*id, *score))).collect();
        Ok(Tokenizer {
            pieces,
            longest,
            specials,
            charsmap,
            trims,
            prefixed,
            unknown,
            unknown_score: least - UNKNOWN_PENALTY,
            end,
            size,
        })
    }

    /// Ids that there are: every id of an encoded text is below.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Ids of a text, the end token last.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.encode_at_most(text, usize::MAX).ids
    }

    /// Ids of a text, at most `most` (at least 1) of them with the end token last, and what was cut off.
    pub fn encode_at_most(&self, text: &str, most: usize) -> Encoded {
        let mut tokens = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let found =
                self.specials.iter().filter_map(|(special, id)| Some((rest.find(special.as_str())?, special, id)));
            // The first; of two at one place the longer.
            match found.min_by_key(|(at, special, _)| (*at, usize::MAX - special.len())) {
                None => {
                    self.cut_up(rest, &mut tokens);
                    break;
                }
                Some((at, special, id)) => {
                    self.cut_up(&rest[..at], &mut tokens);
                    tokens.push((*id, special.clone()));
                    rest = &rest[at + special.len()..];
                }
            }
        }
        let kept = most.max(1) - 1;
        let cut = tokens.get(kept..).filter(|cut| !cut.is_empty()).map(|cut| {
            let text: String = cut.iter().map(|(_, text)| text.as_str()).collect();
            text.replace(SPACE, " ").trim().to_string()
        });
        let ids = tokens.iter().take(kept).map(|(id, _)| *id).chain([self.end]).collect();
        Encoded { ids, cut }
    }

    /// Normalised text with `▁` for spaces; empty where nothing is left.
    fn normalise(&self, text: &str) -> Vec<u8> {
        let (mut out, mut rest) = (Vec::with_capacity(text.len() + 3), text.as_bytes());
        let mut after_space = self.trims;
        while !rest.is_empty() {
            let (len, piece) = self.charsmap.longest(rest).unwrap_or_else(|| {
                let len = char_len(rest[0]).min(rest.len());
                (len, &rest[..len])
            });
            for &byte in piece {
                if byte != b' ' {
                    out.push(byte);
                } else if !after_space {
                    out.extend(SPACE.as_bytes());
                }
                after_space = byte == b' ';
            }
            rest = &rest[len..];
        }
        if self.trims {
            while out.ends_with(SPACE.as_bytes()) {
                out.truncate(out.len() - SPACE.len());
            }
        }
        // Of `spiece.model` every text is put behind a space, of `tokenizer.json` those that do not begin with one.
        if self.prefixed && !out.is_empty() && (self.trims || !out.starts_with(SPACE.as_bytes())) {
            out.splice(0..0, SPACE.bytes());
        }
        out
    }

    /// The most probable pieces of a text without special tokens.
    fn cut_up(&self, text: &str, tokens: &mut Vec<(u32, String)>) {
        let text = self.normalise(text);
        // Of every place the best way to it: score, where its last piece begins, and which piece that is.
        let mut best: Vec<Option<(f64, usize, u32)>> = vec![None; text.len() + 1];
        best[0] = Some((0.0, 0, 0));
        let mut start = 0;
        while start < text.len() {
            let (so_far, char_end) = (best[start].map_or(0.0, |(score, ..)| score), start + char_len(text[start]));
            let char_end = char_end.min(text.len());
            let mut single = false;
            let mut offer = |end: usize, score: f64, id: u32| {
                if best[end].is_none_or(|(known, ..)| score > known) {
                    best[end] = Some((score, start, id));
                }
            };
            for end in start + 1..=(start + self.longest).min(text.len()) {
                if let Some(&(id, score)) = self.pieces.get(&text[start..end]) {
                    offer(end, so_far + score, id);
                    single |= end == char_end;
                }
            }
            if !single {
                offer(char_end, so_far + self.unknown_score, self.unknown);
            }
            start = char_end;
        }
        let (mut found, mut end) = (Vec::new(), text.len());
        while let Some((_, start, id)) = best[end].filter(|_| end > 0) {
            found.push((id, String::from_utf8_lossy(&text[start..end]).into_owned()));
            end = start;
        }
        for (id, piece) in found.into_iter().rev() {
            match tokens.last_mut() {
                // Neighbours that no piece matches are one.
                Some((last, text)) if id == self.unknown && *last == self.unknown && !is_special(text) => {
                    text.push_str(&piece);
                }
                _ => tokens.push((id, piece)),
            }
        }
    }
}

/// Whether the text of an unknown piece is the special token itself.
fn is_special(text: &str) -> bool {
    text == "<unk>"
}

/// Bytes of the UTF-8 character that begins with a byte.
fn char_len(first: u8) -> usize {
    match first {
        0..0xc0 => 1,
        0xc0..0xe0 => 2,
        0xe0..0xf0 => 3,
        _ => 4,
    }
}

/// Decodes base64; `None` where it is none.
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0);
    for byte in text.bytes().filter(|b| *b != b'=') {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        (bits, count) = (bits << 6 | u32::from(value), count + 6);
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::golden;

    #[test]
    fn what_is_cut_is_told() {
        let tokenizer = Tokenizer::open(&golden("t5/tokenizer/model")).unwrap();
        let whole = tokenizer.encode("a small red fox sleeps in heavy snow");
        assert_eq!((whole.len(), whole[21]), (22, 1));
        let cut = tokenizer.encode_at_most("a small red fox sleeps in heavy snow", 16);
        assert_eq!((cut.ids.len(), cut.ids[15]), (16, 1));
        assert_eq!(cut.ids[..15], whole[..15]);
        assert!(cut.cut.unwrap().ends_with("snow"));
        assert_eq!(tokenizer.encode_at_most("", 1), Encoded { ids: vec![1], cut: None });
        assert_eq!(tokenizer.encode_at_most("a", 0).ids, [1]);
    }

    #[test]
    fn base64_by_hand() {
        assert_eq!(base64("TWFu").unwrap(), b"Man");
        assert_eq!(base64("TWE=").unwrap(), b"Ma");
        assert!(base64("T!").is_none());
    }
}
