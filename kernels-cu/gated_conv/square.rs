//! Windows of three by three tokens: a vector of channels walks along a row of the grid with the nine taps and the nine
//! tokens under them in registers, so that a token costs three loads.

use super::window::Window;
use crate::simd::arch;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Rows and columns of the window.
const SIDE: usize = 3;
/// Taps.
const TAPS: usize = SIDE * SIDE;

/// Whether a window is one that this module takes.
pub fn takes(window: &Window) -> bool {
    window.size == [SIDE, SIDE] && window.lead == [1, 1]
}

/// Rows of channels of consecutive tokens, from token `origin` on: row `t` begins at `(t − origin)·step + offset`.
#[derive(Clone, Copy)]
pub struct Rows<T> {
    /// Memory.
    pub data: T,
    /// First token.
    pub origin: usize,
    /// Values from token to token.
    pub step: usize,
    /// Values before the first channel.
    pub offset: usize,
}

impl<T> Rows<T> {
    #[inline(always)]
    fn at(&self, token: usize) -> usize {
        (token - self.origin) * self.step + self.offset
    }
}

/// What is done with a sum.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Write {
    /// It is the result.
    Set,
    /// It is multiplied onto the result.
    Times,
}

/// `out(t) = bias + Σ w·x` over the window of every token of `tokens`, or `out(t)` times it.
pub struct Convolve<'a> {
    /// Rows and columns of the grid.
    pub grid: [usize; 2],
    /// Tokens of the result.
    pub tokens: Range<usize>,
    /// Channels.
    pub len: usize,
    /// Of every tap its channels.
    pub taps: [&'a [f32]; TAPS],
    /// Bias of the channels; none where the gradient of the input is computed.
    pub bias: Option<&'a [f32]>,
    /// Whether tokens are summed that read the token, as the gradient of the input does, instead of those it reads.
    pub turned: bool,
    /// Input.
    pub x: Rows<&'a [f32]>,
    /// Result.
    pub out: Rows<&'a mut [f32]>,
    /// What is done with a sum.
    pub write: Write,
}

/// `dw[tap] += Σ dy(t)·x(t + tap)` and `bias += Σ dy(t)` over the tokens.
pub struct Correlate<'a> {
    /// Rows and columns of the grid.
    pub grid: [usize; 2],
    /// Tokens that are summed.
    pub tokens: Range<usize>,
    /// Channels.
    pub len: usize,
    /// Gradient of the output.
    pub dy: Rows<&'a [f32]>,
    /// Input.
    pub x: Rows<&'a [f32]>,
    /// Of every tap, and at last of the bias, the sums of its channels.
    pub sums: [&'a mut [f32]; TAPS + 1],
}

/// Runs on the best instructions of this processor.
pub fn run(work: impl WithSimd<Output = ()>) {
    arch().dispatch(work);
}

/// A vector from the start of a slice that holds one, or what it holds and zeros.
#[inline(always)]
fn load<S: Simd, const WHOLE: bool>(simd: S, from: &[f32]) -> S::f32s {
    if WHOLE && let [vector, ..] = S::as_simd_f32s(from).0 {
        return *vector;
    }
    simd.partial_load_f32s(from)
}

#[inline(always)]
fn store<S: Simd, const WHOLE: bool>(simd: S, to: &mut [f32], value: S::f32s) {
    if WHOLE && let [vector, ..] = S::as_mut_simd_f32s(to).0 {
        *vector = value;
        return;
    }
    simd.partial_store_f32s(to, value);
}

/// The rows of a grid around a vector of channels.
struct Around<'a> {
    x: Rows<&'a [f32]>,
    columns: usize,
    /// First tokens of the rows above, at and below; none outside the grid.
    rows: [Option<usize>; SIDE],
    /// First channel, and channels.
    from: usize,
    width: usize,
}

impl<'a> Around<'a> {
    #[inline(always)]
    fn new(x: Rows<&'a [f32]>, [rows, columns]: [usize; 2], row: usize, [from, width]: [usize; 2]) -> Self {
        let first = |i: usize| (row + i).checked_sub(1).filter(|row| *row < rows).map(|row| row * columns);
        Around { x, columns, rows: [first(0), first(1), first(2)], from, width }
    }

    /// The three tokens of a column; zeros outside the grid, where the column may be one before the first.
    #[inline(always)]
    fn column<S: Simd, const WHOLE: bool>(&self, simd: S, column: usize) -> [S::f32s; SIDE] {
        // Loops, because closures that an array's methods call are not compiled for the processor.
        let mut tokens = [simd.splat_f32s(0.0); SIDE];
        if column < self.columns {
            for i in 0..SIDE {
                if let Some(first) = self.rows[i] {
                    let place = self.x.at(first + column) + self.from;
                    tokens[i] = load::<S, WHOLE>(simd, &self.x.data[place..][..self.width]);
                }
            }
        }
        tokens
    }
}

