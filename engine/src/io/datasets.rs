//! Image data sets as their publishers pack them: idx files (MNIST, Fashion-MNIST) and CIFAR-10 as PNG sheets.
//!
//! Everything comes back as one [`ImageSet`] of bytes `[n, H, W, C]`; scaling to the model's range is the caller's.

use std::fs::File;
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::Path;

use flate2::read::MultiGzDecoder;

use crate::error::{Error, Result};
use crate::io::files::{file_name, read_bytes};
use crate::io::{json, png};

/// Most pixel bytes of one set: 2 GiB, so that a damaged header cannot ask for more.
const MAX_BYTES: u64 = 1 << 31;
const FIX_FETCH: &str = "fetch the data set again";

/// Which part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// For training.
    Train,
    /// For evaluation.
    Test,
}

/// A set of labelled images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSet {
    /// Images.
    pub n: usize,
    /// Channels C: 1 (grey) or 3 (RGB).
    pub channels: usize,
    /// Rows H.
    pub height: usize,
    /// Columns W.
    pub width: usize,
    /// Bytes `[n, H, W, C]`.
    pub pixels: Vec<u8>,
    /// Class of each image, below `class_names.len()`.
    pub labels: Vec<u8>,
    /// Name of each class.
    pub class_names: Vec<&'static str>,
}

impl ImageSet {
    /// Bytes `[H, W, C]` of image `i`, which must be below `n`.
    pub fn image(&self, i: usize) -> &[u8] {
        let size = self.height * self.width * self.channels;
        &self.pixels[i * size..(i + 1) * size]
    }
}

const DIGITS: [&str; 10] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];
const FASHION: [&str; 10] =
    ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"];
const CIFAR: [&str; 10] = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];

/// Fashion-MNIST, or a cut of it, from its four idx files in `dir`, plain or gzipped: grey images of 28 x 28, in all
/// 60,000 for training and 10,000 for evaluation.
///
/// # Errors
/// "data file missing", or as [`read_idx_set`], or "wrong images": another size, none, or more than the set has.
pub fn fashion_mnist(dir: &Path, split: Split) -> Result<ImageSet> {
    mnist_like(dir, split, &FASHION)
}

/// MNIST, or a cut of it, with the file names and sizes of [`fashion_mnist`].
///
/// # Errors
/// As [`fashion_mnist`].
pub fn mnist(dir: &Path, split: Split) -> Result<ImageSet> {
    mnist_like(dir, split, &DIGITS)
}

