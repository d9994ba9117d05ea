//! One safetensors file: a strict reader over mapped or borrowed bytes, and a deterministic, atomic writer.
//!
//! Layout: an 8-byte little-endian header length, a JSON header mapping each tensor name to its dtype, shape and byte
//! range, then the data, covered by the tensors without gap or overlap
//! (<https://github.com/huggingface/safetensors#format>). The header is checked here rather than by a library so
//! that every refusal names the file, the tensor, what it is, what it must be and what to do.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::{Error, Result};
use crate::io::atomic;
use crate::io::dtype::FileDtype;
use crate::io::files::printable;
use crate::io::map::Mapped;

/// Longest accepted header: the format's own limit.
const MAX_HEADER: u64 = 100_000_000;
/// Most dimensions of a tensor; far above any real tensor.
const MAX_RANK: usize = 32;
/// Bytes of the header length field.
const PREFIX: usize = 8;
/// The header key that holds the file's metadata instead of a tensor.
const METADATA: &str = "__metadata__";
const FIX_DAMAGED: &str = "the file is damaged or incomplete: download or save it again";

/// Position of one tensor in a file.
#[derive(Debug)]
struct Entry {
    dtype: FileDtype,
    shape: Vec<usize>,
    /// Byte range in the data section.
    begin: usize,
    end: usize,
}

/// A validated safetensors file over the bytes `B`: a map, a vector or a borrowed slice.
#[derive(Debug)]
pub struct TensorFile<B: AsRef<[u8]> = Mapped> {
    place: String,
    bytes: B,
    /// Offset of the data section in `bytes`.
    data: usize,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

/// One tensor of a file, borrowing its bytes.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    place: &'a str,
    /// Name in the file.
    pub name: &'a str,
    /// Element type on disk.
    pub dtype: FileDtype,
    /// Dimensions, outermost first; empty for a scalar.
    pub shape: &'a [usize],
    /// Little-endian elements in row-major order, of any alignment.
    pub bytes: &'a [u8],
}

impl TensorFile {
    /// Maps and validates the file at `path`. Reads the header only; data pages are read when used.
    ///
    /// # Errors
    /// When the file cannot be opened or is malformed; the problem names the kind, e.g. "data truncated".
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(&path.display().to_string(), Mapped::open(path)?)
    }
}

impl<B: AsRef<[u8]>> TensorFile<B> {
    /// Validates bytes that are already in memory; `place` names them in errors.
    ///
    /// # Errors
    /// When the bytes are malformed; memory use is bounded by a multiple of their length.
    pub fn parse(place: &str, bytes: B) -> Result<Self> {
        let all = bytes.as_ref();
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
        Ok(TensorFile { place: place.to_owned(), bytes, data, entries, metadata })
    }

    /// The file's name in messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, entry) = self.entries.get_key_value(name)?;
        Some(self.view(name, entry))
    }

    /// All tensors, sorted by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = TensorView<'_>> {
        self.entries.iter().map(|(name, entry)| self.view(name, entry))
    }

    /// The file's own key-value text; empty when it has none.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    fn view<'a>(&'a self, name: &'a str, entry: &'a Entry) -> TensorView<'a> {
        // In range: `check_entry` compared `end` with the length of the data section.
        let bytes = &self.bytes.as_ref()[self.data + entry.begin..self.data + entry.end];
        TensorView { place: &self.place, name, dtype: entry.dtype, shape: &entry.shape, bytes }
    }
}

impl TensorView<'_> {
    /// File and tensor, for the place of an error.
    pub fn place(&self) -> String {
        tensor_place(self.place, self.name)
    }

    /// Elements as `f32`; exactness as [`FileDtype::decode_f32`].
    ///
    /// # Errors
    /// "unsupported dtype" for packed, 8-bit float and complex types.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        self.dtype.decode_f32(self.bytes, &self.place())
    }

    /// Integer elements as `i64`, exactly.
    ///
    /// # Errors
    /// "unsupported dtype" for floating-point types, "integer out of range" for a U64 beyond i64.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        self.dtype.decode_i64(self.bytes, &self.place())
    }
}

