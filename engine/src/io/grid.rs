//! Contact sheets: many small pictures in one, with captions for rows and columns.

use crate::error::{Error, Result};
use crate::io::font;
use crate::io::png::Image;

/// Background of a sheet.
const PAPER: u8 = 255;
/// Captions.
const INK: u8 = 0;
/// Longest drawn row caption in characters, so that a caption cannot make a sheet of any width.
const MAX_ROW_CAPTION: usize = 48;

/// How [`grid`] arranges pictures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Pictures per row.
    pub columns: usize,
    /// Integer magnification of each picture; pixels become squares.
    pub upscale: usize,
    /// Pixels around and between pictures.
    pub padding: usize,
    /// Captions above the columns, cut to the width of a picture; none when empty.
    pub column_captions: Vec<String>,
    /// Captions to the left of the rows; none when empty.
    pub row_captions: Vec<String>,
}

impl Layout {
    /// Rows of `columns` pictures, unmagnified, 2 pixels apart, without captions.
    pub fn new(columns: usize) -> Self {
        Layout { columns, upscale: 1, padding: 2, column_captions: Vec::new(), row_captions: Vec::new() }
    }
}

/// Arranges pictures of one size in rows, from the top left; the last row may be short.
///
/// # Errors
/// "nothing to arrange", "invalid layout" (zero columns or magnification), or "pictures differ in size".
pub fn grid(images: &[Image], layout: &Layout) -> Result<Image> {
    let Some(first) = images.first() else {
        return Err(Error::failure("contact sheet", "nothing to arrange").must("at least one picture"));
    };
    if layout.columns == 0 || layout.upscale == 0 {
        return Err(Error::failure("contact sheet", "invalid layout")
            .is(format!("{} columns, magnified {} times", layout.columns, layout.upscale))
            .must("at least 1 of each"));
    }
    let shape = |image: &Image| (image.width(), image.height(), image.channels());
    if let Some(other) = images.iter().find(|image| shape(image) != shape(first)) {
        return Err(Error::failure("contact sheet", "pictures differ in size")
            .is(format!("{:?}", shape(other)))
            .must(format!("{:?} (width, height, channels), as the first", shape(first))));
    }
    let plan = Plan::new(first, images.len(), layout);
    let mut sheet = Image::filled(plan.width(), plan.height(), &vec![PAPER; first.channels()])?;
    for (position, image) in images.iter().enumerate() {
        let (x, y) = plan.corner(position % plan.columns, position / plan.columns);
        paste(&mut sheet, image, x, y, layout.upscale);
    }
    for (column, caption) in layout.column_captions.iter().take(plan.columns).enumerate() {
        let fitting: String = caption.chars().take((plan.cell_width + 1) / (font::ADVANCE * plan.text)).collect();
        font::draw(&mut sheet, plan.corner(column, 0).0, plan.padding, &fitting, plan.text, INK);
    }
    for (row, caption) in layout.row_captions.iter().take(plan.rows).enumerate() {
        let caption: String = caption.chars().take(MAX_ROW_CAPTION).collect();
        let middle = plan.corner(0, row).1 + plan.cell_height.saturating_sub(font::HEIGHT * plan.text) / 2;
        font::draw(&mut sheet, plan.padding, middle, &caption, plan.text, INK);
    }
    Ok(sheet)
}

/// Measures of a sheet in pixels.
struct Plan {
    columns: usize,
    rows: usize,
    cell_width: usize,
    cell_height: usize,
    padding: usize,
    /// Magnification of captions: they grow with the pictures.
    text: usize,
    /// Strip left of the pictures, without its padding.
    left: usize,
    /// Strip above the pictures, without its padding.
    top: usize,
}

