//! `graft.cubins`: kernels compiled ahead of time, in one file; and the text that a kernel is compiled from.
//!
//! Everything is little-endian. A header names the toolkit and every entry with the digest of its text, the place of
//! its code and a checksum; the code follows. `cargo xtask cubins` writes the file, the engine's `cuda` backend reads
//! it. This module uses the standard library alone, because both compile it: the tools must build when the library
//! does not.

use std::borrow::Cow;
use std::ops::Range;

const MAGIC: [u8; 8] = *b"graftcub";
const VERSION: u32 = 1;

/// Longest text that a header may state.
const LONGEST: usize = 4096;

/// What a compiled source is of and for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Operator: the directory of the source.
    pub op: String,
    /// File name of the source.
    pub source: String,
    /// Element that it is compiled for: `f32`, `bf16`, `f16`.
    pub element: String,
    /// `sm_80`, `sm_90a`, or `compute_80` for assembly that the driver translates for newer devices.
    pub target: String,
}

/// One compiled source.
#[derive(Clone, Debug)]
pub struct Entry {
    /// What it is.
    pub key: Key,
    /// [`digest`] of the text that it was compiled from.
    pub digest: u128,
    place: Range<usize>,
    checksum: u128,
}

/// An archive in memory.
#[derive(Clone, Debug)]
pub struct Archive {
    bytes: Cow<'static, [u8]>,
    /// Version of the toolkit, as 1000·major + 10·minor.
    pub toolkit: u32,
    /// Its entries, in the order of the file.
    pub entries: Vec<Entry>,
}

/// The text of `source` with its headers in their place, each once. `header` gives the text of a header by its file
/// name; an include that it does not know (the emulator's, the compiler's own) stays.
pub fn unit<'t>(source: &str, text: &str, header: &dyn Fn(&str) -> Option<Cow<'t, str>>) -> String {
    let (mut out, mut seen) = (String::new(), Vec::new());
    put(&mut out, &mut seen, source, text, header);
    out
}

fn put<'t>(
    out: &mut String,
    seen: &mut Vec<String>,
    file: &str,
    text: &str,
    header: &dyn Fn(&str) -> Option<Cow<'t, str>>,
) {
    *out += &format!("#line 1 \"{file}\"\n");
    for (number, line) in text.lines().enumerate() {
        let path = line.trim_start().strip_prefix("#include \"").and_then(|rest| rest.split('"').next());
        let name = path.map(|p| p.rsplit('/').next().unwrap_or(p));
        match name.and_then(|n| Some((n, header(n)?))) {
            Some((name, _)) if seen.iter().any(|s| s == name) => *out += "\n",
            Some((name, text)) => {
                seen.push(name.to_string());
                put(out, seen, name, &text, header);
                *out += &format!("#line {} \"{file}\"\n", number + 2);
            }
            // A unit has no file to be read once.
            None if line.trim() == "#pragma once" => *out += "\n",
            None => {
                *out += line;
                out.push('\n');
            }
        }
    }
}

/// A 128-bit FNV-1a hash: tells texts apart and finds damage; it keeps nobody from forging.
pub fn digest(bytes: &[u8]) -> u128 {
    const PRIME: u128 = (1 << 88) + 0x13b;
    bytes.iter().fold(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, |hash, b| (hash ^ u128::from(*b)).wrapping_mul(PRIME))
}

/// The bytes of an archive of these entries: key, digest of the text, code.
pub fn write(toolkit: u32, entries: &[(Key, u128, Vec<u8>)]) -> Vec<u8> {
    let mut header = Vec::new();
    let mut end = 0u64;
    for (key, of_text, code) in entries {
        for text in [&key.op, &key.source, &key.element, &key.target] {
            header.extend((text.len() as u32).to_le_bytes());
            header.extend(text.as_bytes());
        }
        header.extend(of_text.to_le_bytes());
        header.extend(end.to_le_bytes());
        header.extend((code.len() as u64).to_le_bytes());
        header.extend(digest(code).to_le_bytes());
        end += code.len() as u64;
    }
    let mut out = MAGIC.to_vec();
    for number in [VERSION, toolkit, entries.len() as u32, header.len() as u32] {
        out.extend(number.to_le_bytes());
    }
    out.extend(digest(&header).to_le_bytes());
    out.extend(&header);
    entries.iter().for_each(|(_, _, code)| out.extend(code));
    out
}

/// Takes bytes off the front, as far as there are enough.
struct Reader<'b>(&'b [u8]);

impl<'b> Reader<'b> {
    fn take(&mut self, count: usize) -> Result<&'b [u8], String> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or("it ends too early")?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N)?.try_into().map_err(|_| "it ends too early".to_string())
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn size(&mut self) -> Result<usize, String> {
        usize::try_from(u64::from_le_bytes(self.array()?)).map_err(|_| "a size is out of range".to_string())
    }

