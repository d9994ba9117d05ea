//! The header of a safetensors file: parsing, and every check that [`crate::io::safetensors`] makes.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::{Error, Result};
use crate::io::dtype::FileDtype;
use crate::io::files::printable;

/// Longest accepted header: the format's own limit.
const MAX_HEADER: u64 = 100_000_000;
/// Most dimensions of a tensor; far above any real tensor.
const MAX_RANK: usize = 32;
/// Bytes of the header length field.
pub(super) const PREFIX: usize = 8;
/// The header key that holds the file's metadata instead of a tensor.
pub(super) const METADATA: &str = "__metadata__";
const FIX_DAMAGED: &str = "the file is damaged or incomplete: download or save it again";

/// Position of one tensor in a file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) dtype: FileDtype,
    pub(super) shape: Vec<usize>,
    /// Byte range in the data section.
    pub(super) begin: usize,
    pub(super) end: usize,
}

/// A header that passed all checks.
pub(super) struct Header {
    /// Offset of the data section in the file.
    pub(super) data: usize,
    pub(super) entries: BTreeMap<String, Entry>,
    pub(super) metadata: BTreeMap<String, String>,
}

/// Reads and checks the header of the whole file `all`; `place` names it in errors.
pub(super) fn read(place: &str, all: &[u8]) -> Result<Header> {
    let header = header_bytes(place, all)?;
    let data = PREFIX + header.len();
    let (raw, metadata) = parse_header(place, header)?;
    let mut entries = BTreeMap::new();
    for (name, raw) in raw {
        let entry_place = tensor_place(place, &name);
        let entry = check_entry(&entry_place, &raw, all.len() - data)?;
        if entries.insert(name, entry).is_some() {
            return Err(Error::failure(entry_place, "duplicate tensor name")
                .is("listed more than once in the header")
                .must("listed once")
                .fix(FIX_DAMAGED));
        }
    }
    check_coverage(place, &entries, all.len() - data)?;
    Ok(Header { data, entries, metadata })
}

/// File and tensor, for the place of an error.
pub(super) fn tensor_place(file: &str, name: &str) -> String {
    format!("{file}: {}", printable(name))
}

/// Cuts the JSON header out of the file.
fn header_bytes<'a>(place: &str, all: &'a [u8]) -> Result<&'a [u8]> {
    let Some((prefix, rest)) = all.split_first_chunk::<PREFIX>() else {
        return Err(Error::failure(place, "file too short")
            .is(format!("{} bytes", all.len()))
            .must("at least 8 bytes of header length")
            .fix(FIX_DAMAGED));
    };
    let length = u64::from_le_bytes(*prefix);
    if length > MAX_HEADER {
        return Err(Error::failure(place, "header too large")
            .is(format!("{length} bytes"))
            .must(format!("at most {MAX_HEADER} bytes"))
            .fix("check that this is a safetensors file"));
    }
    let header = usize::try_from(length).ok().and_then(|length| rest.get(..length));
    header.ok_or_else(|| {
        Error::failure(place, "header truncated")
            .is(format!("{} bytes after the length field", rest.len()))
            .must(format!("at least {length} bytes"))
            .fix(FIX_DAMAGED)
    })
}

/// A tensor as the header states it, not yet checked.
#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Dims,
    data_offsets: (u64, u64),
}

/// A shape as stated: its dimensions, or the reason why they cannot be.
enum Dims {
    Valid(Vec<u64>),
    Invalid(String),
}

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct DimsVisitor;
        impl<'de> Visitor<'de> for DimsVisitor {
            type Value = Dims;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of dimensions")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Dims, A::Error> {
                let mut dims = Vec::new();
                let mut invalid = None;
                while let Some(number) = seq.next_element::<serde_json::Number>()? {
                    match number.as_u64() {
                        Some(dim) if dims.len() < MAX_RANK => dims.push(dim),
                        Some(_) => invalid = Some(format!("more than {MAX_RANK} dimensions")),
                        None => invalid = Some(format!("a dimension of {number}")),
                    }
                }
                Ok(invalid.map_or(Dims::Valid(dims), Dims::Invalid))
            }
        }
        deserializer.deserialize_seq(DimsVisitor)
    }
}

