//! A table of shares as a picture: a cell for each number, the darker the larger, with the number in it.

use crate::error::{Error, Result};
use crate::io::font;
use crate::io::png::Image;

/// Magnification of captions and numbers.
const TEXT: usize = 2;
/// Size of a cell in pixels: four characters and air.
const CELL: [usize; 2] = [4 * font::ADVANCE * TEXT + 16, font::HEIGHT * TEXT + 14];
/// Between the parts of the picture.
const GAP: usize = 12;
/// Pixels between cells.
const SEAM: usize = 2;
/// Height of the scale below the table.
const SCALE: usize = 14;

const PAPER: [u8; 3] = [255, 255, 255];
const INK: u8 = 30;
/// Where there is no number.
const NOTHING: [u8; 3] = [225, 225, 225];
/// Colours of 0, ¼, ½, ¾ and 1.
const RAMP: [[u8; 3]; 5] = [[247, 251, 255], [188, 216, 235], [107, 174, 214], [33, 113, 181], [8, 48, 107]];

/// What a heat map shows.
#[derive(Clone, Debug, Default)]
pub struct HeatMap {
    /// Above everything.
    pub title: String,
    /// Below the title, in smaller letters.
    pub note: String,
    /// Captions of the rows.
    pub rows: Vec<String>,
    /// Captions of the columns.
    pub columns: Vec<String>,
    /// Shares from 0 to 1, row by row, each as long as `columns`; none where there is no number.
    pub cells: Vec<Vec<Option<f64>>>,
}

impl HeatMap {
    /// Draws the picture, in colour.
    ///
    /// # Errors
    /// A table without cells, or rows that do not fit the captions.
    pub fn draw(&self) -> Result<Image> {
        let fits = self.cells.len() == self.rows.len() && self.cells.iter().all(|r| r.len() == self.columns.len());
        if !fits || self.rows.is_empty() || self.columns.is_empty() {
            return Err(Error::failure("heat map", "cells and captions do not fit")
                .is(format!("{} rows of {:?} cells", self.cells.len(), self.cells.first().map(Vec::len)))
                .must(format!("{} rows of {} cells, at least one", self.rows.len(), self.columns.len())));
        }
        let longest = self.rows.iter().map(|r| font::width_of(r) * TEXT).max().unwrap_or(0);
        let left = GAP + longest + GAP;
        let line = font::HEIGHT * TEXT;
        let top = GAP + line + GAP + font::HEIGHT + GAP + line + GAP / 2;
        let table = [self.columns.len() * (CELL[0] + SEAM), self.rows.len() * (CELL[1] + SEAM)];
        let wanted = [font::width_of(&self.title) * TEXT, font::width_of(&self.note)];
        let width = (left + table[0]).max(GAP + wanted[0].max(wanted[1])) + GAP;
        let height = top + table[1] + GAP + SCALE + GAP / 2 + line + GAP;
        let mut image = Image::filled(width, height, &PAPER)?;
        font::draw(&mut image, GAP, GAP, &self.title, TEXT, INK);
        font::draw(&mut image, GAP, GAP + line + GAP, &self.note, 1, INK);
        for (c, caption) in self.columns.iter().enumerate() {
            let x = left + c * (CELL[0] + SEAM);
            centred(&mut image, [x, top - line - GAP / 2], CELL[0], caption, INK);
        }
        for (r, (caption, cells)) in self.rows.iter().zip(&self.cells).enumerate() {
            let y = top + r * (CELL[1] + SEAM);
            font::draw(&mut image, GAP, y + (CELL[1] - line) / 2, caption, TEXT, INK);
            for (c, cell) in cells.iter().enumerate() {
                self.cell(&mut image, [left + c * (CELL[0] + SEAM), y], *cell);
            }
        }
        scale(&mut image, [left, top + table[1] + GAP], table[0] - SEAM);
        Ok(image)
    }

