//! One safetensors file: a strict reader over mapped or borrowed bytes, and a deterministic, atomic writer.
//!
//! Layout: an 8-byte little-endian header length, a JSON header mapping each tensor name to its dtype, shape and byte
//! range, then the data, covered by the tensors without gap or overlap
//! (<https://github.com/huggingface/safetensors#format>). The header is checked here rather than by a library so
//! that every refusal names the file, the tensor, what it is, what it must be and what to do.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use crate::error::{Error, Result};
use crate::io::atomic;
use crate::io::dtype::FileDtype;
use crate::io::map::Mapped;
use crate::io::tensor_header::{self as header, Entry, Header, METADATA, PREFIX, tensor_place};

/// A validated safetensors file over the bytes `B`: a map, a vector or a borrowed slice.
#[derive(Debug)]
pub struct TensorFile<B: AsRef<[u8]> = Mapped> {
    place: String,
    bytes: B,
    /// Offset of the data section in `bytes`.
    data: usize,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
    /// The file itself, where the bytes are a map of it.
    file: Option<File>,
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
    /// Where the file has the bytes.
    file: Option<(&'a File, u64)>,
}

impl TensorFile {
    /// Maps and validates the file at `path`. Reads the header only; data pages are read when used.
    ///
    /// # Errors
    /// When the file cannot be opened or is malformed; the problem names the kind, e.g. "data truncated".
    pub fn open(path: &Path) -> Result<Self> {
        let mapped = Mapped::open(path)?;
        let file = mapped.file().try_clone().map_err(|e| Error::io(path, "open", &e))?;
        Ok(TensorFile { file: Some(file), ..Self::parse(&path.display().to_string(), mapped)? })
    }

    /// As [`Mapped::release`].
    pub fn release(&self) {
        self.bytes.release();
    }
}

impl<B: AsRef<[u8]>> TensorFile<B> {
    /// Validates bytes that are already in memory; `place` names them in errors.
    ///
    /// # Errors
    /// When the bytes are malformed; memory use is bounded by a multiple of their length.
    pub fn parse(place: &str, bytes: B) -> Result<Self> {
        let Header { data, entries, metadata } = header::read(place, bytes.as_ref())?;
        Ok(TensorFile { place: place.to_owned(), bytes, data, entries, metadata, file: None })
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
        let file = self.file.as_ref().map(|file| (file, (self.data + entry.begin) as u64));
        TensorView { place: &self.place, name, dtype: entry.dtype, shape: &entry.shape, bytes, file }
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

    /// Where the bytes lie in their file; 0 where there is none.
    pub fn offset(&self) -> u64 {
        self.file.map_or(0, |(_, offset)| offset)
    }

    /// Elements as `f32` into memory of the caller, as [`TensorView::to_f32`] gives them. The bytes are read from the
    /// file, in pieces where they must be converted, and never all held beside the result.
    ///
    /// # Errors
    /// As [`TensorView::to_f32`]; a target of another length; a file that cannot be read any more.
    pub fn read_f32(&self, target: &mut [f32]) -> Result<()> {
        let width = self.dtype.bits() / 8;
        if width == 0 || self.bytes.len() / width != target.len() {
            return Err(Error::failure(self.place(), "wrong number of elements")
                .is(format!("{} bytes of {}", self.bytes.len(), self.dtype))
                .must(format!("{} elements", target.len())));
        }
        match self.file {
            // Little-endian f32 are what this machine has in memory.
            Some((file, offset)) if self.dtype == FileDtype::F32 && cfg!(target_endian = "little") => {
                read_at(file, offset, bytemuck::cast_slice_mut(target)).map_err(|e| self.unreadable(&e))
            }
            _ => {
                let mut at = 0;
                self.pieces(&mut |values| {
                    target[at..at + values.len()].copy_from_slice(values);
                    at += values.len();
                    Ok(())
                })
            }
        }
    }

    /// Elements as `f32` in pieces, from the first to the last, each read from the file as it comes.
    ///
    /// # Errors
    /// As [`TensorView::read_f32`], and those of `each`.
    pub fn pieces(&self, each: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        let width = (self.dtype.bits() / 8).max(1);
        let mut held = vec![0u8; if self.file.is_some() { (PIECE * width).min(self.bytes.len()) } else { 0 }];
        for (index, piece) in self.bytes.chunks(PIECE * width).enumerate() {
            let piece = match self.file {
                None => piece,
                Some((file, offset)) => {
                    let held = &mut held[..piece.len()];
                    let place = offset + (index * PIECE * width) as u64;
                    read_at(file, place, held).map_err(|e| self.unreadable(&e))?;
                    held
                }
            };
            each(&self.dtype.decode_f32(piece, &self.place())?)?;
        }
        Ok(())
    }

    fn unreadable(&self, e: &std::io::Error) -> Error {
        Error::failure(self.place(), format!("cannot read: {e}")).fix("the file was changed or cut while it was read")
    }

    /// Integer elements as `i64`, exactly.
    ///
    /// # Errors
    /// "unsupported dtype" for floating-point types, "integer out of range" for a U64 beyond i64.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        self.dtype.decode_i64(self.bytes, &self.place())
    }
}

/// Elements that are converted at a time.
const PIECE: usize = 1 << 18;

/// Fills `target` from a place in a file.
#[cfg(unix)]
fn read_at(file: &File, offset: u64, target: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, target, offset)
}

/// Fills `target` from a place in a file.
#[cfg(windows)]
fn read_at(file: &File, mut offset: u64, mut target: &mut [u8]) -> std::io::Result<()> {
    while !target.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, target, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            read => (offset, target) = (offset + read as u64, &mut target[read..]),
        }
    }
    Ok(())
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
    pub fn f32(name: impl Into<String>, shape: &[usize], values: impl Into<Cow<'a, [f32]>>) -> Self {
        let bytes = match values.into() {
            Cow::Borrowed(values) => Cow::Borrowed(bytemuck::cast_slice(values)),
            Cow::Owned(values) => Cow::Owned(bytemuck::cast_slice(&values).to_vec()),
        };
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
