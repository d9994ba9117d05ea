//! SentencePiece models (`spiece.model`): the vocabulary and the normalisation rules of a unigram tokenizer.
//!
//! The file is a protobuf message; only the fields that encoding needs are read, all others are skipped.

use crate::error::{Error, Result};
use crate::io::files;
use std::path::Path;

/// What a piece is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Text.
    Normal,
    /// Stands for what no piece matches.
    Unknown,
    /// Has no text: padding, end.
    Control,
    /// Text that is always kept whole.
    UserDefined,
    /// Never used.
    Unused,
    /// A byte of a text that no piece matches.
    Byte,
}

/// A piece of the vocabulary; its id is its position.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// Text, `▁` for a space.
    pub text: String,
    /// Log probability.
    pub score: f32,
    /// What it is for.
    pub kind: Kind,
}

/// A unigram model.
#[derive(Clone, Debug, PartialEq)]
pub struct SentencePiece {
    /// Pieces by id.
    pub pieces: Vec<Piece>,
    /// Compiled rules of normalisation; empty where there are none.
    pub charsmap: Vec<u8>,
    /// Whether a space is put before the text.
    pub add_dummy_prefix: bool,
    /// Whether spaces at both ends are dropped and several become one.
    pub remove_extra_whitespaces: bool,
}

/// Number of the unigram algorithm in the file.
const UNIGRAM: u64 = 1;

/// Reads a model.
///
/// # Errors
/// A file that is missing, damaged, or not of a unigram model.
pub fn read(path: &Path) -> Result<SentencePiece> {
    parse(&path.display().to_string(), &files::read_bytes(path)?)
}

/// Reads a model from bytes; `place` names the file in errors.
///
/// # Errors
/// As [`read`].
pub fn parse(place: &str, bytes: &[u8]) -> Result<SentencePiece> {
    let damaged = || {
        Error::failure(place, "no SentencePiece model")
            .is(format!("{} bytes that do not parse", bytes.len()))
            .must("a spiece.model")
            .fix("download the file again; it may be a pointer of Git LFS")
    };
    let mut model = SentencePiece {
        pieces: Vec::new(),
        charsmap: Vec::new(),
        add_dummy_prefix: true,
        remove_extra_whitespaces: true,
    };
    let mut algorithm = UNIGRAM;
    for field in Fields(bytes) {
        match field.ok_or_else(damaged)? {
            (1, Value::Bytes(piece)) => model.pieces.push(parse_piece(piece).ok_or_else(damaged)?),
            (2, Value::Bytes(trainer)) => {
                for field in Fields(trainer) {
                    if let (3, Value::Number(kind)) = field.ok_or_else(damaged)? {
                        algorithm = kind;
                    }
                }
            }
            (3, Value::Bytes(normalizer)) => {
                for field in Fields(normalizer) {
                    match field.ok_or_else(damaged)? {
                        (2, Value::Bytes(map)) => model.charsmap = map.to_vec(),
                        (3, Value::Number(flag)) => model.add_dummy_prefix = flag != 0,
                        (4, Value::Number(flag)) => model.remove_extra_whitespaces = flag != 0,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if model.pieces.is_empty() {
        return Err(damaged());
    }
    if algorithm != UNIGRAM {
        return Err(Error::failure(place, "unsupported tokenizer algorithm").is(algorithm).must("1 (unigram)"));
    }
    Ok(model)
}

fn parse_piece(bytes: &[u8]) -> Option<Piece> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: Kind::Normal };
    for field in Fields(bytes) {
        match field? {
            (1, Value::Bytes(text)) => piece.text = std::str::from_utf8(text).ok()?.to_string(),
            (2, Value::Word(bits)) => piece.score = f32::from_bits(bits),
            (3, Value::Number(kind)) => {
                piece.kind = match kind {
                    1 => Kind::Normal,
                    2 => Kind::Unknown,
                    3 => Kind::Control,
                    4 => Kind::UserDefined,
                    5 => Kind::Unused,
                    6 => Kind::Byte,
                    _ => return None,
                }
            }
            _ => {}
        }
    }
    piece.score.is_finite().then_some(piece)
}

/// A field's value by its wire type.
enum Value<'a> {
    Number(u64),
    Word(u32),
    Bytes(&'a [u8]),
    Long,
}

/// The fields of a message, in order; `None` once at the first that does not parse.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Value<'a>)> {
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Value::Number(self.varint()?),
            1 => {
                self.take(8)?;
                Value::Long
            }
            2 => {
                let len = usize::try_from(self.varint()?).ok()?;
                Value::Bytes(self.take(len)?)
            }
            5 => Value::Word(u32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Value<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_by_hand() {
        // piece { "ab", -1.5, control }, normalizer { map "xy", no dummy prefix }, an unknown field 9.
        let piece = [0x0a, 2, b'a', b'b', 0x15, 0, 0, 0xc0, 0xbf, 0x18, 3];
        let mut bytes = vec![0x0a, piece.len() as u8];
        bytes.extend(piece);
        bytes.extend([0x1a, 6, 0x12, 2, b'x', b'y', 0x18, 0, 0x48, 5]);
        let model = parse("m", &bytes).unwrap();
        assert_eq!(model.pieces, [Piece { text: "ab".into(), score: -1.5, kind: Kind::Control }]);
        assert_eq!((&model.charsmap[..], model.add_dummy_prefix), (&b"xy"[..], false));
        assert!(model.remove_extra_whitespaces);
        // Every cut but those between fields is an error, and none a panic.
        for end in 0..bytes.len() {
            let whole = [13, 21, 23].contains(&end);
            assert_eq!(parse("m", &bytes[..end]).is_ok(), whole, "{end}");
        }
        let lfs = parse("m", b"version https://git-lfs.github.com/spec/v1").unwrap_err().to_string();
        assert!(lfs.contains("no SentencePiece model"), "{lfs}");
    }
}
