//! How the depth of a product is split where its tiles do not fill the card: by shape alone, because the order of the
//! sums follows from it.

/// The tiles of a way, and what it is planned with: the card that it is made for, whatever the device.
#[derive(Clone, Copy, Debug)]
pub struct Tiles {
    /// Results of a tile: rows and columns.
    pub tile: [usize; 2],
    /// Tiles that the card computes at one time.
    pub places: usize,
    /// Operations per second of one of them.
    pub rate: f64,
    /// Bytes per second of memory.
    pub memory: f64,
}

/// A split: `parts` parts of `part` each; the last may be shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// Depth of a part: a multiple of [`STEP`], or all of it.
    pub part: usize,
    /// How many.
    pub parts: usize,
}

/// What parts are multiples of: the depth of a stage.
const STEP: usize = 64;
/// Depth that is worth a part of its own.
const LEAST: usize = 256;
/// Most parts.
const MOST: usize = 32;
/// Seconds of one launch more.
const LAUNCH: f64 = 3e-6;

impl Tiles {
    /// Tiles of a product of `rows` by `columns`.
    pub fn count(&self, rows: usize, columns: usize) -> usize {
        rows.div_ceil(self.tile[0]) * columns.div_ceil(self.tile[1])
    }

    /// The split of least predicted time: whole waves of tiles, and partial sums written and read.
    pub fn split(&self, rows: usize, columns: usize, depth: usize) -> Split {
        let whole = Split { part: depth.max(1), parts: 1 };
        let seconds = |s: Split| {
            let waves = (self.count(rows, columns) * s.parts).div_ceil(self.places) as f64;
            let products = waves * (2 * self.tile[0] * self.tile[1] * s.part) as f64 / self.rate;
            let sums = LAUNCH + (8 * s.parts * rows * columns) as f64 / self.memory;
            if s.parts == 1 { products } else { products + sums }
        };
        let mut best = (seconds(whole), whole);
        for wanted in 2..=MOST.min(depth / LEAST) {
            let part = depth.div_ceil(wanted).next_multiple_of(STEP);
            let split = Split { part, parts: depth.div_ceil(part) };
            let time = seconds(split);
            if time < best.0 {
                best = (time, split);
            }
        }
        best.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Tiles = Tiles { tile: [128, 192], places: 132, rate: 5.3e12, memory: 3e12 };

    #[test]
    fn full_waves_are_not_split_and_few_tiles_are() {
        assert_eq!(H200.split(32_768, 4608, 1152), Split { part: 1152, parts: 1 });
        // 512 × 1152 of depth 4608: 24 tiles of 132 places.
        let split = H200.split(512, 1152, 4608);
        assert!(split.parts > 3 && split.part.is_multiple_of(STEP), "{split:?}");
        assert!((split.parts - 1) * split.part < 4608 && split.parts * split.part >= 4608, "{split:?}");
        // Weight gradient of PixArt's first MLP layer: 216 tiles are 1.6 waves.
        assert!(H200.split(4608, 1152, 32_768).parts > 1);
    }

    #[test]
    fn a_short_depth_is_one_part() {
        assert_eq!(H200.split(1, 8, 8), Split { part: 8, parts: 1 });
        assert_eq!(H200.split(8, 8, 511).parts, 1);
    }
}
