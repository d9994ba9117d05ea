//! Convolutions and correlations of long sequences, one channel at a time, by real Fourier transforms.

use crate::simd::vectorised;
use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};
use std::sync::{Arc, Mutex, PoisonError};

type C32 = Complex<f32>;

/// Transforms of one length.
#[derive(Clone)]
pub struct Transform {
    /// Length of the circle.
    pub len: usize,
    forward: Arc<dyn RealToComplex<f32>>,
    inverse: Arc<dyn ComplexToReal<f32>>,
}

/// Plans are made once per length and kept.
static PLANS: Mutex<Vec<Transform>> = Mutex::new(Vec::new());

impl Transform {
    /// For a circle of at least `len` places: the next length that is a power of two, or three times one.
    pub fn at_least(len: usize) -> Transform {
        let power = len.max(4).next_power_of_two();
        let len = if power / 4 * 3 >= len { power / 4 * 3 } else { power };
        let mut plans = PLANS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = plans.iter().find(|plan| plan.len == len) {
            return known.clone();
        }
        let mut planner = RealFftPlanner::new();
        let plan = Transform { len, forward: planner.plan_fft_forward(len), inverse: planner.plan_fft_inverse(len) };
        plans.push(plan.clone());
        plan
    }

    /// Values of a spectrum.
    pub fn bins(&self) -> usize {
        self.len / 2 + 1
    }

    /// Values of scratch memory.
    pub fn scratch(&self) -> usize {
        self.forward.get_scratch_len().max(self.inverse.get_scratch_len())
    }

    /// Spectrum of `wave`, which is used up.
    pub fn forward(&self, wave: &mut [f32], spectrum: &mut [C32], scratch: &mut [C32]) {
        // Refuses wrong lengths only, and they are those of the plan.
        let done = self.forward.process_with_scratch(wave, spectrum, scratch);
        debug_assert!(done.is_ok());
    }

    /// `wave`·len of `spectrum`, which is used up.
    pub fn inverse(&self, spectrum: &mut [C32], wave: &mut [f32], scratch: &mut [C32]) {
        spectrum[0].im = 0.0;
        if let Some(last) = spectrum.last_mut() {
            last.im = 0.0;
        }
        let done = self.inverse.process_with_scratch(spectrum, wave, scratch);
        debug_assert!(done.is_ok());
    }
}

/// Memory of one thread for [`Transform`]s.
#[derive(Default)]
pub struct Waves {
    /// A sequence, padded with zeros.
    pub wave: Vec<f32>,
    /// Spectra: of the filters of a strip, the sums of their gradients, and two to work with.
    pub filters: Vec<C32>,
    /// Sums of filter gradients, as spectra.
    pub sums: Vec<C32>,
    /// Spectrum of u.
    pub input: Vec<C32>,
    /// Spectrum of the gradient of the filter's output.
    pub output: Vec<C32>,
    /// A product.
    pub product: Vec<C32>,
    /// Memory of the transforms.
    pub scratch: Vec<C32>,
}

impl Waves {
    /// Makes room for a transform and the spectra of `channels` filters.
    pub fn fit(&mut self, transform: &Transform, channels: usize) {
        let (zero, bins) = (C32::new(0.0, 0.0), transform.bins());
        self.wave.resize(transform.len, 0.0);
        for spectra in [&mut self.filters, &mut self.sums] {
            spectra.clear();
            spectra.resize(channels * bins, zero);
        }
        for spectrum in [&mut self.input, &mut self.output, &mut self.product] {
            spectrum.resize(bins, zero);
        }
        self.scratch.resize(transform.scratch(), zero);
    }
}

/// `out = a·b`, with `b` conjugated for a correlation.
pub fn multiply<const CONJUGATE: bool>(a: &[C32], b: &[C32], out: &mut [C32]) {
    let sign = if CONJUGATE { -1.0 } else { 1.0 };
    vectorised(
        #[inline(always)]
        || {
            for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                *out = a * C32::new(b.re, sign * b.im);
            }
        },
    );
}

/// `out += a·conj(b)`.
pub fn accumulate(a: &[C32], b: &[C32], out: &mut [C32]) {
    vectorised(
        #[inline(always)]
        || {
            for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
                *out += a * b.conj();
            }
        },
    );
}