/// Calls `body` with (first channel, channels) of every vector.
macro_rules! vectors {
    ($simd:ident, $len:expr, $body:ident $(<$option:literal>)?, $($argument:expr),*) => {
        let whole = $len / S::F32_LANES * S::F32_LANES;
        for from in (0..whole).step_by(S::F32_LANES) {
            $body::<S, true $(, $option)?>($simd, [from, S::F32_LANES], $($argument),*);
        }
        if whole < $len {
            $body::<S, false $(, $option)?>($simd, [whole, $len - whole], $($argument),*);
        }
    };
}

impl WithSimd for Convolve<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let window = Window { grid: self.grid, size: [SIDE, SIDE], lead: [1, 1] };
        for (row, span) in window.rows(&self.tokens) {
            if self.turned {
                vectors!(simd, self.len, convolve<true>, &mut self, row, &span);
            } else {
                vectors!(simd, self.len, convolve<false>, &mut self, row, &span);
            }
        }
    }
}

#[inline(always)]
fn convolve<S: Simd, const WHOLE: bool, const TURNED: bool>(
    simd: S,
    [from, width]: [usize; 2],
    work: &mut Convolve<'_>,
    row: usize,
    span: &Range<usize>,
) {
    let mut bias = simd.splat_f32s(0.0);
    if let Some(values) = work.bias {
        bias = load::<S, WHOLE>(simd, &values[from..][..width]);
    }
    let mut taps = [bias; TAPS];
    for i in 0..TAPS {
        // A turned window reads what is below and to the right by its first taps.
        let tap = work.taps[if TURNED { TAPS - 1 - i } else { i }];
        taps[i] = load::<S, WHOLE>(simd, &tap[from..][..width]);
    }
    let around = Around::new(work.x, work.grid, row, [from, width]);
    let mut left = around.column::<S, WHOLE>(simd, span.start.wrapping_sub(1));
    let mut middle = around.column::<S, WHOLE>(simd, span.start);
    for column in span.clone() {
        let right = around.column::<S, WHOLE>(simd, column + 1);
        // In the order of the filter: row by row, in each from the last tap to the first.
        let mut sum = bias;
        for i in 0..SIDE {
            let i = if TURNED { SIDE - 1 - i } else { i };
            let [first, last] = if TURNED { [right[i], left[i]] } else { [left[i], right[i]] };
            let [a, c] = if TURNED { [2, 0] } else { [0, 2] };
            sum = simd.mul_add_f32s(taps[i * SIDE + c], last, sum);
            sum = simd.mul_add_f32s(taps[i * SIDE + 1], middle[i], sum);
            sum = simd.mul_add_f32s(taps[i * SIDE + a], first, sum);
        }
        let place = work.out.at(row * work.grid[1] + column) + from;
        let out = &mut work.out.data[place..][..width];
        if work.write == Write::Times {
            sum = simd.mul_f32s(sum, load::<S, WHOLE>(simd, out));
        }
        store::<S, WHOLE>(simd, out, sum);
        (left, middle) = (middle, right);
    }
}

impl WithSimd for Correlate<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let window = Window { grid: self.grid, size: [SIDE, SIDE], lead: [1, 1] };
        for (row, span) in window.rows(&self.tokens) {
            vectors!(simd, self.len, correlate, &mut self, row, &span);
        }
    }
}

#[inline(always)]
fn correlate<S: Simd, const WHOLE: bool>(
    simd: S,
    [from, width]: [usize; 2],
    work: &mut Correlate<'_>,
    row: usize,
    span: &Range<usize>,
) {
    let mut sums: [S::f32s; TAPS + 1] = std::array::from_fn(|i| load::<S, WHOLE>(simd, &work.sums[i][from..][..width]));
    let around = Around::new(work.x, work.grid, row, [from, width]);
    let mut left = around.column::<S, WHOLE>(simd, span.start.wrapping_sub(1));
    let mut middle = around.column::<S, WHOLE>(simd, span.start);
    for column in span.clone() {
        let right = around.column::<S, WHOLE>(simd, column + 1);
        let place = work.dy.at(row * work.grid[1] + column) + from;
        let dy = load::<S, WHOLE>(simd, &work.dy.data[place..][..width]);
        for i in 0..SIDE {
            sums[i * SIDE] = simd.mul_add_f32s(dy, left[i], sums[i * SIDE]);
            sums[i * SIDE + 1] = simd.mul_add_f32s(dy, middle[i], sums[i * SIDE + 1]);
            sums[i * SIDE + 2] = simd.mul_add_f32s(dy, right[i], sums[i * SIDE + 2]);
        }
        sums[TAPS] = simd.add_f32s(sums[TAPS], dy);
        (left, middle) = (middle, right);
    }
    for i in 0..=TAPS {
        store::<S, WHOLE>(simd, &mut work.sums[i][from..][..width], sums[i]);
    }
}
