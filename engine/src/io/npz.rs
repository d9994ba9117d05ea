//! Arrays in `.npz` files, as evaluation statistics and sets of samples are passed around: a zip archive of `.npy`
//! files, stored or deflated.
//!
//! Only plain little-endian numbers in C order are read; nothing is unpickled. The header's shape must agree with the
//! bytes that are there, and a deflated entry is never inflated beyond what its own header states.

use std::io::{Cursor, Read};
use std::path::Path;

use zip::{CompressionMethod, ZipArchive};

use crate::error::{Error, Result};
use crate::io::dtype::FileDtype;
use crate::io::files::printable;
use crate::io::map::Mapped;
use crate::io::pictures::Pictures;

const FIX: &str = "save it again with numpy.savez, as plain numbers in C order";
/// Most bytes of an array that is copied into memory.
const MAX_COPIED: usize = 1 << 31;
/// Longest text of a header.
const MAX_HEADER: usize = 1 << 16;

/// The arrays of a file.
#[derive(Debug)]
pub struct Npz {
    place: String,
    file: Mapped,
    names: Vec<String>,
}

/// An array in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Dims, outermost first.
    pub shape: Vec<usize>,
    /// Values, row-major; f32 and integers widened.
    pub values: Vec<f64>,
}

/// What precedes the elements of an `.npy` file.
#[derive(Debug, PartialEq)]
struct Header {
    dtype: FileDtype,
    shape: Vec<usize>,
    /// Bytes of the header.
    len: usize,
    /// Bytes of the elements.
    data: usize,
}

impl Npz {
    /// Opens a file and reads its directory.
    ///
    /// # Errors
    /// A missing file, or "damaged zip archive".
    pub fn open(path: &Path) -> Result<Npz> {
        let (place, file) = (path.display().to_string(), Mapped::open(path)?);
        let archive = ZipArchive::new(Cursor::new(file.as_ref())).map_err(|e| damaged(&place, &e.to_string()))?;
        let all = archive.file_names().filter_map(|name| name.ok());
        let names = all.filter_map(|name| name.strip_suffix(".npy").map(str::to_string)).collect();
        Ok(Npz { place, file, names })
    }

    /// Whether there is an array of this name.
    pub fn has(&self, name: &str) -> bool {
        self.names.iter().any(|n| n == name)
    }

    /// Reads an array of numbers into memory.
    ///
    /// # Errors
    /// A missing or damaged array, another kind of elements, or one beyond 2 GiB.
    pub fn read(&self, name: &str) -> Result<Array> {
        let (header, bytes) = self.copy(name)?;
        let values = match header.dtype {
            FileDtype::F64 => bytes.as_chunks::<8>().0.iter().map(|&b| f64::from_le_bytes(b)).collect(),
            FileDtype::F32 | FileDtype::F16 => {
                header.dtype.decode_f32(&bytes, &self.place)?.into_iter().map(f64::from).collect()
            }
            dtype => dtype.decode_i64(&bytes, &self.place)?.into_iter().map(|v| v as f64).collect(),
        };
        Ok(Array { shape: header.shape, values })
    }

    /// Takes an array of bytes `[n, H, W, C]` as pictures; a stored one stays in the file.
    ///
    /// # Errors
    /// As [`Npz::read`], and another type or shape.
    pub fn pictures(self, name: &str) -> Result<Pictures> {
        let place = self.at(name);
        let shape = |header: &Header| -> Result<[usize; 4]> {
            <[usize; 4]>::try_from(&header.shape[..]).ok().filter(|_| header.dtype == FileDtype::U8).ok_or_else(|| {
                Error::failure(&place, "not pictures")
                    .is(format!("{} {:?}", header.dtype, header.shape))
                    .must("bytes [n, H, W, C]")
            })
        };
        if let Some(range) = self.stored(name)? {
            let header = parse(&place, &self.file.as_ref()[range.clone()], range.len())?;
            return Pictures::mapped(&place, shape(&header)?, self.file, range.start + header.len..range.end);
        }
        let (header, bytes) = self.copy(name)?;
        Pictures::new(&place, shape(&header)?, bytes)
    }

    fn at(&self, name: &str) -> String {
        format!("{}: {}", self.place, printable(name))
    }

