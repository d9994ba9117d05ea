//! How results are judged: seeded inputs, the comparator, the tolerance table, gradient checks.
//!
//! Tests, the conformance runner and the benches share this file, so "equal" means one thing everywhere.

/// How a test input is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fill {
    /// Standard normal.
    Normal,
    /// Uniform in `[lo, hi)`.
    Uniform(f64, f64),
    /// |normal| + 0.01: variances, second moments.
    Positive,
    /// Integer in `[0, end)`.
    Index(usize),
}

/// Sebastiano Vigna's splitmix64: one multiply-xor chain per draw, the same bits in every language.
#[derive(Clone, Debug)]
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    /// A generator for one tensor of one case: the seed is an FNV-1a hash of both names.
    pub fn named(case: &str, tensor: &str) -> Self {
        let hash = case
            .bytes()
            .chain([b'/'])
            .chain(tensor.bytes())
            .fold(0xcbf2_9ce4_8422_2325, |h: u64, byte| (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        SplitMix64(hash)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, 1)` with 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Standard normal by Box–Muller (the cosine branch).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

/// `len` values of tensor `name` in `case`, rounded to f32 so that every precision sees the same numbers.
pub fn draw_f64(case: &str, name: &str, len: usize, fill: Fill) -> Vec<f64> {
    let mut rng = SplitMix64::named(case, name);
    let mut one = || match fill {
        Fill::Normal => rng.normal(),
        Fill::Uniform(lo, hi) => lo + (hi - lo) * rng.uniform(),
        Fill::Positive => rng.normal().abs() + 0.01,
        Fill::Index(end) => (rng.next_u64() % end.max(1) as u64) as f64,
    };
    repeated((0..len.min(DRAWN)).map(|_| f64::from(one() as f32)).collect(), len)
}

/// As [`draw_f64`], in f32.
pub fn draw_f32(case: &str, name: &str, len: usize, fill: Fill) -> Vec<f32> {
    repeated(draw_f64(case, name, len.min(DRAWN), fill).into_iter().map(|v| v as f32).collect(), len)
}

/// As [`draw_f64`], in i32.
pub fn draw_i32(case: &str, name: &str, len: usize, fill: Fill) -> Vec<i32> {
    repeated(draw_f64(case, name, len.min(DRAWN), fill).into_iter().map(|v| v as i32).collect(), len)
}

/// Numbers that are drawn before they repeat: the shapes of large models would take longer to draw than to measure. A
/// prime, so that no two rows of a tensor are the same.
const DRAWN: usize = 4_194_301;

/// `values` over and over, `len` in all.
fn repeated<T: Copy>(mut values: Vec<T>, len: usize) -> Vec<T> {
    let drawn = values.len();
    values.reserve_exact(len.saturating_sub(drawn));
    while drawn > 0 && values.len() < len {
        values.extend_from_within(..drawn.min(len - values.len()));
    }
    values
}

/// Bounds of a comparison; every one must hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Absolute part of the bound on one element.
    pub atol: f64,
    /// Relative part of the bound on one element.
    pub rtol: f64,
    /// Bound on ‖got − want‖₂ / ‖want‖₂.
    pub rms: f64,
}

impl Tolerance {
    /// f32 arithmetic against an f64 oracle: some tens of roundings of 6e-8 on data of order one.
    pub const F32: Tolerance = Tolerance { atol: 2e-5, rtol: 1e-5, rms: 3e-6 };
    /// Products of bf16 values with f32 accumulation, inputs rounded alike on both sides.
    pub const BF16: Tolerance = Tolerance { atol: 1e-3, rtol: 1.6e-2, rms: 4e-3 };
}

/// Outcome of a comparison.
#[derive(Clone, Copy, Debug)]
pub struct Comparison {
    /// Largest |got − want|.
    pub max_abs: f64,
    /// Largest |got − want| / (atol + rtol·|want|); the element passes at 1 or below.
    pub worst: f64,
    /// Index of the worst element.
    pub worst_index: usize,
    /// ‖got − want‖₂ / ‖want‖₂ (absolute where the reference is all zero).
    pub rel_rms: f64,
    /// Verdict: every element finite where the reference is, within the element bound and the RMS bound.
    pub pass: bool,
}

/// Compares element by element; written so that a NaN can only fail.
pub fn compare(got: &[f32], want: &[f32], tolerance: Tolerance) -> Comparison {
    let mut out = Comparison { max_abs: 0.0, worst: 0.0, worst_index: 0, rel_rms: 0.0, pass: got.len() == want.len() };
    let (mut error_sq, mut want_sq) = (0.0f64, 0.0f64);
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        if g.to_bits() == w.to_bits() {
            want_sq += f64::from(w) * f64::from(w);
            continue;
        }
        let error = (f64::from(g) - f64::from(w)).abs();
        let ratio = error / (tolerance.atol + tolerance.rtol * f64::from(w).abs());
        if ratio.is_nan() || ratio > out.worst {
            (out.worst, out.worst_index) = (if ratio.is_nan() { f64::INFINITY } else { ratio }, i);
        }
        out.max_abs = out.max_abs.max(if error.is_nan() { f64::INFINITY } else { error });
        error_sq += error * error;
        want_sq += f64::from(w) * f64::from(w);
    }
    out.rel_rms = if want_sq > 0.0 { (error_sq / want_sq).sqrt() } else { error_sq.sqrt() };
    out.pass = out.pass && out.worst <= 1.0 && out.rel_rms <= tolerance.rms;
    out
}

/// Fails the running test when `got` is not `want` within `tolerance`.
#[cfg(test)]
#[track_caller]
pub(crate) fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: Tolerance) {
    let result = compare(got, want, tolerance);
    let i = result.worst_index;
    assert!(result.pass, "{what}: element {i}: got {:?}, want {:?}; {result:?}", got.get(i), want.get(i));
}

/// f32 tensor `name` of `file` (without its extension) of a golden case.
#[cfg(test)]
pub(crate) fn golden(case: &str, file: &str, name: &str) -> Vec<f32> {
    let path = format!("{}/../tests/golden/{case}/{file}.safetensors", env!("CARGO_MANIFEST_DIR"));
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{path}: {e}"));
    let tensor = tensors.tensor(name).unwrap_or_else(|e| panic!("{path}: {e}"));
    assert_eq!(tensor.dtype(), safetensors::Dtype::F32, "{path}: {name}");
    bytemuck::pod_collect_to_vec(tensor.data())
}

/// One row of a gradient check.
#[derive(Clone, Debug)]
pub struct GradCheck {
    /// Input whose gradient is checked.
    pub input: &'static str,
    /// Directional derivative from the backward pass.
    pub analytic: f64,
    /// The same from central differences of the forward pass.
    pub numeric: f64,
    /// |analytic − numeric| over the larger of |numeric| and the norm of the gradient.
    pub error: f64,
}

/// Checks the gradient of `loss` at `at` along a seeded unit direction.
pub fn directional(
    input: &'static str,
    case: &str,
    at: &[f64],
    gradient: &[f64],
    loss: impl Fn(&[f64]) -> f64,
) -> GradCheck {
    let mut direction = draw_f64(case, &format!("direction of {input}"), at.len(), Fill::Normal);
    let norm = dot(&direction, &direction).sqrt().max(1e-300);
    direction.iter_mut().for_each(|d| *d /= norm);
    let moved = |step: f64| at.iter().zip(&direction).map(|(x, d)| x + step * d).collect::<Vec<_>>();
    // Fourth-order central differences: truncation h⁴, so a step of 1e-3 leaves only rounding.
    let h = 1e-3;
    let central = |h: f64| (loss(&moved(h)) - loss(&moved(-h))) / (2.0 * h);
    let numeric = (4.0 * central(h / 2.0) - central(h)) / 3.0;
    let analytic = dot(gradient, &direction);
    let scale = numeric.abs().max(dot(gradient, gradient).sqrt() / (at.len() as f64).sqrt()).max(1e-12);
    GradCheck { input, analytic, numeric, error: (analytic - numeric).abs() / scale }
}

/// Inner product.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_is_pinned() {
        let mut rng = SplitMix64(0);
        let first: Vec<u64> = (0..3).map(|_| rng.next_u64()).collect();
        assert_eq!(first, [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4, 0x06c4_5d18_8009_454f]);
    }

    #[test]
    fn nan_fails() {
        let result = compare(&[1.0, f32::NAN], &[1.0, 2.0], Tolerance::F32);
        assert!(!result.pass && result.worst.is_infinite());
    }

    #[test]
    fn infinity_must_match() {
        assert!(compare(&[f32::INFINITY], &[f32::INFINITY], Tolerance::F32).pass);
        assert!(!compare(&[f32::INFINITY], &[1.0], Tolerance::F32).pass);
        assert!(!compare(&[1.0], &[f32::INFINITY], Tolerance::F32).pass);
    }

    #[test]
    fn one_bad_element_in_a_million_fails() {
        let want = vec![1.0f32; 1 << 20];
        let mut got = want.clone();
        assert!(compare(&got, &want, Tolerance::BF16).pass);
        got[777_777] = 1.1;
        let result = compare(&got, &want, Tolerance::BF16);
        assert!(!result.pass && result.worst_index == 777_777);
    }

    #[test]
    fn many_small_errors_fail_by_rms() {
        let want = vec![1.0f32; 1000];
        let got = vec![1.0 + 1.2e-5; 1000];
        let result = compare(&got, &want, Tolerance::F32);
        assert!(result.worst <= 1.0 && !result.pass);
    }

    #[test]
    fn length_mismatch_fails() {
        assert!(!compare(&[1.0], &[1.0, 1.0], Tolerance::F32).pass);
    }

    #[test]
    fn directional_sees_a_wrong_gradient() {
        let at = [1.0, 2.0, 3.0];
        let loss = |x: &[f64]| x.iter().map(|v| v * v * v).sum::<f64>();
        let right: Vec<f64> = at.iter().map(|x| 3.0 * x * x).collect();
        let wrong: Vec<f64> = at.iter().map(|x| 2.0 * x * x).collect();
        assert!(directional("x", "case", &at, &right, loss).error < 1e-9);
        assert!(directional("x", "case", &at, &wrong, loss).error > 1e-2);
    }

    #[test]
    fn long_tensors_repeat_their_beginning() {
        let all = draw_f32("case", "x", DRAWN + 5, Fill::Normal);
        assert_eq!(all.len(), DRAWN + 5);
        assert_eq!(all[DRAWN..], all[..5]);
        assert_eq!(draw_f64("case", "x", 5, Fill::Normal).iter().map(|v| *v as f32).collect::<Vec<_>>(), all[..5]);
    }
}
