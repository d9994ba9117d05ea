//! Compiled normalisation rules of SentencePiece: a double-array trie from sequences of bytes to their replacements.

use crate::error::{Error, Result};

/// Longest sequence of bytes that a rule may replace: a bound on the work for each character.
const LONGEST: usize = 64;

/// Rules of normalisation.
#[derive(Clone, Debug, Default)]
pub(super) struct Charsmap {
    units: Vec<u32>,
    /// Replacements, each ended by a zero byte.
    replacements: Vec<u8>,
}

impl Charsmap {
    /// Reads compiled rules: the size of the trie, the trie, the replacements. No bytes are no rules.
    pub fn parse(place: &str, bytes: &[u8]) -> Result<Charsmap> {
        if bytes.is_empty() {
            return Ok(Charsmap::default());
        }
        let damaged = || Error::failure(place, "damaged normalisation rules").must("a compiled charsmap");
        let (size, rest) = bytes.split_first_chunk::<4>().ok_or_else(damaged)?;
        let size = u32::from_le_bytes(*size) as usize;
        let (trie, replacements) = rest.split_at_checked(size).ok_or_else(damaged)?;
        let (units, odd) = trie.as_chunks::<4>();
        if !odd.is_empty() || units.is_empty() {
            return Err(damaged());
        }
        let units = units.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
        Ok(Charsmap { units, replacements: replacements.to_vec() })
    }

    /// The longest sequence at the start of `text` that a rule replaces: its length, and its replacement.
    pub fn longest<'m>(&'m self, text: &[u8]) -> Option<(usize, &'m [u8])> {
        let mut best = None;
        let mut node = offset(*self.units.first()?);
        for (at, &byte) in text.iter().take(LONGEST).enumerate() {
            if byte == 0 {
                break;
            }
            node ^= byte as usize;
            let unit = *self.units.get(node)?;
            // The label, with the mark of a leaf that must be absent.
            if unit & 0x8000_00ff != u32::from(byte) {
                break;
            }
            node ^= offset(unit);
            if unit >> 8 & 1 == 1 {
                best = Some((at + 1, (*self.units.get(node)? & 0x7fff_ffff) as usize));
            }
        }
        let (len, start) = best?;
        let replacement = self.replacements.get(start..)?;
        let end = replacement.iter().position(|&b| b == 0)?;
        Some((len, &replacement[..end]))
    }
}

fn offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize
}
