//! Whether pictures from captions show what the captions say: among real pictures of the same style, where does the one
//! that was asked for come by nearness?
//!
//! Pictures are compared by their mean colours in 8 x 8 cells: shape and colour at a coarse scale, no network.

use crate::error::{Error, Result};
use crate::io::captioned::CaptionedSet;
use crate::tensor::{Device, Tensor};
use crate::train::batches::images;
use serde::Serialize;

/// Cells along a side.
const CELLS: usize = 8;

/// Mean colours `[C, 8, 8]` of a picture `[C, S, S]`.
///
/// # Errors
/// A side that is no multiple of 8, or values that are not finite.
pub fn coarse(picture: &[f32], channels: usize, side: usize) -> Result<Vec<f32>> {
    let cell = side / CELLS;
    if cell == 0 || !side.is_multiple_of(CELLS) || picture.len() != channels * side * side {
        return Err(Error::failure("retrieval", "pictures do not divide into cells")
            .is(format!("{} values of a side of {side}", picture.len()))
            .must(format!("{channels} x side x side, the side a multiple of {CELLS}")));
    }
    if let Some(value) = picture.iter().find(|v| !v.is_finite()) {
        return Err(Error::failure("retrieval", "a pixel is not finite").is(value).must("finite"));
    }
    let at = |c: usize, y: usize, x: usize| f64::from(picture[(c * side + y) * side + x]);
    let mean = |c: usize, row: usize, column: usize| {
        let pixels = (0..cell * cell).map(|i| at(c, row * cell + i / cell, column * cell + i % cell));
        (pixels.sum::<f64>() / (cell * cell) as f64) as f32
    };
    let cells = (0..channels * CELLS * CELLS).map(|i| (i / (CELLS * CELLS), i / CELLS % CELLS, i % CELLS));
    Ok(cells.map(|(c, row, column)| mean(c, row, column)).collect())
}

/// Coarse features and style of every picture of a set.
///
/// # Errors
/// As [`coarse`].
pub fn of_set(set: &CaptionedSet) -> Result<Vec<(Vec<f32>, u8)>> {
    let all: Vec<u32> = (0..set.images.n as u32).collect();
    let pictures = images(&Device::cpu(), &set.images, &all)?.images;
    let each = set.images.channels * set.images.height * set.images.width;
    let values = pictures.values()?;
    let rows = values.chunks(each).zip(&set.images.labels);
    rows.map(|(picture, style)| Ok((coarse(picture, set.images.channels, set.images.height)?, *style))).collect()
}

/// Coarse features of pictures `[n, C, S, S]` that were drawn, with the numbers of the real ones that were asked for.
///
/// # Errors
/// As [`coarse`].
pub fn of_drawn(pictures: &Tensor, own: impl IntoIterator<Item = usize>) -> Result<Vec<Drawn>> {
    let (channels, side) = (pictures.dim(1), pictures.dim(2));
    let values = pictures.values()?;
    let rows = values.chunks((channels * side * side).max(1)).zip(own);
    let clamped = |picture: &[f32]| picture.iter().map(|v| v.clamp(-1.0, 1.0)).collect::<Vec<f32>>();
    rows.map(|(picture, own)| Ok(Drawn { features: coarse(&clamped(picture), channels, side)?, own })).collect()
}

/// How pictures were found.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Retrieval {
    /// Pictures that were looked for.
    pub n: usize,
    /// Real pictures that each was compared with, on average.
    pub candidates: f64,
    /// Share whose own real picture is the nearest.
    pub first: f64,
    /// Share whose own is among the ten nearest.
    pub tenth: f64,
    /// Mean of the share of candidates that are nearer than the own: 0 is perfect, 0.5 is chance.
    pub nearer: f64,
}

/// A picture that was drawn: its features, what it must show, and in which style.
pub struct Drawn {
    /// As [`coarse`].
    pub features: Vec<f32>,
    /// Number of the real picture that was asked for.
    pub own: usize,
}

/// Looks each picture up among the real ones whose style is that of its own: `real` are features and style.
///
/// # Errors
/// Nothing to look for, or an own picture that is not there.
pub fn retrieve(drawn: &[Drawn], real: &[(Vec<f32>, u8)]) -> Result<Retrieval> {
    if drawn.is_empty() {
        return Err(Error::failure("retrieval", "nothing to look for").must("at least one picture"));
    }
    let n = drawn.len() as f64;
    let mut found = Retrieval { n: drawn.len(), candidates: 0.0, first: 0.0, tenth: 0.0, nearer: 0.0 };
    for picture in drawn {
        let (own, style) = real.get(picture.own).ok_or_else(|| {
            Error::failure("retrieval", "no such real picture").is(picture.own).must(format!("below {}", real.len()))
        })?;
        let limit = distance(&picture.features, own);
        let others = real.iter().enumerate().filter(|(i, (_, s))| *i != picture.own && s == style);
        let (mut count, mut nearer) = (0usize, 0usize);
        for (_, (features, _)) in others {
            count += 1;
            // One that is as near is ahead.
            nearer += usize::from(distance(&picture.features, features) <= limit);
        }
        found.candidates += (count + 1) as f64 / n;
        found.first += f64::from(u8::from(nearer == 0)) / n;
        found.tenth += f64::from(u8::from(nearer < 10)) / n;
        found.nearer += nearer as f64 / count.max(1) as f64 / n;
    }
    Ok(found)
}

/// Squared distance.
pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_means_by_hand() {
        // Two pixels a cell along each side; the first cell holds 0, 1, 16, 17.
        let picture: Vec<f32> = (0..256).map(|i| i as f32).collect();
        let cells = coarse(&picture, 1, 16).unwrap();
        assert_eq!((cells.len(), cells[0], cells[1], cells[8]), (64, 8.5, 10.5, 40.5));
        assert!(coarse(&picture, 1, 12).is_err());
        assert!(coarse(&[f32::NAN; 64], 1, 8).is_err());
    }

    #[test]
    fn ranks_by_hand() {
        let real = [(vec![0.0], 0), (vec![1.0], 0), (vec![3.0], 0), (vec![0.1], 1)];
        let drawn = |at: f32, own: usize| Drawn { features: vec![at], own };
        let found = retrieve(&[drawn(0.2, 0), drawn(1.2, 2)], &real).unwrap();
        // The second asks for 3: 0 and 1 of its style are nearer, the picture of another style does not count.
        assert_eq!((found.n, found.candidates, found.first, found.tenth, found.nearer), (2, 3.0, 0.5, 1.0, 0.5));
        // One that is as near is ahead.
        assert_eq!(retrieve(&[drawn(0.5, 0)], &real).unwrap().first, 0.0);
        assert!(retrieve(&[], &real).is_err() && retrieve(&[drawn(0.0, 4)], &real).is_err());
    }
}