    fn text(&mut self) -> Result<String, String> {
        let length = self.u32()? as usize;
        if length > LONGEST {
            return Err(format!("a name of {length} bytes"));
        }
        String::from_utf8(self.take(length)?.to_vec()).map_err(|_| "a name is not UTF-8".to_string())
    }
}

impl Archive {
    /// Reads the header.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn parse(bytes: impl Into<Cow<'static, [u8]>>) -> Result<Archive, String> {
        let bytes = bytes.into();
        let mut reader = Reader(&bytes);
        if reader.take(8)? != MAGIC {
            return Err("it is no archive of kernels".to_string());
        }
        let version = reader.u32()?;
        if version != VERSION {
            return Err(format!("version {version} of the format; this program reads version {VERSION}"));
        }
        let (toolkit, count, length) = (reader.u32()?, reader.u32()?, reader.u32()? as usize);
        let expected = u128::from_le_bytes(reader.array()?);
        let header = reader.take(length)?;
        if digest(header) != expected {
            return Err("its header is damaged".to_string());
        }
        let start = bytes.len() - reader.0.len();
        let mut reader = Reader(header);
        let mut entries = Vec::new();
        for _ in 0..count {
            let key =
                Key { op: reader.text()?, source: reader.text()?, element: reader.text()?, target: reader.text()? };
            let of_text = u128::from_le_bytes(reader.array()?);
            let (at, length) = (reader.size()?, reader.size()?);
            let checksum = u128::from_le_bytes(reader.array()?);
            let end = start.checked_add(at).and_then(|from| Some(from..from.checked_add(length)?));
            let place = end.filter(|p| p.end <= bytes.len()).ok_or("it ends too early")?;
            entries.push(Entry { key, digest: of_text, place, checksum });
        }
        Ok(Archive { toolkit, entries, bytes })
    }

    /// The first entry of a source and element whose target is one of `targets`, in the order of these.
    pub fn find(&self, op: &str, source: &str, element: &str, targets: &[&str]) -> Option<&Entry> {
        targets.iter().find_map(|target| {
            let is = |k: &Key| k.op == op && k.source == source && k.element == element && k.target == *target;
            self.entries.iter().find(|e| is(&e.key))
        })
    }

    /// The code of an entry.
    ///
    /// # Errors
    /// When its checksum does not hold.
    pub fn code(&self, entry: &Entry) -> Result<&[u8], String> {
        let code = self.bytes.get(entry.place.clone()).unwrap_or_default();
        if digest(code) == entry.checksum { Ok(code) } else { Err(format!("{} is damaged", entry.key.source)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(element: &str, target: &str) -> Key {
        let [op, source, element, target] = ["gemm", "gemm.cu", element, target].map(str::to_string);
        Key { op, source, element, target }
    }

    fn sample() -> Vec<u8> {
        write(13000, &[(key("f32", "sm_80"), 7, vec![1, 2, 3]), (key("bf16", "sm_90a"), 8, vec![4])])
    }

    #[test]
    fn what_was_written_is_read() {
        let archive = Archive::parse(sample()).unwrap();
        assert_eq!((archive.toolkit, archive.entries.len()), (13000, 2));
        let entry = archive.find("gemm", "gemm.cu", "bf16", &["sm_100", "sm_90a"]).unwrap();
        assert_eq!((entry.digest, archive.code(entry).unwrap()), (8, &[4u8][..]));
        assert!(archive.find("gemm", "gemm.cu", "bf16", &["sm_80"]).is_none());
    }

    #[test]
    fn every_damaged_byte_is_found() {
        let whole = sample();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            // The toolkit's version and the counts are outside the header's checksum; a wrong count ends too early
            // or late.
            let toolkit = 12..16;
            let read = Archive::parse(bytes).and_then(|a| {
                let codes: Result<Vec<_>, _> = a.entries.iter().map(|e| a.code(e).map(<[u8]>::to_vec)).collect();
                codes.map(|c| (a.entries.len(), c))
            });
            let good = read.is_ok_and(|(n, _)| n == 2);
            assert_eq!(good, toolkit.contains(&at), "byte {at}");
        }
        for length in 0..whole.len() {
            let cut = Archive::parse(whole[..length].to_vec());
            assert!(cut.is_err(), "cut to {length}");
        }
    }

    #[test]
    fn headers_come_once_and_in_their_place() {
        let header = |name: &str| match name {
            "a.cuh" => Some(Cow::from("#pragma once\n#include \"b.cuh\"\nint a;\n")),
            "b.cuh" => Some(Cow::from("int b;\n")),
            _ => None,
        };
        let text = "// x\n#include \"../common/a.cuh\"\n#include \"b.cuh\"\n#include \"../emu/c.h\"\nint x;\n";
        let want = "#line 1 \"x.cu\"\n// x\n#line 1 \"a.cuh\"\n\n#line 1 \"b.cuh\"\nint b;\n#line 3 \"a.cuh\"\nint a;\n\
            #line 3 \"x.cu\"\n\n#include \"../emu/c.h\"\nint x;\n";
        assert_eq!(unit("x.cu", text, &header), want);
    }
}