fn mnist_like(dir: &Path, split: Split, classes: &[&'static str]) -> Result<ImageSet> {
    let (stem, whole) = match split {
        Split::Train => ("train", 60_000),
        Split::Test => ("t10k", 10_000),
    };
    let find = |kind: &str| {
        let plain = dir.join(format!("{stem}-{kind}-ubyte"));
        let packed = dir.join(format!("{stem}-{kind}-ubyte.gz"));
        if plain.exists() { plain } else { packed }
    };
    let set = read_idx_set(&find("images-idx3"), &find("labels-idx1"), classes)?;
    // The header states the number of images, so a damaged file cannot pass for a cut.
    expect_set(dir, &set, 1..=whole, [28, 28, 1])?;
    Ok(set)
}

/// Checks a set against what the data set is known to hold.
fn expect_set(dir: &Path, set: &ImageSet, n: RangeInclusive<usize>, shape: [usize; 3]) -> Result<()> {
    let found = [set.height, set.width, set.channels];
    if !n.contains(&set.n) || found != shape {
        let range = if n.start() == n.end() { format!("{}", n.end()) } else { format!("{} to {}", n.start(), n.end()) };
        return Err(Error::failure(dir.display().to_string(), "wrong images")
            .is(format!("{} images of {found:?}", set.n))
            .must(format!("{range} images of {shape:?}"))
            .fix(FIX_FETCH));
    }
    Ok(())
}

/// Any pair of idx files of byte images `[n, H, W]` and byte labels `[n]`; a name that ends in `.gz` is decompressed.
///
/// # Errors
/// "data file missing", "not an idx file", "data truncated", "trailing bytes", "data set too large",
/// "images and labels differ in number", "label out of range", or an I/O error.
pub fn read_idx_set(images: &Path, labels: &Path, class_names: &[&'static str]) -> Result<ImageSet> {
    let ([n, height, width], pixels) = read_idx::<3>(images)?;
    let ([label_count], label_bytes) = read_idx::<1>(labels)?;
    check_labels(labels, &label_bytes, class_names.len())?;
    if n != label_count {
        return Err(Error::failure(labels.display().to_string(), "images and labels differ in number")
            .is(format!("{label_count} labels"))
            .must(format!("{n}, as {} has images", file_name(images)))
            .fix(FIX_FETCH));
    }
    let class_names = class_names.to_vec();
    Ok(ImageSet { n, channels: 1, height, width, pixels, labels: label_bytes, class_names })
}

fn check_labels(path: &Path, labels: &[u8], classes: usize) -> Result<()> {
    match labels.iter().position(|&label| usize::from(label) >= classes) {
        None => Ok(()),
        Some(at) => Err(Error::failure(path.display().to_string(), "label out of range")
            .is(format!("{} at image {at}", labels[at]))
            .must(format!("below {classes}"))
            .fix(FIX_FETCH)),
    }
}

/// An idx file of bytes with `R` dimensions: a magic number, `R` big-endian dimensions, the elements
/// (<http://yann.lecun.com/exdb/mnist/>).
fn read_idx<const R: usize>(path: &Path) -> Result<([usize; R], Vec<u8>)> {
    let place = path.display().to_string();
    if !path.exists() {
        return Err(Error::failure(place, "data file missing").fix(FIX_FETCH));
    }
    let refuse =
        |problem: &str, is: String, must: String| Error::failure(&place, problem).is(is).must(must).fix(FIX_FETCH);
    let wrap = |e: std::io::Error| Error::io(path, "read", &e);
    let file = File::open(path).map_err(wrap)?;
    let mut input: Box<dyn Read> =
        if path.extension().is_some_and(|e| e == "gz") { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };

    let header = take(&mut input, 4 * (1 + R) as u64).map_err(wrap)?;
    let (words, rest) = header.as_chunks::<4>();
    let expected = [0, 0, 8, R as u8];
    if words.len() != 1 + R || !rest.is_empty() || words[0] != expected {
        let is = format!("a file that begins with {:02x?}", &header[..header.len().min(4)]);
        return Err(refuse("not an idx file", is, format!("{expected:02x?}: bytes of {R} dimensions")));
    }
    let dims: [u32; R] = std::array::from_fn(|axis| u32::from_be_bytes(words[1 + axis]));
    let size = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d.into())).filter(|&n| n <= MAX_BYTES);
    let size =
        size.ok_or_else(|| refuse("data set too large", format!("{dims:?}"), format!("at most {MAX_BYTES} bytes")))?;
    // One byte more than stated tells whether something follows; memory grows with what is really there.
    let elements = take(&mut input, size + 1).map_err(wrap)?;
    if elements.len() as u64 != size {
        let problem = if (elements.len() as u64) < size { "data truncated" } else { "trailing bytes" };
        return Err(refuse(problem, format!("{} bytes or more", elements.len()), format!("{size} bytes for {dims:?}")));
    }
    Ok((dims.map(|d| d as usize), elements))
}

