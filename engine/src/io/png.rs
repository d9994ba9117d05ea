//! 8-bit grey and RGB pictures as PNG files, with text metadata: every sample carries how it was made.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::Path;

use ::png::{BitDepth, ColorType, Decoder, Encoder};

use crate::error::{Error, Result};
use crate::io::{atomic, files};

/// Metadata key under which the engine stores the JSON record of a sample.
pub const RECORD_KEY: &str = "graft";
/// Most bytes of a decoded picture: 1 GiB, a square of 18,900 RGB pixels.
const MAX_PIXEL_BYTES: usize = 1 << 30;
const FIX_CONVERT: &str = "convert the picture to 8-bit RGB or grey without transparency";

/// A picture: `height` rows of `width` pixels of `channels` interleaved bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    width: usize,
    height: usize,
    channels: usize,
    pixels: Vec<u8>,
}

impl Image {
    /// A picture from its pixels `[height, width, channels]`, with 1 (grey) or 3 (RGB) channels.
    ///
    /// # Errors
    /// "invalid picture" when a side is zero, the channels differ from 1 and 3, or the number of bytes is wrong.
    pub fn new(width: usize, height: usize, channels: usize, pixels: Vec<u8>) -> Result<Self> {
        let invalid = |is: String, must: &str| Error::failure("picture", "invalid picture").is(is).must(must);
        if !matches!(channels, 1 | 3) {
            return Err(invalid(format!("{channels} channels"), "1 (grey) or 3 (RGB)"));
        }
        let bytes = width.checked_mul(height).and_then(|n| n.checked_mul(channels));
        if bytes != Some(pixels.len()) || pixels.is_empty() {
            let is = format!("{} bytes for {width} x {height} x {channels}", pixels.len());
            return Err(invalid(is, "width * height * channels bytes, at least one pixel"));
        }
        Ok(Image { width, height, channels, pixels })
    }

    /// A picture of one colour; grey when `colour` has one component.
    ///
    /// # Errors
    /// As [`Image::new`].
    pub fn filled(width: usize, height: usize, colour: &[u8]) -> Result<Self> {
        let count = width.checked_mul(height).unwrap_or(0);
        Self::new(width, height, colour.len(), colour.repeat(count))
    }

