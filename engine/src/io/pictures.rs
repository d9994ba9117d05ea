//! Sets of equally large pictures without labels: a folder of PNGs, an array in an npz file, the pixels of a data set.

use std::ops::Range;
use std::path::Path;

use crate::error::{Error, Result};
use crate::io::datasets::ImageSet;
use crate::io::map::Mapped;
use crate::io::{files, png};

/// Pictures of one size.
#[derive(Debug)]
pub struct Pictures {
    /// Pictures.
    pub n: usize,
    /// Channels C: 1 (grey) or 3 (RGB).
    pub channels: usize,
    /// Rows H.
    pub height: usize,
    /// Columns W.
    pub width: usize,
    pixels: Pixels,
}

/// Where the bytes `[n, H, W, C]` are.
#[derive(Debug)]
enum Pixels {
    Owned(Vec<u8>),
    /// A part of a mapped file: sets of samples may be larger than memory.
    Mapped(Mapped, Range<usize>),
}

impl Pictures {
    /// Pictures from bytes `[n, H, W, C]` with shape `[n, H, W, C]`; `place` names them in errors.
    ///
    /// # Errors
    /// "not pictures" when a dim is 0, C is neither 1 nor 3, or the number of bytes differs.
    pub fn new(place: &str, shape: [usize; 4], pixels: Vec<u8>) -> Result<Pictures> {
        Self::of(place, shape, Pixels::Owned(pixels))
    }

    /// As [`Pictures::new`], from a part of a mapped file, which must be inside it.
    pub(crate) fn mapped(place: &str, shape: [usize; 4], file: Mapped, range: Range<usize>) -> Result<Pictures> {
        Self::of(place, shape, Pixels::Mapped(file, range))
    }

    fn of(place: &str, shape: [usize; 4], pixels: Pixels) -> Result<Pictures> {
        let [n, height, width, channels] = shape;
        let set = Pictures { n, channels, height, width, pixels };
        let size = shape.iter().try_fold(1usize, |size, &dim| size.checked_mul(dim));
        if !matches!(channels, 1 | 3) || size.is_none_or(|size| size == 0 || size != set.pixels().len()) {
            return Err(Error::failure(place, "not pictures")
                .is(format!("{} bytes of shape {shape:?}", set.pixels().len()))
                .must("bytes [n, H, W, C] with 1 or 3 channels, at least one picture"));
        }
        Ok(set)
    }

    /// The pictures `range` of a data set.
    ///
    /// # Errors
    /// A range beyond the set, or an empty one.
    pub fn of_set(set: &ImageSet, range: Range<usize>) -> Result<Pictures> {
        let (n, image) = (range.len(), set.height * set.width * set.channels);
        let bytes = set.pixels.get(range.start * image..range.end * image).ok_or_else(|| {
            Error::failure("data set", "too few images").is(set.n).must(format!("at least {}", range.end))
        })?;
        Self::new("data set", [n, set.height, set.width, set.channels], bytes.to_vec())
    }

    /// The first `most` pictures, or all where there are fewer.
    ///
    /// # Errors
    /// When none would be left.
    pub fn first(mut self, most: usize) -> Result<Pictures> {
        let n = self.n.min(most);
        let bytes = n * self.height * self.width * self.channels;
        match &mut self.pixels {
            Pixels::Owned(all) => all.truncate(bytes),
            Pixels::Mapped(_, range) => range.end = range.start + bytes,
        }
        Self::of("pictures", [n, self.height, self.width, self.channels], self.pixels)
    }

    /// All bytes `[n, H, W, C]`.
    pub fn pixels(&self) -> &[u8] {
        match &self.pixels {
            Pixels::Owned(bytes) => bytes,
            Pixels::Mapped(file, range) => &file.as_ref()[range.clone()],
        }
    }

    /// Bytes `[H, W, C]` of picture `i`, which must be below `n`.
    pub fn image(&self, i: usize) -> &[u8] {
        let size = self.height * self.width * self.channels;
        &self.pixels()[i * size..(i + 1) * size]
    }
}

/// Whether `dir` has a PNG file.
///
/// # Errors
/// When the folder is missing or unreadable.
pub fn is_folder_of_pngs(dir: &Path) -> Result<bool> {
    Ok(files::list(dir)?.iter().any(|path| is_png(path)))
}

fn is_png(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("png"))
}

/// The PNG files of a folder in order of their names, at most `most` of them.
///
/// # Errors
/// No PNG, one that is damaged, or pictures of different sizes.
pub fn read_folder(dir: &Path, most: usize) -> Result<Pictures> {
    let mut shape = None;
    let (mut n, mut pixels) = (0, Vec::new());
    for path in files::list(dir)?.iter().filter(|p| is_png(p)).take(most) {
        let (image, _) = png::read(path)?;
        let found = [image.height(), image.width(), image.channels()];
        let first = *shape.get_or_insert(found);
        if found != first {
            return Err(Error::failure(path.display().to_string(), "picture of another size")
                .is(format!("{found:?}"))
                .must(format!("{first:?} (rows, columns, channels), as those before it")));
        }
        pixels.extend_from_slice(image.pixels());
        n += 1;
    }
    let Some([height, width, channels]) = shape else {
        return Err(Error::failure(dir.display().to_string(), "no pictures").must("a folder with PNG files"));
    };
    Pictures::new(&dir.display().to_string(), [n, height, width, channels], pixels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;
    use crate::io::png::Image;
    use std::collections::BTreeMap;

    #[test]
    fn a_folder_is_read_in_order_of_names() {
        let dir = test_dir("pictures");
        assert!(!is_folder_of_pngs(&dir).unwrap());
        assert_eq!(read_folder(&dir, 9).unwrap_err().problem(), "no pictures");
        for (name, grey) in [("b.png", 2), ("a.PNG", 1), ("c.png", 3)] {
            png::write(&dir.join(name), &Image::filled(3, 2, &[grey]).unwrap(), &BTreeMap::new()).unwrap();
        }
        std::fs::write(dir.join("note.txt"), "no picture").unwrap();
        assert!(is_folder_of_pngs(&dir).unwrap());
        let set = read_folder(&dir, 9).unwrap();
        assert_eq!((set.n, set.height, set.width, set.channels), (3, 2, 3, 1));
        assert_eq!((set.image(0), set.image(2)), (&[1; 6][..], &[3; 6][..]));
        assert_eq!(read_folder(&dir, 2).unwrap().n, 2);
        let two = set.first(2).unwrap();
        assert_eq!((two.n, two.pixels().len()), (2, 12));
        assert!(two.first(0).is_err());
        png::write(&dir.join("d.png"), &Image::filled(2, 2, &[1]).unwrap(), &BTreeMap::new()).unwrap();
        let error = read_folder(&dir, 9).unwrap_err().to_string();
        assert!(error.contains("d.png: picture of another size; is [2, 2, 1]; must be [2, 3, 1]"), "{error}");
    }

    #[test]
    fn impossible_shapes_are_refused() {
        assert!(Pictures::new("x", [1, 2, 2, 3], vec![0; 12]).is_ok());
        for (shape, bytes) in [([1, 2, 2, 3], 11), ([1, 2, 2, 2], 8), ([0, 2, 2, 3], 0), ([usize::MAX, 2, 2, 3], 12)] {
            assert_eq!(Pictures::new("x", shape, vec![0; bytes]).unwrap_err().problem(), "not pictures");
        }
    }
}