    fn cell(&self, image: &mut Image, [x, y]: [usize; 2], value: Option<f64>) {
        let colour = value.map_or(NOTHING, colour);
        fill(image, [x, y], CELL, colour);
        let text = value.map_or("-".to_string(), |v| format!("{v:.2}"));
        // Light letters on dark cells.
        let dark = colour.iter().map(|c| u32::from(*c)).sum::<u32>() < 3 * 135;
        let at = [x, y + (CELL[1] - font::HEIGHT * TEXT) / 2];
        centred(image, at, CELL[0], &text, if dark { 255 } else { INK });
    }
}

/// Colour of a share: between those of [`RAMP`]; beyond 0 and 1 as at the end.
fn colour(share: f64) -> [u8; 3] {
    let at = share.clamp(0.0, 1.0) * (RAMP.len() - 1) as f64;
    let low = (at as usize).min(RAMP.len() - 2);
    let part = at - low as f64;
    std::array::from_fn(|i| {
        let (a, b) = (f64::from(RAMP[low][i]), f64::from(RAMP[low + 1][i]));
        (a + part * (b - a)).round() as u8
    })
}

fn fill(image: &mut Image, [x, y]: [usize; 2], [width, height]: [usize; 2], colour: [u8; 3]) {
    for row in y..y + height {
        for column in x..x + width {
            image.pixel_mut(column, row).copy_from_slice(&colour);
        }
    }
}

fn centred(image: &mut Image, [x, y]: [usize; 2], width: usize, text: &str, shade: u8) {
    let own = font::width_of(text) * TEXT;
    font::draw(image, x + width.saturating_sub(own) / 2, y, text, TEXT, shade);
}

/// The colours from 0 to 1 with their numbers at the ends.
fn scale(image: &mut Image, [x, y]: [usize; 2], width: usize) {
    for column in 0..width {
        fill(image, [x + column, y], [1, SCALE], colour(column as f64 / (width - 1).max(1) as f64));
    }
    let below = y + SCALE + GAP / 2;
    font::draw(image, x, below, "0", TEXT, INK);
    font::draw(image, x + width - font::width_of("1") * TEXT, below, "1", TEXT, INK);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(cells: Vec<Vec<Option<f64>>>) -> HeatMap {
        HeatMap {
            title: "t".into(),
            note: "n".into(),
            rows: (0..cells.len()).map(|i| format!("layer {i}")).collect(),
            columns: vec!["k=1".into(), "k=2".into()],
            cells,
        }
    }

    #[test]
    fn cells_have_the_colour_of_their_number() {
        let image = map(vec![vec![Some(0.0), Some(1.0)], vec![None, Some(0.5)]]).draw().unwrap();
        let left = GAP + font::width_of("layer 0") * TEXT + GAP;
        let top = GAP + 14 + GAP + 7 + GAP + 14 + GAP / 2;
        // The corner of a cell is free of letters.
        let corner = |c: usize, r: usize| {
            let pixel = image.pixel(left + c * (CELL[0] + SEAM), top + r * (CELL[1] + SEAM));
            [pixel[0], pixel[1], pixel[2]]
        };
        assert_eq!([corner(0, 0), corner(1, 0)], [RAMP[0], RAMP[4]]);
        assert_eq!([corner(0, 1), corner(1, 1)], [NOTHING, RAMP[2]]);
        // Numbers stand in dark letters on the light cell and in light ones on the dark cell.
        let letters = |c: usize, shade: u8| {
            let (x0, y0) = (left + c * (CELL[0] + SEAM), top);
            (y0..y0 + CELL[1])
                .flat_map(|y| (x0..x0 + CELL[0]).map(move |x| (x, y)))
                .filter(|&(x, y)| image.pixel(x, y) == [shade; 3])
                .count()
        };
        assert!(letters(0, INK) > 50 && letters(1, 255) > 50 && letters(1, INK) == 0);
    }

    #[test]
    fn the_ramp_is_hit_at_its_ends_and_between() {
        assert_eq!([colour(-3.0), colour(0.25), colour(7.0)], [RAMP[0], RAMP[1], RAMP[4]]);
        assert_eq!(colour(0.125), [218, 234, 245]);
    }

    #[test]
    fn cells_must_fit_the_captions() {
        assert!(map(Vec::new()).draw().is_err());
        assert!(map(vec![vec![Some(0.0)]]).draw().is_err());
    }
}