/// The header in file order. A list, not a map: a name that is listed twice must be noticed.
struct RawHeader {
    tensors: Vec<(String, RawEntry)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
                let mut header = RawHeader { tensors: Vec::new(), metadata: BTreeMap::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                    } else {
                        header.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

type Named = Vec<(String, RawEntry)>;

fn parse_header(place: &str, header: &[u8]) -> Result<(Named, BTreeMap<String, String>)> {
    let text = std::str::from_utf8(header).map_err(|e| {
        Error::failure(place, "header not utf-8")
            .is(format!("an invalid byte at header offset {}", e.valid_up_to()))
            .must("UTF-8 text")
            .fix(FIX_DAMAGED)
    })?;
    let parsed: RawHeader = serde_json::from_str(text).map_err(|e| {
        // Tell broken JSON from well-formed JSON of the wrong kind.
        let well_formed = serde_json::from_str::<IgnoredAny>(text).is_ok();
        Error::failure(place, "invalid header json")
            .is(printable(&e.to_string()))
            .must(if well_formed {
                "a JSON object of {dtype, shape, data_offsets} per tensor"
            } else {
                "well-formed JSON"
            })
            .fix(FIX_DAMAGED)
    })?;
    Ok((parsed.tensors, parsed.metadata))
}

/// Checks one tensor on its own against `available` bytes of data.
fn check_entry(place: &str, raw: &RawEntry, available: usize) -> Result<Entry> {
    let dtype = FileDtype::from_name(&raw.dtype).ok_or_else(|| {
        let known: Vec<_> = FileDtype::ALL.iter().map(|d| d.name()).collect();
        Error::failure(place, "unknown dtype")
            .is(printable(&raw.dtype))
            .must(format!("one of {}", known.join(", ")))
            .fix("convert the file to a known dtype")
    })?;
    let bad_shape = |is: String| {
        Error::failure(place, "invalid shape")
            .is(is)
            .must("non-negative dimensions whose product fits in memory")
            .fix(FIX_DAMAGED)
    };
    let dims = match &raw.shape {
        Dims::Valid(dims) => dims,
        Dims::Invalid(why) => return Err(bad_shape(why.clone())),
    };
    let shape = dims.iter().map(|&d| usize::try_from(d)).collect::<std::result::Result<Vec<_>, _>>();
    let shape = shape.map_err(|_| bad_shape(format!("{dims:?}")))?;
    let size = dtype.byte_len(&shape).ok_or_else(|| bad_shape(format!("{dims:?} of {dtype}")))?;
    let (begin, end) = raw.data_offsets;
    if begin > end {
        return Err(Error::failure(place, "invalid offsets")
            .is(format!("data_offsets [{begin}, {end}]"))
            .must("begin at most end")
            .fix(FIX_DAMAGED));
    }
    let (begin, end) = match (usize::try_from(begin), usize::try_from(end)) {
        (Ok(begin), Ok(end)) if end <= available => (begin, end),
        _ => {
            return Err(Error::failure(place, "data truncated")
                .is(format!("{available} bytes of data in the file"))
                .must(format!("at least {end} bytes"))
                .fix(FIX_DAMAGED));
        }
    };
    if end - begin != size {
        return Err(Error::failure(place, "size does not match shape and dtype")
            .is(format!("{} bytes", end - begin))
            .must(format!("{size} bytes for {dtype} {shape:?}"))
            .fix(FIX_DAMAGED));
    }
    Ok(Entry { dtype, shape, begin, end })
}

/// Checks that the tensors tile the data section: no overlap, no gap, nothing left over.
fn check_coverage(place: &str, entries: &BTreeMap<String, Entry>, available: usize) -> Result<()> {
    let mut in_order: Vec<_> = entries.iter().collect();
    in_order.sort_by_key(|(_, entry)| (entry.begin, entry.end));
    let uncovered = |from: usize, to: usize| {
        Error::failure(place, "trailing or uncovered bytes")
            .is(format!("data bytes {from}..{to} belong to no tensor"))
            .must("every data byte in one tensor")
            .fix(FIX_DAMAGED)
    };
    let mut covered = 0;
    for (name, entry) in in_order {
        if entry.begin < covered {
            return Err(Error::failure(tensor_place(place, name), "overlapping tensors")
                .is(format!("begins at data byte {}", entry.begin))
                .must(format!("begin at {covered}, where the tensor before it ends"))
                .fix(FIX_DAMAGED));
        }
        if entry.begin > covered {
            return Err(uncovered(covered, entry.begin));
        }
        covered = entry.end;
    }
    if covered == available { Ok(()) } else { Err(uncovered(covered, available)) }
}