    /// Bytes of the file that hold an entry, where it is stored as it is.
    fn stored(&self, name: &str) -> Result<Option<std::ops::Range<usize>>> {
        let bytes = self.file.as_ref();
        let mut archive = self.archive()?;
        let at = self.index(&archive, name)?;
        let entry = archive.by_index_raw(at).map_err(|e| damaged(&self.at(name), &e.to_string()))?;
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
            return Ok(None);
        }
        let range = entry.data_start().and_then(|start| {
            let start = usize::try_from(start).ok()?;
            let end = start.checked_add(usize::try_from(entry.size()).ok()?)?;
            (end <= bytes.len()).then_some(start..end)
        });
        range.map(Some).ok_or_else(|| damaged(&self.at(name), "it lies outside the file"))
    }

    fn archive(&self) -> Result<ZipArchive<Cursor<&[u8]>>> {
        ZipArchive::new(Cursor::new(self.file.as_ref())).map_err(|e| damaged(&self.place, &e.to_string()))
    }

    fn index<R: Read + std::io::Seek>(&self, archive: &ZipArchive<R>, name: &str) -> Result<usize> {
        archive.index_for_name(&format!("{name}.npy")).ok_or_else(|| {
            let names: Vec<String> = self.names.iter().take(20).map(|n| printable(n)).collect();
            Error::failure(self.at(name), "missing array").is(names.join(", ")).must("present")
        })
    }

    /// Reads an entry; the checksum of the archive is verified on the way.
    fn copy(&self, name: &str) -> Result<(Header, Vec<u8>)> {
        let place = self.at(name);
        let mut archive = self.archive()?;
        let at = self.index(&archive, name)?;
        let mut entry = archive.by_index(at).map_err(|e| damaged(&place, &e.to_string()))?;
        let wrap = |e: std::io::Error| damaged(&place, &e.to_string());
        let mut start = Vec::new();
        entry.by_ref().take(12).read_to_end(&mut start).map_err(wrap)?;
        let length = header_len(&place, &start)?;
        entry.by_ref().take((length - start.len().min(length)) as u64).read_to_end(&mut start).map_err(wrap)?;
        let header = parse(&place, &start, usize::MAX)?;
        if header.data > MAX_COPIED {
            return Err(Error::failure(&place, "array too large")
                .is(format!("{} bytes", header.data))
                .must(format!("at most {MAX_COPIED}"))
                .fix("store it without compression"));
        }
        let mut bytes = Vec::new();
        // One byte more than stated tells whether something follows; memory grows with what is really there.
        entry.take(header.data as u64 + 1).read_to_end(&mut bytes).map_err(wrap)?;
        // A short header's first read may have taken elements already.
        let early = start.get(header.len..).unwrap_or_default();
        let bytes = if early.is_empty() { bytes } else { [early, &bytes].concat() };
        check_len(&place, &header, bytes.len())?;
        Ok((header, bytes))
    }
}

fn damaged(place: &str, why: &str) -> Error {
    Error::failure(place, "damaged zip archive").is(printable(why)).must("a complete npz file").fix(FIX)
}

fn check_len(place: &str, header: &Header, found: usize) -> Result<()> {
    if found == header.data {
        return Ok(());
    }
    Err(Error::failure(place, if found < header.data { "data truncated" } else { "trailing bytes" })
        .is(format!("{found} bytes or more"))
        .must(format!("{} for {} {:?}", header.data, header.dtype, header.shape))
        .fix(FIX))
}

/// Bytes of a header, from its first 12.
fn header_len(place: &str, start: &[u8]) -> Result<usize> {
    let refuse = || {
        Error::failure(place, "not an npy array")
            .is(format!("a file that begins with {:02x?}", &start[..start.len().min(8)]))
            .must("the magic number of numpy, version 1 to 3")
            .fix(FIX)
    };
    let (before, text) = match start {
        [0x93, b'N', b'U', b'M', b'P', b'Y', 1, _, a, b, ..] => (10, usize::from(u16::from_le_bytes([*a, *b]))),
        [0x93, b'N', b'U', b'M', b'P', b'Y', 2 | 3, _, a, b, c, d, ..] => {
            (12, u32::from_le_bytes([*a, *b, *c, *d]) as usize)
        }
        _ => return Err(refuse()),
    };
    if text > MAX_HEADER { Err(refuse()) } else { Ok(before + text) }
}

/// The header at the start of `bytes`; `total` is the number of bytes of the whole array, or more than any.
fn parse(place: &str, bytes: &[u8], total: usize) -> Result<Header> {
    let len = header_len(place, bytes)?;
    let text = bytes.get(if bytes[6] == 1 { 10 } else { 12 }..len).unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    let refuse = |problem: &str| {
        Error::failure(place, problem).is(printable(text.trim())).must("plain numbers in C order").fix(FIX)
    };
    let (dtype, shape) = fields(&text).ok_or_else(|| refuse("unsupported npy header"))?;
    let data = dtype.byte_len(&shape).ok_or_else(|| refuse("impossible shape"))?;
    let header = Header { dtype, shape, len, data };
    if total != usize::MAX {
        check_len(place, &header, total.saturating_sub(len))?;
    }
    Ok(header)
}