fn take(input: &mut dyn Read, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    input.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// CIFAR-10 from PNG sheets in `dir`: 50,000 or 10,000 RGB images of 32 x 32.
///
/// Each sheet is 1024 pixels wide and one row is one image, its pixels in row-major order; labels are JSON arrays
/// of integers. File names are those of the package that carries them, misspelling included.
///
/// # Errors
/// "wrong sheet size", "images and labels differ in number", "label out of range", "`<file>` missing", or a
/// damaged file.
pub fn cifar10(dir: &Path, split: Split) -> Result<ImageSet> {
    let (sheets, labels, n) = match split {
        Split::Train => (5, "train_lables.json", 50_000),
        Split::Test => (1, "test_lables.json", 10_000),
    };
    let names: Vec<String> = match split {
        Split::Train => (1..=sheets).map(|i| format!("data_batch_{i}.png")).collect(),
        Split::Test => vec!["test_batch.png".to_owned()],
    };
    let label_path = dir.join(labels);
    let labels = read_json_labels(&label_path)?;
    let mut pixels = Vec::new();
    for name in names {
        pixels.extend(read_sheet(&dir.join(name))?);
    }
    let set = sheet_set(&label_path, pixels, labels)?;
    expect_set(dir, &set, n..=n, [32, 32, 3])?;
    Ok(set)
}

const SHEET_WIDTH: usize = 32 * 32;

/// Pixels of a sheet whose rows are RGB pictures of 32 x 32.
///
/// # Errors
/// "data file missing", or a file that is no such sheet.
pub(super) fn read_sheet(path: &Path) -> Result<Vec<u8>> {
    if !path.exists() {
        return Err(Error::failure(path.display().to_string(), "data file missing").fix(FIX_FETCH));
    }
    let mut pixels = Vec::new();
    append_sheet(&path.display().to_string(), &read_bytes(path)?, &mut pixels)?;
    Ok(pixels)
}

/// Appends a sheet's rows, which are images already.
fn append_sheet(place: &str, bytes: &[u8], pixels: &mut Vec<u8>) -> Result<()> {
    let (sheet, _) = png::decode(place, bytes)?;
    if sheet.width() != SHEET_WIDTH || sheet.channels() != 3 {
        return Err(Error::failure(place, "wrong sheet size")
            .is(format!("{} pixels wide with {} channels", sheet.width(), sheet.channels()))
            .must(format!("{SHEET_WIDTH} pixels wide with 3 channels"))
            .fix(FIX_FETCH));
    }
    pixels.extend_from_slice(sheet.pixels());
    Ok(())
}

fn sheet_set(label_path: &Path, pixels: Vec<u8>, labels: Vec<u8>) -> Result<ImageSet> {
    check_labels(label_path, &labels, CIFAR.len())?;
    let n = pixels.len() / (3 * SHEET_WIDTH);
    if labels.len() != n {
        return Err(Error::failure(label_path.display().to_string(), "images and labels differ in number")
            .is(format!("{} labels", labels.len()))
            .must(format!("{n}, as the sheets have rows"))
            .fix(FIX_FETCH));
    }
    Ok(ImageSet { n, channels: 3, height: 32, width: 32, pixels, labels, class_names: CIFAR.to_vec() })
}

fn read_json_labels(path: &Path) -> Result<Vec<u8>> {
    let value = json::read(path)?;
    let bytes = value.as_array().and_then(|list| {
        list.iter().map(|label| label.as_u64().and_then(|label| u8::try_from(label).ok())).collect::<Option<Vec<_>>>()
    });
    bytes.ok_or_else(|| {
        Error::failure(path.display().to_string(), "invalid labels")
            .must("a JSON array of class numbers")
            .fix(FIX_FETCH)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;
    use std::collections::BTreeMap;
    use std::io::Write;

    fn idx(dims: &[u32], elements: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 8, dims.len() as u8];
        bytes.extend(dims.iter().flat_map(|d| d.to_be_bytes()));
        bytes.extend(elements);
        bytes
    }

    #[test]
    fn plain_and_gzipped_idx_files_agree() {
        let dir = test_dir("idx");
        let (images, labels) = (idx(&[2, 1, 3], &[1, 2, 3, 4, 5, 6]), idx(&[2], &[1, 0]));
        let (plain, packed, label_path) = (dir.join("i"), dir.join("i.gz"), dir.join("l"));
        std::fs::write(&plain, &images).unwrap();
        std::fs::write(&label_path, labels).unwrap();
        let mut gz = flate2::write::GzEncoder::new(File::create(&packed).unwrap(), flate2::Compression::fast());
        gz.write_all(&images).unwrap();
        gz.finish().unwrap();
        let set = read_idx_set(&plain, &label_path, &["a", "b"]).unwrap();
        assert_eq!((set.n, set.height, set.width, set.channels), (2, 1, 3, 1));
        assert_eq!((set.image(1), &set.labels[..]), (&[4, 5, 6][..], &[1, 0][..]));
        assert_eq!(read_idx_set(&packed, &label_path, &["a", "b"]).unwrap(), set);
        assert_eq!(read_idx_set(&plain, &label_path, &["a"]).unwrap_err().problem(), "label out of range");
        assert_eq!(fashion_mnist(&dir, Split::Test).unwrap_err().problem(), "data file missing");
    }

    #[test]
    fn damaged_idx_files_are_named() {
        let path = test_dir("idx_bad").join("i");
        let problem = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            read_idx::<3>(&path).unwrap_err().problem().to_owned()
        };
        assert_eq!(problem(b""), "not an idx file");
        assert_eq!(problem(&idx(&[1], &[0])), "not an idx file");
        assert_eq!(problem(&idx(&[2, 2, 2], &[0; 7])), "data truncated");
        assert_eq!(problem(&idx(&[2, 2, 2], &[0; 9])), "trailing bytes");
        assert_eq!(problem(&idx(&[u32::MAX; 3], &[0; 9])), "data set too large");
    }

    #[test]
    fn a_sheet_row_is_an_image() {
        let pixels: Vec<u8> = (0..2 * 3 * SHEET_WIDTH).map(|i| (i / 7) as u8).collect();
        let sheet = png::Image::new(SHEET_WIDTH, 2, 3, pixels.clone()).unwrap();
        let mut read = Vec::new();
        append_sheet("f", &png::encode(&sheet, &BTreeMap::new()).unwrap(), &mut read).unwrap();
        let set = sheet_set(Path::new("l"), read.clone(), vec![9, 0]).unwrap();
        assert_eq!(set.image(1), &pixels[3 * SHEET_WIDTH..]);
        assert_eq!(
            sheet_set(Path::new("l"), read, vec![9]).unwrap_err().problem(),
            "images and labels differ in number"
        );
        let narrow = png::encode(&png::Image::filled(8, 8, &[0, 0, 0]).unwrap(), &BTreeMap::new()).unwrap();
        assert_eq!(append_sheet("f", &narrow, &mut Vec::new()).unwrap_err().problem(), "wrong sheet size");
    }

    /// The real files, where they have been fetched; the folder holds them at the repository's root.
    fn fetched(item: &str) -> Option<std::path::PathBuf> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data-cache").join(item);
        if !dir.exists() {
            eprintln!("skipped: {item} is not fetched");
        }
        dir.exists().then_some(dir)
    }

    #[test]
    fn the_bundled_slice_is_the_beginning_of_fashion_mnist() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/fashion-mnist");
        for (split, n, boots) in [(Split::Train, 10_000, 1_000), (Split::Test, 2_000, 188)] {
            let set = fashion_mnist(&dir, split).unwrap();
            assert_eq!((set.n, set.labels[0]), (n, 9));
            assert_eq!(set.labels.iter().filter(|&&l| l == 9).count(), boots);
            let Some(whole) = fetched("fashion-mnist") else { continue };
            let whole = fashion_mnist(&whole, split).unwrap();
            assert!(whole.pixels.starts_with(&set.pixels) && whole.labels.starts_with(&set.labels));
        }
    }

    #[test]
    fn a_set_of_another_shape_or_size_is_refused() {
        let dir = test_dir("idx_shape");
        let set = |n: u32, side: u32| {
            let pixels = vec![0; (n * side * side) as usize];
            std::fs::write(dir.join("t10k-images-idx3-ubyte"), idx(&[n, side, side], &pixels)).unwrap();
            std::fs::write(dir.join("t10k-labels-idx1-ubyte"), idx(&[n], &vec![0; n as usize])).unwrap();
            fashion_mnist(&dir, Split::Test)
        };
        assert_eq!(set(2, 28).unwrap().n, 2);
        for (n, side) in [(0, 28), (2, 27), (10_001, 28)] {
            assert_eq!(set(n, side).unwrap_err().problem(), "wrong images");
        }
    }

    #[test]
    fn real_fashion_mnist() {
        let Some(dir) = fetched("fashion-mnist") else { return };
        let (train, test) = (fashion_mnist(&dir, Split::Train).unwrap(), fashion_mnist(&dir, Split::Test).unwrap());
        assert_eq!((train.n, test.n), (60_000, 10_000));
        // The set is balanced, and its first label is an ankle boot.
        assert_eq!(train.labels.iter().filter(|&&l| l == 3).count(), 6_000);
        assert_eq!(train.class_names[usize::from(train.labels[0])], "ankle boot");
    }

    #[test]
    fn real_cifar10() {
        let Some(dir) = fetched("cifar10") else { return };
        let train = cifar10(&dir, Split::Train).unwrap();
        assert_eq!(train.labels[..10], [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]);
        // The published channel means of the training set.
        for (channel, mean) in [(0, 0.4914), (1, 0.4822), (2, 0.4465)] {
            let sum: f64 = train.pixels[channel..].iter().step_by(3).map(|&b| f64::from(b)).sum();
            let found = sum / (255.0 * 50_000.0 * 1024.0);
            assert!((found - mean).abs() < 5e-5, "channel {channel}: {found}");
        }
        assert_eq!(cifar10(&dir, Split::Test).unwrap().n, 10_000);
    }
}
