//! Raw weights of the Inception network behind the Fréchet and kernel distances.
//!
//! The archive is a TorchScript file whose entries `out_jit_module/data/<i>` are stored uncompressed and hold the
//! little-endian `f32` values of the i-th tensor. Names and shapes are the business of the network that uses them;
//! here only the counts are checked, so that a different network cannot pass for this one. No pickle is read.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::io::archive::StoredZip;
use crate::io::dtype::FileDtype;
use crate::io::map::Mapped;

/// Tensors in the archive.
pub const TENSORS: usize = 376;
/// Values in all tensors together.
pub const VALUES: usize = 21_802_784;

/// Environment variable that names the archive.
pub const VARIABLE: &str = "GRAFT_INCEPTION";
/// Where the data script puts it, below the repository's root.
const FETCHED: &str = "data-cache/inception/default_1.pt";

/// The archive that [`VARIABLE`] names, or else the fetched one of this folder or of one above it; none where there is
/// neither.
///
/// # Errors
/// "no such file" when the variable names one that is missing: a stated wish is not skipped silently.
pub fn find() -> Result<Option<PathBuf>> {
    if let Some(named) = std::env::var_os(VARIABLE).map(PathBuf::from) {
        if named.is_file() {
            return Ok(Some(named));
        }
        return Err(Error::failure(VARIABLE, "no such file").is(named.display()).must("the archive of the network"));
    }
    let here = std::env::current_dir().unwrap_or_default();
    Ok(here.ancestors().map(|folder| folder.join(FETCHED)).find(|path| path.is_file()))
}

/// The sentence that says what is missing where [`find`] finds nothing.
pub const ABSENT: &str = "the Inception network is not here: fetch it with tools/setup/fetch_data.py inception, or name \
                          the file in GRAFT_INCEPTION";

/// Reads all tensors as flat arrays, in archive order.
///
/// # Errors
/// "not the Inception network" when the counts differ, or a damaged archive.
pub fn read(path: &Path) -> Result<Vec<Vec<f32>>> {
    read_counted(&path.display().to_string(), Mapped::open(path)?, TENSORS, VALUES)
}

fn read_counted<B: AsRef<[u8]>>(place: &str, bytes: B, tensors: usize, values: usize) -> Result<Vec<Vec<f32>>> {
    let zip = StoredZip::parse(place, bytes)?;
    let wrong = |is: String, must: String| {
        Error::failure(place, "not the Inception network").is(is).must(must).fix("fetch the inception data item again")
    };
    let entry = |i: usize| format!("out_jit_module/data/{i}");
    let found = (0..).take_while(|&i| zip.len_of(&entry(i)).is_some()).count();
    if found != tensors {
        return Err(wrong(format!("{found} tensors"), format!("{tensors} tensors")));
    }
    let bytes: usize = (0..tensors).filter_map(|i| zip.len_of(&entry(i))).sum();
    if bytes != values * size_of::<f32>() {
        return Err(wrong(format!("{bytes} bytes of values"), format!("{} bytes", values * size_of::<f32>())));
    }
    (0..tensors)
        .map(|i| {
            let raw = zip.get(&entry(i))?;
            if !raw.len().is_multiple_of(size_of::<f32>()) {
                return Err(wrong(format!("{} bytes in tensor {i}", raw.len()), "whole f32 values".into()));
            }
            FileDtype::F32.decode_f32(raw, place)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::archive::stored_zip;
    use zip::CompressionMethod::Stored;

    fn archive(parts: &[&[u8]]) -> Vec<u8> {
        let names: Vec<_> = (0..parts.len()).map(|i| format!("out_jit_module/data/{i}")).collect();
        stored_zip(&names.iter().map(String::as_str).zip(parts.iter().copied()).collect::<Vec<_>>(), Stored)
    }

    #[test]
    fn values_in_archive_order() {
        let (a, b) = (1.0f32.to_le_bytes(), [2.0f32.to_le_bytes(), 3.0f32.to_le_bytes()].concat());
        let read = read_counted("f", archive(&[&a, &b]), 2, 3).unwrap();
        assert_eq!(read, [vec![1.0], vec![2.0, 3.0]]);
    }

    #[test]
    fn other_counts_are_refused() {
        for (parts, tensors, values) in
            [(&[&[0u8; 4][..]][..], 2, 1), (&[&[0; 4], &[0; 4]], 1, 2), (&[&[0; 4]], 1, 2), (&[&[0; 3], &[0; 5]], 2, 2)]
        {
            let error = read_counted("f", archive(parts), tensors, values).unwrap_err();
            assert_eq!(error.problem(), "not the Inception network");
        }
    }

    /// The real archive, where it has been fetched; the folder holds it at the repository's root.
    #[test]
    fn real_archive() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data-cache/inception/default_1.pt");
        if !path.exists() {
            eprintln!("skipped: inception is not fetched");
            return;
        }
        let tensors = read(&path).unwrap();
        assert_eq!(tensors.iter().map(Vec::len).sum::<usize>(), VALUES);
        assert!(tensors.iter().flatten().all(|v| v.is_finite()));
    }
}