impl Plan {
    fn new(first: &Image, count: usize, layout: &Layout) -> Self {
        let columns = layout.columns.min(count);
        let text = (first.width() * layout.upscale / 96).clamp(1, 4);
        let longest = layout.row_captions.iter().map(|caption| caption.chars().count()).max().unwrap_or(0);
        let left = font::ADVANCE * text * longest.min(MAX_ROW_CAPTION);
        let top = if layout.column_captions.is_empty() { 0 } else { font::HEIGHT * text + layout.padding.max(1) };
        Plan {
            columns,
            rows: count.div_ceil(columns),
            cell_width: first.width() * layout.upscale,
            cell_height: first.height() * layout.upscale,
            padding: layout.padding,
            text,
            left,
            top,
        }
    }

    fn width(&self) -> usize {
        self.left + self.columns * (self.cell_width + self.padding) + self.padding
    }

    fn height(&self) -> usize {
        self.top + self.rows * (self.cell_height + self.padding) + self.padding
    }

    /// Top left corner of a picture.
    fn corner(&self, column: usize, row: usize) -> (usize, usize) {
        let x = self.left + self.padding + column * (self.cell_width + self.padding);
        let y = self.top + self.padding + row * (self.cell_height + self.padding);
        (x, y)
    }
}

fn paste(sheet: &mut Image, image: &Image, x: usize, y: usize, upscale: usize) {
    for row in 0..image.height() * upscale {
        for column in 0..image.width() * upscale {
            let source = image.pixel(column / upscale, row / upscale);
            sheet.pixel_mut(x + column, y + row).copy_from_slice(source);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(shade: u8) -> Image {
        Image::filled(2, 1, &[shade]).unwrap()
    }

    #[test]
    fn places_and_magnifies() {
        let layout = Layout { upscale: 2, padding: 1, ..Layout::new(2) };
        let sheet = grid(&[flat(10), flat(20), flat(30)], &layout).unwrap();
        // Two cells of 4 x 2 with 1 pixel around: 11 x 7.
        assert_eq!((sheet.width(), sheet.height(), sheet.channels()), (11, 7, 1));
        let rows: Vec<&[u8]> = sheet.pixels().chunks(11).collect();
        assert_eq!(rows[0], [255; 11]);
        assert_eq!(rows[1], [255, 10, 10, 10, 10, 255, 20, 20, 20, 20, 255]);
        assert_eq!(rows[5], [255, 30, 30, 30, 30, 255, 255, 255, 255, 255, 255]);
    }

    #[test]
    fn captions_add_strips() {
        let image = Image::filled(24, 12, &[9, 9, 9]).unwrap();
        let plain = grid(&[image.clone(), image.clone()], &Layout::new(2)).unwrap();
        let layout = Layout {
            column_captions: vec!["before".into(), "after".into()],
            row_captions: vec!["cat".into()],
            ..Layout::new(2)
        };
        let sheet = grid(&[image.clone(), image], &layout).unwrap();
        assert_eq!(sheet.width(), plain.width() + 3 * font::ADVANCE);
        assert_eq!(sheet.height(), plain.height() + font::HEIGHT + 2);
        let ink = |x: std::ops::Range<usize>, y: std::ops::Range<usize>| {
            y.flat_map(|y| x.clone().map(move |x| (x, y))).filter(|&(x, y)| sheet.pixel(x, y) == [INK; 3]).count()
        };
        let left = 3 * font::ADVANCE + 2;
        assert!(ink(left..sheet.width(), 0..9) > 0, "column captions");
        assert!(ink(0..left, 9..sheet.height()) > 0, "row caption");
        assert_eq!(sheet.pixel(left, 11), [9, 9, 9]);
    }

    #[test]
    fn wrong_input_is_refused() {
        assert_eq!(grid(&[], &Layout::new(1)).unwrap_err().problem(), "nothing to arrange");
        assert_eq!(grid(&[flat(0)], &Layout::new(0)).unwrap_err().problem(), "invalid layout");
        let other = Image::filled(1, 1, &[0]).unwrap();
        assert_eq!(grid(&[flat(0), other], &Layout::new(2)).unwrap_err().problem(), "pictures differ in size");
    }
}
