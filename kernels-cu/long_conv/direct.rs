//! Sums over diagonals for a vector of channels at a time: convolutions and correlations of short sequences.

use crate::simd::{LANES, arch};
use pulp::{Simd, WithSimd};

/// One value of each channel of a vector.
pub type Lane = [f32; LANES];
/// One value of each channel of a strip.
pub type Row = [Lane; LANES_OF_ROW];
/// Vectors of a strip: so many that a row is a few cache lines.
pub const LANES_OF_ROW: usize = 4;
/// Channels of a strip.
pub const CHANNELS: usize = LANES_OF_ROW * LANES;

/// Results of a register tile.
const TILE: usize = 8;
/// Terms added to a tile at a time.
const STEP: usize = 4;

/// Coefficients by diagonal and terms of `out[o] = Σ_s coefficient(o − s)·x[s]`, padded with zeros for whole tiles.
#[derive(Default)]
pub struct Diagonals {
    /// Coefficient of diagonal `d` at `d + offset`.
    values: Vec<Lane>,
    offset: usize,
    /// First and last diagonal that is not all zero.
    span: (isize, isize),
}

impl Diagonals {
    /// For `results` sums of `terms` terms: coefficient `at(i)` on diagonal `first + i` for `i < count`.
    pub fn set(&mut self, [results, terms]: [usize; 2], first: isize, count: usize, at: impl Fn(usize) -> Lane) {
        let (results, terms) = (results.next_multiple_of(TILE), terms.next_multiple_of(STEP));
        self.offset = terms - 1;
        self.span = (first, first + count as isize - 1);
        self.values.clear();
        self.values.resize(results + terms, [0.0; LANES]);
        let lowest = -(self.offset as isize);
        let low = (first.max(lowest) - first) as usize;
        let high = (results as isize - first).clamp(0, count as isize) as usize;
        for i in low..high {
            self.values[(first + i as isize - lowest) as usize] = at(i);
        }
    }

    /// Writes the sums over vector `vector` of `x`, or adds them, to the same vector of `out`; the length of `x` is a
    /// multiple of [`STEP`] with zeros at its end.
    pub fn apply(&self, vector: usize, x: &[Row], out: &mut [Row], add: bool) {
        arch().dispatch(Apply { diagonals: self, vector, x, out, add });
    }
}

/// Terms padded with zeros to the length that [`Diagonals::apply`] takes.
pub fn padded(terms: usize) -> usize {
    terms.next_multiple_of(STEP)
}

struct Apply<'a> {
    diagonals: &'a Diagonals,
    vector: usize,
    x: &'a [Row],
    out: &'a mut [Row],
    add: bool,
}

impl WithSimd for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Diagonals { values, offset, span: (first, last) } = self.diagonals;
        let parts = LANES / S::F32_LANES;
        let (values, _) = S::as_simd_f32s(values.as_flattened());
        let (x, _) = S::as_simd_f32s(self.x.as_flattened().as_flattened());
        // Registers from one row to the next, and to the vector in its row.
        let (row, vector) = (LANES_OF_ROW * parts, self.vector * parts);
        let terms = self.x.len() as isize;
        for (tile, out) in self.out.chunks_mut(TILE).enumerate() {
            let at = (tile * TILE) as isize;
            // Terms whose diagonals are all outside the span are left out.
            let from = (at - last).clamp(0, terms) as usize / STEP * STEP;
            let to = (at + TILE as isize - first).clamp(0, terms) as usize;
            let live = out.len();
            let (out, _) = S::as_mut_simd_f32s(out.as_flattened_mut().as_flattened_mut());
            for part in 0..parts {
                let mut sum = [simd.splat_f32s(0.0); TILE];
                if self.add {
                    (0..live).for_each(|i| sum[i] = out[i * row + vector + part]);
                }
                for s in (from..to).step_by(STEP) {
                    let x = &x[s * row + vector..][..(STEP - 1) * row + parts];
                    let base = tile * TILE + offset + 1 - s - STEP;
                    let values = &values[base * parts..][..(TILE + STEP - 1) * parts];
                    for j in 0..STEP {
                        for i in 0..TILE {
                            let value = values[(i + STEP - 1 - j) * parts + part];
                            sum[i] = simd.mul_add_f32s(value, x[j * row + part], sum[i]);
                        }
                    }
                }
                (0..live).for_each(|i| out[i * row + vector + part] = sum[i]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_exact_on_integers() {
        for (results, terms, first, count) in [(1, 1, 0, 1), (19, 7, -3, 9), (8, 33, -40, 60), (21, 21, 0, 21)] {
            let value = |i: usize| [(i % 7) as f32 - 3.0; LANES];
            let mut x: Vec<Row> = (0..terms).map(|s| [[(s % 5) as f32 - 2.0; LANES]; LANES_OF_ROW]).collect();
            x.resize(padded(terms), [[0.0; LANES]; LANES_OF_ROW]);
            let mut diagonals = Diagonals::default();
            diagonals.set([results, terms], first, count, value);
            let mut out = vec![[[1.0; LANES]; LANES_OF_ROW]; results];
            for (add, begin) in [(true, 1.0), (false, 0.0)] {
                diagonals.apply(2, &x, &mut out, add);
                for (o, out) in out.iter().enumerate() {
                    let place = |s: usize| usize::try_from(o as isize - s as isize - first).ok().filter(|i| *i < count);
                    let sum: f32 = (0..terms).filter_map(|s| Some(value(place(s)?)[0] * x[s][2][0])).sum();
                    assert_eq!(
                        (out[1], out[2]),
                        ([1.0; LANES], [begin + sum; LANES]),
                        "{results} {terms} {first} {count} {o}"
                    );
                }
            }
        }
    }
}