fn tensor_place(file: &str, name: &str) -> String {
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

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct TensorRecord<'a> {
    /// Name in the file; unique, and not `__metadata__`.
    pub name: String,
    /// Element type on disk.
    pub dtype: FileDtype,
    /// Dimensions, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Little-endian elements in row-major order; as many bytes as dtype and shape say.
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> TensorRecord<'a> {
    /// A tensor of `f32` values.
    pub fn f32(name: impl Into<String>, shape: &[usize], values: &'a [f32]) -> Self {
        let bytes = Cow::Borrowed(bytemuck::cast_slice(values));
        TensorRecord { name: name.into(), dtype: FileDtype::F32, shape: shape.to_vec(), bytes }
    }

    /// A tensor of `i64` values.
    pub fn i64(name: impl Into<String>, shape: &[usize], values: &'a [i64]) -> Self {
        let bytes = Cow::Borrowed(bytemuck::cast_slice(values));
        TensorRecord { name: name.into(), dtype: FileDtype::I64, shape: shape.to_vec(), bytes }
    }
}

/// Writes a safetensors file atomically; equal contents give equal bytes, whatever the order of `tensors`.
///
/// Data is laid out by falling element width, then by name, and starts at a multiple of 8 bytes, so that every
/// element is aligned in a map of the file.
///
/// # Errors
/// "duplicate tensor name", "invalid tensor name" or "size does not match shape and dtype" for wrong input,
/// and the I/O errors of [`atomic::write_atomic`]. An old file survives every error.
pub fn write<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = TensorRecord<'a>>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let place = path.display().to_string();
    let mut records: Vec<_> = tensors.into_iter().collect();
    records.sort_by(|a, b| (b.dtype.bits(), &a.name).cmp(&(a.dtype.bits(), &b.name)));
    let header = encode_header(&place, &records, metadata)?;
    atomic::write_atomic(path, |w| {
        w.write_all(&(header.len() as u64).to_le_bytes())?;
        w.write_all(&header)?;
        records.iter().try_for_each(|record| w.write_all(&record.bytes))
    })
}

