//! Pictures of a result: cutting, arranging, writing.

use super::out;
use crate::error::Result;
use crate::io::grid::{self, Layout};
use crate::io::png::{self, Image};
use crate::models::dit::DitConfig;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Side that small pictures are magnified to on a sheet, about.
const COMFORTABLE: usize = 112;

/// Cuts interleaved bytes `[n, S, S, C]` into pictures.
///
/// # Errors
/// When the sizes do not fit a picture.
pub fn split(pixels: &[u8], config: &DitConfig) -> Result<Vec<Image>> {
    let (side, channels) = (config.input_size, config.in_channels);
    pixels.chunks(side * side * channels).map(|p| Image::new(side, side, channels, p.to_vec())).collect()
}

/// A sheet with `columns` pictures per row and a caption for each row.
///
/// # Errors
/// As [`grid::grid`].
pub fn sheet(pictures: &[Image], columns: usize, row_captions: Vec<String>) -> Result<Image> {
    let side = pictures.first().map_or(1, Image::width);
    let upscale = (COMFORTABLE / side).clamp(1, 8);
    grid::grid(pictures, &Layout { upscale, padding: 4, row_captions, ..Layout::new(columns) })
}

/// Writes a picture with its record, atomically; `-` is standard output.
///
/// # Errors
/// When it cannot be written.
pub fn write(path: &Path, picture: &Image, record: &Value) -> Result<()> {
    let metadata = BTreeMap::from([(png::RECORD_KEY.to_string(), record.to_string())]);
    if path.as_os_str() == "-" {
        return out::bytes(&png::encode(picture, &metadata)?);
    }
    png::write(path, picture, &metadata)?;
    out::line(path.display())
}
