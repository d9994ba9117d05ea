//! How a call is cut into strips of channels, and what is prepared for each: its filter by diagonals or as spectra.

use super::direct::{CHANNELS, Diagonals, LANES_OF_ROW, Row, padded};
use super::spectrum::{Transform, Waves};
use crate::gated_conv::strips::{Call, Filters};
use crate::gated_conv::window::Window;
use crate::generated::long_conv::{Dims, Params};
use crate::simd::LANES;

/// Multiply-adds of the direct path that cost as much as one of the M·log₂ M steps of a transform of length M.
const DIRECT_PER_TRANSFORM: usize = 18;

/// A row of zeros.
pub const ZEROS: Row = [[0.0; LANES]; LANES_OF_ROW];

/// Memory of one thread.
#[derive(Default)]
pub struct Work {
    /// The filter of a strip by lag, skip term included.
    pub taps: Vec<Row>,
    /// The filter's diagonals for each vector of the strip, forth and back.
    pub ahead: [Diagonals; LANES_OF_ROW],
    pub back: [Diagonals; LANES_OF_ROW],
    pub lags: Diagonals,
    /// k, v, u, gradient of the filter's output, the filter's output, gradient of u.
    pub rows: [Vec<Row>; 6],
    pub waves: Waves,
}

/// At most [`CHANNELS`] channels, of one direction.
#[derive(Clone, Copy)]
pub struct Strip {
    /// First channel.
    pub first: usize,
    /// Channels.
    pub len: usize,
    /// Whether they run against token order.
    pub backward: bool,
}

impl Strip {
    /// Vectors with channels in them.
    pub fn vectors(self) -> usize {
        self.len.div_ceil(LANES)
    }
}

/// A call and how it is computed.
pub struct Plan<'w> {
    pub dims: Dims,
    pub params: Params,
    pub call: Call<'w>,
    pub filters: Filters<'w>,
    /// Absent for sums over diagonals.
    pub transform: Option<Transform>,
}

impl<'w> Plan<'w> {
    pub fn new(dims: Dims, params: Params, short: [Option<&'w [f32]>; 2]) -> Self {
        let Dims { n, c, k, .. } = dims;
        // Without short filters a window of one tap reads the token itself.
        let window = if short[0].is_some() { Window::line(n, k, params.lead) } else { Window::line(n, 1, 0) };
        let call = Call { channels: c, reversed: params.reversed, window, short, inner: [None, None] };
        let mut plan = Plan { dims, params, call, filters: Filters::new(call), transform: None };
        let (first, last) = plan.lags(false);
        let pairs: usize = (first..=last).map(|lag| n.saturating_sub(lag.unsigned_abs())).sum();
        let circle = plan.circle();
        if pairs > DIRECT_PER_TRANSFORM * circle * circle.ilog2() as usize {
            plan.transform = Some(Transform::at_least(circle));
        }
        plan
    }

    /// First and last lag of the filter.
    pub fn lags(&self, backward: bool) -> (isize, isize) {
        let (before, after) = (self.params.centre as isize, (self.dims.l - 1 - self.params.centre) as isize);
        if backward { (-after, before) } else { (-before, after) }
    }

    /// Shortest circle on which no lag between two tokens is mistaken for another.
    pub fn circle(&self) -> usize {
        let (first, last) = self.lags(false);
        self.dims.n + (self.dims.n - 1).min(first.unsigned_abs().max(last.unsigned_abs()))
    }

    pub fn strips(&self) -> usize {
        let reversed = self.params.reversed;
        (self.dims.c - reversed).div_ceil(CHANNELS) + reversed.div_ceil(CHANNELS)
    }

    pub fn strip(&self, index: usize) -> Strip {
        let ahead = self.dims.c - self.params.reversed;
        let (begin, end, index, backward) = match index.checked_sub(ahead.div_ceil(CHANNELS)) {
            None => (0, ahead, index, false),
            Some(index) => (ahead, self.dims.c, index, true),
        };
        let first = begin + index * CHANNELS;
        Strip { first, len: CHANNELS.min(end - first), backward }
    }

    pub fn window(&self, strip: Strip) -> Window {
        self.call.window_of(strip.first)
    }

    /// The tap of the filter that is the `i`-th lag of a strip.
    pub fn tap(&self, strip: Strip, i: usize) -> usize {
        if strip.backward { self.dims.l - 1 - i } else { i }
    }

    /// Sample `sample` of a tensor `[B, N, width]`.
    pub fn sample<'x>(&self, x: &'x [f32], width: usize, sample: usize) -> &'x [f32] {
        &x[sample * self.dims.n * width..][..self.dims.n * width]
    }

    /// q, k or v of a strip, padded with zeros.
    #[inline(always)]
    pub fn load(&self, strip: Strip, part: usize, p: &[f32], out: &mut Vec<Row>) {
        let window = self.window(strip);
        out.clear();
        out.resize(padded(self.dims.n), ZEROS);
        for t in 0..self.dims.n {
            self.filters.short(&window, part, p, t, strip.first, &mut out[t].as_flattened_mut()[..strip.len]);
        }
    }

    /// Prepares the filter of a strip.
    pub fn prepare(&self, strip: Strip, filter: &[f32], skip: &[f32], work: &mut Work) {
        let Dims { n, l, .. } = self.dims;
        let (first, last) = self.lags(strip.backward);
        work.taps.clear();
        work.taps.resize(l, ZEROS);
        for channel in 0..strip.len {
            let taps = &filter[(strip.first + channel) * l..][..l];
            (0..l).for_each(|i| work.taps[i].as_flattened_mut()[channel] = taps[self.tap(strip, i)]);
            work.taps[(-first) as usize].as_flattened_mut()[channel] += skip[strip.first + channel];
        }
        let Some(transform) = &self.transform else {
            for v in 0..strip.vectors() {
                work.ahead[v].set([n, n], first, l, |i| work.taps[i][v]);
                work.back[v].set([n, n], -last, l, |i| work.taps[l - 1 - i][v]);
            }
            return;
        };
        work.waves.fit(transform, strip.len);
        let Waves { wave, filters, scratch, .. } = &mut work.waves;
        for (channel, spectrum) in filters.chunks_exact_mut(transform.bins()).enumerate() {
            wave.fill(0.0);
            self.places(strip, transform).for_each(|(i, place)| wave[place] = work.taps[i].as_flattened()[channel]);
            transform.forward(wave, spectrum, scratch);
        }
    }

    /// The lags between two tokens: (which, its place on the circle).
    pub fn places(&self, strip: Strip, transform: &Transform) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (most, len, (first, _)) = (self.dims.n - 1, transform.len as isize, self.lags(strip.backward));
        let lags = (0..self.dims.l).map(move |i| (i, first + i as isize));
        lags.filter(move |(_, lag)| lag.unsigned_abs() <= most).map(move |(i, lag)| (i, lag.rem_euclid(len) as usize))
    }
}
