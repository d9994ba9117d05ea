//! Seeded mutation of file contents: fuzzing on stable Rust, and every failure repeatable from its seed.

use graft_kernels::check::SplitMix64;

/// A number below `bound`, which must not be zero. The bias of the remainder does not matter here.
fn below(rng: &mut SplitMix64, bound: usize) -> usize {
    (rng.next_u64() % bound as u64) as usize
}

/// Integers at which size computations break.
const EXTREMES: [u64; 12] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    0x4000_0000_0000_0000,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// Numbers and words at which text formats break.
const WORDS: [&str; 14] = [
    "-1",
    "0",
    "1e999",
    "18446744073709551616",
    "9223372036854775807",
    "4294967296",
    "NaN",
    "-Infinity",
    "null",
    "\"\"",
    "[[[[",
    "{\"a\":",
    "\\ud800",
    "\u{1f98a}",
];

/// Longest mutated input, so that repeated duplication stays small.
const MAX_LEN: usize = 1 << 20;

/// A mutated copy of one of the `corpus` entries, which must not be empty. Equal seeds give equal results.
pub fn mutate(corpus: &[Vec<u8>], seed: u64) -> Vec<u8> {
    let rng = &mut SplitMix64(seed);
    let mut bytes = corpus[below(rng, corpus.len())].clone();
    for _ in 0..1 + below(rng, 4) {
        mutate_once(&mut bytes, corpus, rng);
        bytes.truncate(MAX_LEN);
    }
    bytes
}

fn mutate_once(bytes: &mut Vec<u8>, corpus: &[Vec<u8>], rng: &mut SplitMix64) {
    if bytes.is_empty() {
        bytes.push(rng.next_u64() as u8);
        return;
    }
    // Half of the positions lie in the first 512 bytes, where formats keep their structure.
    let reach = if below(rng, 2) == 0 { bytes.len().min(512) } else { bytes.len() };
    let at = below(rng, reach);
    match below(rng, 9) {
        0 => bytes[at] ^= 1 << below(rng, 8),
        1 => bytes[at] = rng.next_u64() as u8,
        2 => bytes.truncate(at),
        3 => {
            let end = at + below(rng, bytes.len() - at) + 1;
            bytes.drain(at..end.min(at + 64));
        }
        4 => {
            // A little- or big-endian extreme of 1, 2, 4 or 8 bytes, perhaps off by one.
            let value = EXTREMES[below(rng, EXTREMES.len())].wrapping_add(below(rng, 3) as u64).wrapping_sub(1);
            let width = 1 << below(rng, 4);
            let little = value.to_le_bytes();
            let mut piece = little[..width].to_vec();
            if below(rng, 4) == 0 {
                piece.reverse();
            }
            overwrite(bytes, at, &piece);
        }
        5 => {
            let end = (at + 1 + below(rng, 64)).min(bytes.len());
            let chunk = bytes[at..end].to_vec();
            insert(bytes, at, &chunk);
        }
        6 => {
            let donor = &corpus[below(rng, corpus.len())];
            if !donor.is_empty() {
                let start = below(rng, donor.len());
                let end = (start + 1 + below(rng, 128)).min(donor.len());
                overwrite(bytes, at, &donor[start..end]);
            }
        }
        7 => {
            // The head of one input with the tail of another.
            let donor = &corpus[below(rng, corpus.len())];
            let start = below(rng, donor.len() + 1);
            bytes.truncate(at);
            bytes.extend_from_slice(&donor[start..]);
        }
        _ => insert(bytes, at, WORDS[below(rng, WORDS.len())].as_bytes()),
    }
}

fn overwrite(bytes: &mut Vec<u8>, at: usize, piece: &[u8]) {
    let end = (at + piece.len()).min(bytes.len());
    bytes.splice(at..end, piece.iter().copied());
}

fn insert(bytes: &mut Vec<u8>, at: usize, piece: &[u8]) {
    bytes.splice(at..at, piece.iter().copied());
}
