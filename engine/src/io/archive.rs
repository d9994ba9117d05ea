//! Zip archives as byte ranges of a mapped file, so that weights are read in place: `torch.save` stores its entries
//! without compression. A compressed entry may be in the archive but is refused when it is read.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use flate2::Crc;
use zip::{CompressionMethod, ZipArchive};

use crate::error::{Error, Result};
use crate::io::files::printable;

const FIX_DAMAGED: &str = "the file is damaged or incomplete: download or save it again";

#[derive(Debug)]
enum Entry {
    Stored {
        range: Range<usize>,
        crc32: u32,
        /// Whether the checksum was compared: once is enough, however many tensors share the entry.
        checked: AtomicBool,
    },
    /// Compressed or encrypted, by the method of this name.
    Packed(String),
}

/// The directory of a zip archive over the bytes `B`, whose stored entries can be read.
#[derive(Debug)]
pub struct StoredZip<B: AsRef<[u8]>> {
    place: String,
    bytes: B,
    entries: BTreeMap<String, Entry>,
}

impl<B: AsRef<[u8]>> StoredZip<B> {
    /// Reads the archive's directory; `place` names it in errors.
    ///
    /// # Errors
    /// "damaged zip archive" when the directory cannot be read, names an entry twice, or lets two entries overlap.
    pub fn parse(place: &str, bytes: B) -> Result<Self> {
        let damaged = |why: String| {
            Error::failure(place, "damaged zip archive")
                .is(printable(&why))
                .must("a complete zip file")
                .fix(FIX_DAMAGED)
        };
        let all = bytes.as_ref();
        let mut archive = ZipArchive::new(Cursor::new(all)).map_err(|e| damaged(e.to_string()))?;
        // Of two entries of one name, readers disagree on which one counts.
        if archive.has_duplicate_names() {
            return Err(damaged("two entries of the same name".into()));
        }
        let mut entries = BTreeMap::new();
        for position in 0..archive.len() {
            let file = archive.by_index_raw(position).map_err(|e| damaged(e.to_string()))?;
            let name = String::from_utf8(file.name_raw().to_vec()).map_err(|_| damaged("an entry name".into()))?;
            let entry = if file.encrypted() {
                Entry::Packed("encrypted".into())
            } else if file.compression() != CompressionMethod::Stored {
                Entry::Packed(file.compression().to_string())
            } else {
                let range = file.data_start().and_then(|start| stored_range(start, file.size(), all.len()));
                let range = range.ok_or_else(|| damaged(format!("entry {name} lies outside the file")))?;
                Entry::Stored { range, crc32: file.crc32(), checked: AtomicBool::new(false) }
            };
            entries.insert(name, entry);
        }
        let ranges = entries.iter().filter_map(|(name, entry)| match entry {
            Entry::Stored { range, .. } if !range.is_empty() => Some((range.start, range.end, name)),
            _ => None,
        });
        let mut ranges: Vec<_> = ranges.collect();
        ranges.sort_unstable();
        if let Some(pair) = ranges.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            return Err(damaged(format!("entries {} and {} overlap", pair[0].2, pair[1].2)));
        }
        Ok(StoredZip { place: place.to_owned(), bytes, entries })
    }

    /// The bytes of the whole archive.
    pub(crate) fn source(&self) -> &B {
        &self.bytes
    }

    /// The archive's name in messages.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Names of all entries, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether there is an entry called `name`, stored or not.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Length in bytes of the stored entry called `name`, if there is one.
    pub fn len_of(&self, name: &str) -> Option<usize> {
        match self.entries.get(name)? {
            Entry::Stored { range, .. } => Some(range.len()),
            Entry::Packed(_) => None,
        }
    }

    /// The bytes of the entry called `name`, after checking their CRC-32. Their alignment is arbitrary.
    ///
    /// # Errors
    /// "missing zip entry", "compressed zip entry", or "damaged zip entry" when the checksum differs.
    pub fn get(&self, name: &str) -> Result<&[u8]> {
        let place = || format!("{}: {}", self.place, printable(name));
        let (range, crc32, checked) = match self.entries.get(name) {
            Some(Entry::Stored { range, crc32, checked }) => (range.clone(), *crc32, checked),
            Some(Entry::Packed(method)) => {
                return Err(Error::failure(place(), "compressed zip entry")
                    .is(method)
                    .must("stored without compression or encryption")
                    .fix("save the file with torch.save, or pack it again without compression"));
            }
            None => return Err(Error::failure(place(), "missing zip entry").fix(FIX_DAMAGED)),
        };
        // In range: `stored_range` compared the end with the archive's length.
        let bytes = &self.bytes.as_ref()[range];
        if checked.load(Ordering::Relaxed) {
            return Ok(bytes);
        }
        let mut crc = Crc::new();
        crc.update(bytes);
        if crc.sum() != crc32 {
            return Err(Error::failure(place(), "damaged zip entry")
                .is(format!("CRC-32 {:08x}", crc.sum()))
                .must(format!("{:08x}", crc32))
                .fix(FIX_DAMAGED));
        }
        checked.store(true, Ordering::Relaxed);
        Ok(bytes)
    }
}

fn stored_range(start: u64, size: u64, available: usize) -> Option<Range<usize>> {
    let start = usize::try_from(start).ok()?;
    let end = start.checked_add(usize::try_from(size).ok()?)?;
    (end <= available).then_some(start..end)
}

/// A zip archive of stored entries, for unit tests.
#[cfg(test)]
pub(crate) fn stored_zip(entries: &[(&str, &[u8])], compression: CompressionMethod) -> Vec<u8> {
    use std::io::Write;
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        let options = zip::write::SimpleFileOptions::default().compression_method(compression);
        writer.start_file(*name, options).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;
    use zip::CompressionMethod::{Deflated, Stored};

    #[test]
    fn stored_entries_are_ranges() {
        let bytes = stored_zip(&[("a/x", b"hello"), ("a/y", b"")], Stored);
        let zip = StoredZip::parse("f", bytes).unwrap();
        assert_eq!(zip.names().collect::<Vec<_>>(), ["a/x", "a/y"]);
        assert_eq!(zip.get("a/x").unwrap(), b"hello");
        assert_eq!((zip.len_of("a/y"), zip.len_of("z")), (Some(0), None));
        assert_eq!(zip.get("z").unwrap_err().problem(), "missing zip entry");
    }

    #[test]
    fn damage_and_compression_are_named() {
        let mut bytes = stored_zip(&[("a/x", b"hello")], Stored);
        let at = bytes.windows(5).position(|w| w == b"hello").unwrap();
        bytes[at] = b'H';
        let zip = StoredZip::parse("f", &bytes).unwrap();
        assert_eq!(zip.get("a/x").unwrap_err().problem(), "damaged zip entry");
        assert_eq!(StoredZip::parse("f", &bytes[..at]).unwrap_err().problem(), "damaged zip archive");
        let packed = stored_zip(&[("a/x", b"hello")], Deflated);
        let zip = StoredZip::parse("f", packed).unwrap();
        assert_eq!((zip.contains("a/x"), zip.len_of("a/x")), (true, None));
        assert_eq!(zip.get("a/x").unwrap_err().problem(), "compressed zip entry");
    }
}