/// The JSON header of `records` in their order, padded with spaces to a multiple of 8 bytes.
fn encode_header(place: &str, records: &[TensorRecord], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut names = std::collections::BTreeSet::new();
    let mut fields = Vec::with_capacity(records.len() + 1);
    if !metadata.is_empty() {
        fields.push(format!("\"{METADATA}\":{}", serde_json::json!(metadata)));
    }
    let mut begin = 0;
    for record in records {
        let tensor = tensor_place(place, &record.name);
        if record.name == METADATA {
            return Err(Error::failure(tensor, "invalid tensor name").must("another name: this one is reserved"));
        }
        if !names.insert(&record.name) {
            return Err(Error::failure(tensor, "duplicate tensor name").must("one tensor per name"));
        }
        if record.dtype.byte_len(&record.shape) != Some(record.bytes.len()) {
            return Err(Error::failure(tensor, "size does not match shape and dtype")
                .is(format!("{} bytes", record.bytes.len()))
                .must(format!("the size of {} {:?}", record.dtype, record.shape)));
        }
        let end = begin + record.bytes.len();
        let name = serde_json::json!(record.name);
        let (dtype, shape) = (record.dtype, serde_json::json!(record.shape));
        fields.push(format!("{name}:{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{begin},{end}]}}"));
        begin = end;
    }
    let mut header = format!("{{{}}}", fields.join(",")).into_bytes();
    header.resize(header.len().next_multiple_of(PREFIX), b' ');
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::{golden, list, read_bytes, test_dir};

    fn metadata(key: &str, value: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(key.to_owned(), value.to_owned())])
    }

    #[test]
    fn every_container_case_gets_its_verdict_and_kind() {
        let mut seen = 0;
        for dir in list(&golden("safetensors_bad")).unwrap() {
            let case: serde_json::Value = serde_json::from_slice(&read_bytes(&dir.join("case.json")).unwrap()).unwrap();
            let config = &case["config"];
            if config["level"] != "container" {
                continue;
            }
            seen += 1;
            match (TensorFile::open(&dir.join("model/file.safetensors")), config["message_kind"].as_str()) {
                (Ok(_), None) => assert_eq!(config["verdict"], "accept"),
                (Err(e), Some(kind)) => assert!(e.problem().contains(kind), "{dir:?}: {e}, must contain {kind}"),
                (other, kind) => panic!("{dir:?}: {other:?}, must be {kind:?}"),
            }
        }
        assert_eq!(seen, 24);
    }

    #[test]
    fn values_of_the_half_types() {
        let file = TensorFile::open(&golden("safetensors_bad/container_valid_f16_bf16_i64/model/file.safetensors"));
        let file = file.unwrap();
        assert_eq!(file.names().collect::<Vec<_>>(), ["h", "i", "w"]);
        for name in ["h", "w"] {
            let view = file.get(name).unwrap();
            assert!(view.shape == [2] && view.to_f32().unwrap().iter().all(|v| v.is_finite()), "{view:?}");
        }
        assert_eq!(file.get("i").unwrap().to_i64().unwrap().len(), 2);
    }

    #[test]
    fn round_trip_is_deterministic_and_read_by_the_safetensors_crate() {
        let dir = test_dir("safetensors_write");
        let (a, b) = ([1.5f32, -2.0], [7i64]);
        let records = [TensorRecord::f32("a", &[2, 1], &a), TensorRecord::i64("b\"", &[], &b)];
        let meta = metadata("graft.plan", "lr = \"1e-4\"\n");
        let (one, two) = (dir.join("one.safetensors"), dir.join("two.safetensors"));
        write(&one, records.clone(), &meta).unwrap();
        write(&two, records.into_iter().rev(), &meta).unwrap();
        let bytes = read_bytes(&one).unwrap();
        assert_eq!(bytes, read_bytes(&two).unwrap());

        let file = TensorFile::open(&one).unwrap();
        assert_eq!(file.get("a").unwrap().to_f32().unwrap(), a);
        assert_eq!(file.get("a").unwrap().shape, [2, 1]);
        assert_eq!(file.get("b\"").unwrap().to_i64().unwrap(), b);
        assert_eq!(file.metadata(), &meta);

        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.tensor("a").unwrap().data(), bytemuck::cast_slice::<f32, u8>(&a));
        assert_eq!(theirs.len(), 2);
    }

    #[test]
    fn writer_refuses_wrong_input_and_keeps_the_old_file() {
        let path = test_dir("safetensors_refuse").join("a.safetensors");
        let none = BTreeMap::new();
        write(&path, [TensorRecord::f32("a", &[1], &[1.0])], &none).unwrap();
        let twice = [TensorRecord::f32("a", &[1], &[2.0]), TensorRecord::f32("a", &[1], &[3.0])];
        assert_eq!(write(&path, twice, &none).unwrap_err().problem(), "duplicate tensor name");
        let wrong = write(&path, [TensorRecord::f32("a", &[3], &[2.0])], &none).unwrap_err().to_string();
        assert!(wrong.ends_with("a: size does not match shape and dtype; is 4 bytes; must be the size of F32 [3]"));
        assert!(write(&path, [TensorRecord::f32(METADATA, &[1], &[2.0])], &none).is_err());
        assert_eq!(TensorFile::open(&path).unwrap().get("a").unwrap().to_f32().unwrap(), [1.0]);
    }

    #[test]
    fn unaligned_borrowed_bytes_are_read() {
        let header = br#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        for shift in 0..4 {
            let mut bytes = vec![0; shift];
            bytes.extend((header.len() as u64).to_le_bytes());
            bytes.extend(header);
            bytes.extend(0.25f32.to_le_bytes());
            let file = TensorFile::parse("mem", &bytes[shift..]).unwrap();
            assert_eq!(file.get("x").unwrap().to_f32().unwrap(), [0.25]);
        }
    }
}