    /// Pixels per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Bytes per pixel: 1 (grey) or 3 (RGB).
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Bytes `[height, width, channels]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Bytes of the pixel at column `x` and row `y`, which must be inside.
    pub(crate) fn pixel_mut(&mut self, x: usize, y: usize) -> &mut [u8] {
        let at = (y * self.width + x) * self.channels;
        &mut self.pixels[at..at + self.channels]
    }

    /// Bytes of the pixel at column `x` and row `y`, which must be inside.
    pub(crate) fn pixel(&self, x: usize, y: usize) -> &[u8] {
        let at = (y * self.width + x) * self.channels;
        &self.pixels[at..at + self.channels]
    }
}

/// Encodes a picture with metadata. Equal input gives equal bytes: no time stamp, keys in order.
///
/// # Errors
/// "picture cannot be encoded" for a side beyond PNG's limit or a key that PNG does not allow (1 to 79 Latin-1
/// characters).
pub fn encode(image: &Image, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let wrap = |e: String| Error::failure("picture", "picture cannot be encoded").is(e);
    let side = |n: usize| u32::try_from(n).map_err(|_| wrap(format!("a side of {n} pixels")));
    let mut bytes = Vec::new();
    let mut encoder = Encoder::new(&mut bytes, side(image.width)?, side(image.height)?);
    encoder.set_color(if image.channels == 1 { ColorType::Grayscale } else { ColorType::Rgb });
    encoder.set_depth(BitDepth::Eight);
    for (key, text) in metadata {
        // tEXt is what most viewers show, but it holds Latin-1 only.
        let added = if text.is_ascii() {
            encoder.add_text_chunk(key.clone(), text.clone())
        } else {
            encoder.add_itxt_chunk(key.clone(), text.clone())
        };
        added.map_err(|e| wrap(e.to_string()))?;
    }
    let mut writer = encoder.write_header().map_err(|e| wrap(e.to_string()))?;
    writer.write_image_data(&image.pixels).map_err(|e| wrap(e.to_string()))?;
    writer.finish().map_err(|e| wrap(e.to_string()))?;
    Ok(bytes)
}

/// Writes a picture atomically.
///
/// # Errors
/// Those of [`encode`] and of [`atomic::write_atomic`].
pub fn write(path: &Path, image: &Image, metadata: &BTreeMap<String, String>) -> Result<()> {
    let bytes = encode(image, metadata).map_err(|e| e.context(path.display()))?;
    atomic::write_bytes(path, &bytes)
}

/// Reads a picture and its metadata.
///
/// # Errors
/// Those of [`decode`], or an I/O error.
pub fn read(path: &Path) -> Result<(Image, BTreeMap<String, String>)> {
    decode(&path.display().to_string(), &files::read_bytes(path)?)
}

/// Decodes an 8-bit grey or RGB PNG and its text metadata; `place` names it in errors.
///
/// # Errors
/// "damaged png" or "unsupported png" (other depths, palettes, transparency, interlacing, too large).
pub fn decode(place: &str, bytes: &[u8]) -> Result<(Image, BTreeMap<String, String>)> {
    let damaged = |e: ::png::DecodingError| {
        let is = files::printable(&e.to_string());
        Error::failure(place, "damaged png").is(is).must("a complete PNG file").fix("save or download it again")
    };
    let unsupported =
        |is: String, must: &str| Error::failure(place, "unsupported png").is(is).must(must).fix(FIX_CONVERT);
    let mut decoder = Decoder::new_with_limits(Cursor::new(bytes), ::png::Limits { bytes: MAX_PIXEL_BYTES });
    decoder.set_transformations(::png::Transformations::IDENTITY);
    let mut reader = decoder.read_info().map_err(damaged)?;
    let info = reader.info();
    let (width, height) = (info.width as usize, info.height as usize);
    let channels = match (info.color_type, info.bit_depth, info.interlaced) {
        (ColorType::Grayscale, BitDepth::Eight, false) => 1,
        (ColorType::Rgb, BitDepth::Eight, false) => 3,
        (colour, depth, interlaced) => {
            let how = if interlaced { ", interlaced" } else { "" };
            return Err(unsupported(format!("{colour:?} of {depth:?} bits{how}"), "8-bit grey or RGB, not interlaced"));
        }
    };
    let total = width.checked_mul(height).and_then(|n| n.checked_mul(channels));
    if total.is_none_or(|n| n > MAX_PIXEL_BYTES) {
        return Err(unsupported(format!("{width} x {height} pixels"), "at most 1 GiB of pixels"));
    }
    // Row by row: a header may claim far more rows than the file has.
    let mut pixels = Vec::new();
    while let Some(row) = reader.next_row().map_err(damaged)? {
        pixels.extend_from_slice(row.data());
    }
    reader.finish().map_err(damaged)?;
    let info = reader.info();
    let mut metadata = BTreeMap::new();
    for chunk in &info.uncompressed_latin1_text {
        metadata.insert(chunk.keyword.clone(), chunk.text.clone());
    }
    for chunk in &info.utf8_text {
        metadata.insert(chunk.keyword.clone(), chunk.get_text().map_err(damaged)?);
    }
    let image = Image::new(width, height, channels, pixels).map_err(|e| e.context(place))?;
    Ok((image, metadata))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;

    fn metadata(text: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(RECORD_KEY.to_owned(), text.to_owned())])
    }

    #[test]
    fn round_trip_with_ascii_and_unicode_records() {
        let path = test_dir("png").join("a.png");
        for (channels, text) in [(1, "{\"seed\": 7}"), (3, "{\"prompt\": \"Füchse 🦊\"}")] {
            let image = Image::new(3, 2, channels, (0..6 * channels).map(|i| i as u8 * 9).collect()).unwrap();
            write(&path, &image, &metadata(text)).unwrap();
            assert_eq!(read(&path).unwrap(), (image.clone(), metadata(text)));
            assert_eq!(encode(&image, &metadata(text)).unwrap(), files::read_bytes(&path).unwrap());
        }
    }

    #[test]
    fn impossible_pictures_are_refused() {
        assert!(Image::new(2, 2, 3, vec![0; 11]).is_err());
        assert!(Image::new(2, 2, 2, vec![0; 8]).is_err());
        assert!(Image::new(0, 2, 1, vec![]).is_err());
        assert!(Image::filled(2, 2, &[1, 2, 3]).is_ok());
    }

    #[test]
    fn damage_and_other_kinds_are_named() {
        let bytes = encode(&Image::filled(9, 9, &[5]).unwrap(), &BTreeMap::new()).unwrap();
        for end in [0, 8, 20, bytes.len() - 30] {
            assert_eq!(decode("f", &bytes[..end]).unwrap_err().problem(), "damaged png", "{end}");
        }
        let mut rgba = Vec::new();
        let mut encoder = Encoder::new(&mut rgba, 1, 1);
        encoder.set_color(ColorType::Rgba);
        encoder.set_depth(BitDepth::Eight);
        encoder.write_header().unwrap().write_image_data(&[1, 2, 3, 4]).unwrap();
        let error = decode("f", &rgba).unwrap_err().to_string();
        assert!(error.contains("unsupported png; is Rgba of Eight bits"), "{error}");
    }

    #[test]
    fn claimed_size_is_not_believed() {
        // A header of 2^31-1 x 2^31-1 pixels with a right checksum, and no data.
        let mut header = b"IHDR".to_vec();
        header.extend([0x7f, 0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff, 8, 2, 0, 0, 0]);
        let mut crc = flate2::Crc::new();
        crc.update(&header);
        let mut file = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
        file.extend(&header);
        file.extend(crc.sum().to_be_bytes());
        file.extend(b"\0\0\0\0IDAT\x35\xaf\x06\x1e");
        assert!(decode("f", &file).is_err());
    }
}