/// Reads `{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }`, keys in any order, nothing else.
fn fields(text: &str) -> Option<(FileDtype, Vec<usize>)> {
    let value = |key: &str| {
        let (_, after) = text.split_once(&format!("'{key}':"))?;
        Some(after.trim_start())
    };
    let quoted = value("descr")?.strip_prefix('\'')?;
    let dtype = match quoted.split_once('\'')?.0 {
        "<f8" => FileDtype::F64,
        "<f4" => FileDtype::F32,
        "<f2" => FileDtype::F16,
        "|u1" | "<u1" => FileDtype::U8,
        "<i4" => FileDtype::I32,
        "<i8" => FileDtype::I64,
        _ => return None,
    };
    let shape = value("shape")?.strip_prefix('(')?.split_once(')')?.0;
    let dims = shape.split(',').map(str::trim).filter(|d| !d.is_empty());
    let shape: Option<Vec<usize>> = dims.map(|d| d.parse().ok()).collect();
    value("fortran_order")?.starts_with("False").then_some(())?;
    Some((dtype, shape?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::archive::stored_zip;
    use crate::io::files::test_dir;

    fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}").into_bytes();
        text.resize((10 + text.len()).next_multiple_of(64) - 11, b' ');
        text.push(b'\n');
        [b"\x93NUMPY\x01\x00", &(text.len() as u16).to_le_bytes()[..], &text, data].concat()
    }

    fn open(name: &str, arrays: &[(&str, &[u8])], method: CompressionMethod) -> Result<Npz> {
        let path = test_dir("npz").join(name);
        std::fs::write(&path, stored_zip(arrays, method)).unwrap();
        Npz::open(&path)
    }

    #[test]
    fn numbers_and_pictures_stored_and_deflated() {
        let mu = npy("<f8", "(2,)", &[1.5f64.to_le_bytes(), (-2.0f64).to_le_bytes()].concat());
        let half = npy("<f4", "(1, 2)", &[0.5f32.to_le_bytes(), 4.0f32.to_le_bytes()].concat());
        let images = npy("|u1", "(2, 1, 2, 3)", &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        for (i, method) in [CompressionMethod::Stored, CompressionMethod::Deflated].into_iter().enumerate() {
            let arrays: [(&str, &[u8]); 3] = [("mu.npy", &mu), ("sigma.npy", &half), ("arr_0.npy", &images)];
            let npz = open(&format!("a{i}.npz"), &arrays, method).unwrap();
            assert!(npz.has("mu") && !npz.has("mu_s"));
            assert_eq!(npz.read("mu").unwrap(), Array { shape: vec![2], values: vec![1.5, -2.0] });
            assert_eq!(npz.read("sigma").unwrap(), Array { shape: vec![1, 2], values: vec![0.5, 4.0] });
            let error = npz.read("mu_s").unwrap_err().to_string();
            assert!(error.contains("missing array") && error.contains("arr_0"), "{error}");
            let pictures = npz.pictures("arr_0").unwrap();
            assert_eq!((pictures.n, pictures.height, pictures.width, pictures.channels), (2, 1, 2, 3));
            assert_eq!(pictures.image(1), [7, 8, 9, 10, 11, 12]);
        }
    }

    #[test]
    fn hostile_arrays_are_refused() {
        let problems = |array: &[u8], method| {
            let npz = open("bad.npz", &[("x.npy", array)], method).unwrap();
            let read = npz.read("x").unwrap_err().problem().to_string();
            (read, npz.pictures("x").unwrap_err().problem().to_string())
        };
        for method in [CompressionMethod::Stored, CompressionMethod::Deflated] {
            let problem = |array: &[u8]| problems(array, method);
            let same = |word: &str| (word.to_string(), word.to_string());
            assert_eq!(problem(b"no"), same("not an npy array"));
            assert_eq!(problem(b"\x93NUMPY\x02\x00\xff\xff\xff\xff"), same("not an npy array"));
            assert_eq!(problem(b"\x93NUMPY\x01\x00\xff\x7f{"), same("unsupported npy header"));
            assert_eq!(problem(&npy("|O", "(1,)", &[0; 8])), same("unsupported npy header"));
            assert_eq!(problem(&npy(">f8", "(1,)", &[0; 8])), same("unsupported npy header"));
            assert_eq!(problem(&npy("<f8", "(-1,)", &[0; 8])), same("unsupported npy header"));
            let huge = format!("({0}, {0})", u64::MAX);
            assert_eq!(problem(&npy("<f8", &huge, &[0; 8])), same("impossible shape"));
            assert_eq!(problem(&npy("|u1", "(2, 1, 1, 3)", &[0; 5])), same("data truncated"));
            assert_eq!(problem(&npy("|u1", "(2, 1, 1, 3)", &[0; 7])), same("trailing bytes"));
        }
        let floats = npy("<f4", "(1,)", &[0; 4]);
        let npz = open("floats.npz", &[("x.npy", &floats)], CompressionMethod::Stored).unwrap();
        assert_eq!(npz.pictures("x").unwrap_err().problem(), "not pictures");
        let fortran = String::from_utf8_lossy(&npy("<f4", "(1,)", &[0; 4])).replace("False", "True ");
        let text = fields(&fortran);
        assert_eq!(text, None);
        let path = test_dir("npz_bad").join("x.npz");
        std::fs::write(&path, b"PK no zip").unwrap();
        assert_eq!(Npz::open(&path).unwrap_err().problem(), "damaged zip archive");
    }
}
