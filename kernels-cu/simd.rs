//! Vector building blocks of the CPU paths.
//!
//! Functions are plain Rust over slices, written in lanes of [`LANES`] so that the compiler vectorises them without
//! reordering sums, and instantiated for the processor's best instruction set by [`vectorised`].

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::__m128;

/// Independent accumulators of a reduction: one AVX-512 register of f32, two AVX2 ones.
pub const LANES: usize = 16;

/// Half of them.
const HALF: usize = LANES / 2;

/// Runs `body` compiled for the best instruction set of this processor (AVX-512, AVX2+FMA, or the baseline).
///
/// `body` and what it calls must be `#[inline(always)]` to be compiled along.
#[inline(always)]
pub fn vectorised<R>(body: impl FnOnce() -> R) -> R {
    struct Body<F>(F);
    impl<R, F: FnOnce() -> R> pulp::WithSimd for Body<F> {
        type Output = R;
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, simd: S) -> R {
            simd.vectorize(
                #[inline(always)]
                || (self.0)(),
            )
        }
    }
    arch().dispatch(Body(body))
}

/// The instruction set of this processor, detected once.
pub fn arch() -> pulp::Arch {
    static ARCH: std::sync::OnceLock<pulp::Arch> = std::sync::OnceLock::new();
    *ARCH.get_or_init(pulp::Arch::new)
}

/// Σ f(i) over `0..len` in [`LANES`] partial sums.
#[inline(always)]
pub fn sum_by(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut acc = [0.0f32; LANES];
    let whole = len / LANES * LANES;
    let mut i = 0;
    while i < whole {
        for lane in 0..LANES {
            acc[lane] += f(i + lane);
        }
        i += LANES;
    }
    let mut total = 0.0;
    for j in whole..len {
        total += f(j);
    }
    reduce(acc) + total
}

/// Σ f(x, y) over two slices of one length: [`sum_by`] without a check of every index, which vectorises.
#[inline(always)]
pub fn sum_pairs(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y[..x.len()].as_chunks::<LANES>());
    let mut acc = [0.0f32; LANES];
    for (x, y) in x.iter().zip(y) {
        for lane in 0..LANES {
            acc[lane] += f(x[lane], y[lane]);
        }
    }
    // Half a vector of what is left goes to the front lanes.
    let ((x_half, x_rest), (y_half, y_rest)) = (x_rest.as_chunks::<HALF>(), y_rest.as_chunks::<HALF>());
    if let (Some(x), Some(y)) = (x_half.first(), y_half.first()) {
        for lane in 0..HALF {
            acc[lane] += f(x[lane], y[lane]);
        }
    }
    let mut total = 0.0;
    for (x, y) in x_rest.iter().zip(y_rest) {
        total += f(*x, *y);
    }
    reduce(acc) + total
}

/// Σ f(x) over a slice: as [`sum_pairs`].
#[inline(always)]
pub fn sum_each(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    sum_pairs(x, x, |x, _| f(x))
}

/// Pairwise sum of the lanes: the same order on every machine.
#[inline(always)]
pub fn reduce(mut acc: [f32; LANES]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if let pulp::x86::Arch::V4(simd) = arch() {
        return fold(simd, acc, |low, high| simd.sse._mm_add_ps(low, high));
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            acc[i] += acc[i + half];
        }
        half /= 2;
    }
    acc[0]
}

/// Largest lane, or one of the others where some are NaN.
#[inline(always)]
pub fn largest(mut lanes: [f32; LANES]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if let pulp::x86::Arch::V4(simd) = arch() {
        return fold(simd, lanes, |low, high| simd.sse._mm_max_ps(high, low));
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = if lanes[i + half] > lanes[i] { lanes[i + half] } else { lanes[i] };
        }
        half /= 2;
    }
    lanes[0]
}

/// Folds the lanes pairwise, in the order of the loops of [`reduce`]: compilers make single lanes of those.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fold(simd: pulp::x86::V4, lanes: [f32; LANES], op: impl Fn(__m128, __m128) -> __m128) -> f32 {
    let [a, b, c, d]: [__m128; 4] = bytemuck::cast(lanes);
    let four = op(op(a, c), op(b, d));
    let two = op(four, simd.sse._mm_movehl_ps(four, four));
    simd.sse._mm_cvtss_f32(op(two, simd.sse3._mm_movehdup_ps(two)))
}

/// e^x to about 1 ulp·2 over the range where the result is a normal f32; 0 below, +∞ above; NaN stays NaN.
///
/// Cody–Waite reduction x = k·ln 2 + r, |r| ≤ ln 2 / 2, and a degree-6 polynomial in r.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Adding 1.5·2²³ rounds to an integer kept in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.336_54, 88.722_83);
    let shifted = clamped.mul_add(LOG2_E, ROUND);
    let k = shifted - ROUND;
    let r = k.mul_add(-LN2_LO, k.mul_add(-LN2_HI, clamped));
    let mut p = 1.388_889e-3f32;
    p = p.mul_add(r, 8.333_334e-3);
    p = p.mul_add(r, 4.166_666_8e-2);
    p = p.mul_add(r, 1.666_666_7e-1);
    p = p.mul_add(r, 0.5);
    p = p.mul_add(r, 1.0);
    p = p.mul_add(r, 1.0);
    // Two factors so that k = 128 does not overflow the exponent field.
    let k = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = k >> 1;
    let pow2 = |e: i32| f32::from_bits(((e + 127) as u32) << 23);
    let y = p * pow2(half) * pow2(k - half);
    let y = if x < -87.336_54 { 0.0 } else { y };
    let y = if x > 88.722_83 { f32::INFINITY } else { y };
    if x.is_nan() { x } else { y }
}

/// e^x for x ≤ 0, to the accuracy of [`exp`] at less cost; below −87.3 the smallest normal f32 instead of 0; for
/// x > 0 good up to 88; NaN stays NaN. For softmax, where x is a score less the largest one.
#[inline(always)]
pub fn exp_decay(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -87.336_54 { -87.336_54 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let k = shifted - ROUND;
    let r = k.mul_add(2.121_944_4e-4, k.mul_add(-0.693_359_4, x));
    let mut p = 1.388_889e-3f32;
    p = p.mul_add(r, 8.333_334e-3);
    p = p.mul_add(r, 4.166_666_8e-2);
    p = p.mul_add(r, 1.666_666_7e-1);
    p = p.mul_add(r, 0.5);
    p = p.mul_add(r, 1.0);
    p = p.mul_add(r, 1.0);
    // k sits in the low mantissa bits, and −126 ≤ k: with the bias added and shifted up it is the power of two.
    p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// e^x for x ≤ 0, 1 at 0, as the weight of a score that lies x above the largest: relative error below 2e-7 near 0 and
/// 2e-8·|x| beyond, which is nothing beside the weight 1 of the largest. Cheaper than [`exp_decay`]; otherwise alike.
#[inline(always)]
pub fn exp_weight(x: f32) -> f32 {
    // Rounds to an integer in the low mantissa bits, with the bias of an exponent on top.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    let x = if x < -87.336_54 { -87.336_54 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let r = x.mul_add(std::f32::consts::LOG2_E, ROUND - shifted);
    // 2^r, 1 at 0: the sixth to ninth terms of the series economised over |r| ≤ 1/2, which leaves 1e-7.
    let mut p = 1.340_028_9e-3f32;
    p = p.mul_add(r, 9.671_87e-3);
    p = p.mul_add(r, 5.550_327_5e-2);
    p = p.mul_add(r, 2.402_223_5e-1);
    p = p.mul_add(r, 6.931_472e-1);
    p = p.mul_add(r, 1.0);
    p * f32::from_bits(shifted.to_bits() << 23)
}

/// ln x of a normal x, NaN and +∞ as they are; relative error below 3e-7, 0 at 1.
///
/// x = 2^k·m with m about 1, and ln m = 2·artanh(s), s = (m − 1)/(m + 1), |s| < 0.172: five terms of the series leave
/// 1e-9.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    // The bits of √½: what is added to the exponent by the rest of the mantissa makes m lie between √½ and √2.
    const LEAST: u32 = 0x3f35_04f3;
    let above = x.to_bits().wrapping_sub(LEAST);
    let k = (above as i32 >> 23) as f32;
    let m = f32::from_bits((above & 0x007f_ffff) + LEAST);
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let mut p = 2.0 / 9.0f32;
    for c in [2.0 / 7.0f32, 2.0 / 5.0, 2.0 / 3.0, 2.0] {
        p = p.mul_add(z, c);
    }
    let ln = k.mul_add(std::f32::consts::LN_2, p * s);
    if x < f32::INFINITY { ln } else { x }
}

/// tanh x = 1 − 2/(e^{2x} + 1); absolute error below 2e-7.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// 1 / (1 + e^{−x}); 0 where that is below the smallest normal f32; NaN stays NaN.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    // What `exp_decay` is good for; there is no need of the infinity that `exp` gives above it.
    const MOST: f32 = 87.336_54;
    let decay = exp_decay(if -x > MOST { MOST } else { -x });
    if x < -MOST { 0.0 } else { 1.0 / (1.0 + decay) }
}

/// sin x and cos x; absolute error below 2e-7 up to |x| = 1e8, NaN where x is not finite.
#[inline(always)]
pub fn sin_cos(x: f32) -> (f32, f32) {
    // x = kπ + r with |r| ≤ π/2, in f64, so that no digits are lost to the product.
    let wide = f64::from(x);
    let k = (wide * std::f64::consts::FRAC_1_PI).round_ties_even();
    let r = k.mul_add(-std::f64::consts::PI, wide) as f32;
    let odd = (k - 2.0 * (0.5 * k).floor()) as f32;
    let (sign, square) = (1.0 - 2.0 * odd, r * r);
    // Taylor's series: the first terms left out are below 6e-8 and 7e-9.
    let mut sin = -1.0 / 39_916_800.0f32;
    for c in [1.0 / 362_880.0f32, -1.0 / 5040.0, 1.0 / 120.0, -1.0 / 6.0, 1.0] {
        sin = sin.mul_add(square, c);
    }
    let mut cos = 1.0 / 479_001_600.0f32;
    for c in [-1.0 / 3_628_800.0f32, 1.0 / 40_320.0, -1.0 / 720.0, 1.0 / 24.0, -0.5, 1.0] {
        cos = cos.mul_add(square, c);
    }
    (sign * sin * r, sign * cos)
}

/// sin x and cos x as f64 rounds them but for few: the error before rounding is below 1e-11 up to
/// |x| = 1e4, and below 1e-8 up to 1e8. NaN where x is not finite.
#[inline(always)]
pub fn sin_cos_exact(x: f32) -> (f32, f32) {
    let wide = f64::from(x);
    let k = (wide * std::f64::consts::FRAC_1_PI).round_ties_even();
    let r = k.mul_add(-std::f64::consts::PI, wide);
    let (sign, square) = (1.0 - 2.0 * (k - 2.0 * (0.5 * k).floor()), r * r);
    // Taylor's series to r^15 and r^16: on |r| ≤ π/2 the first terms left out are below 7e-12 and 6e-13.
    let mut sin = -1.0 / 1_307_674_368_000.0f64;
    for c in
        [1.0 / 6_227_020_800.0f64, -1.0 / 39_916_800.0, 1.0 / 362_880.0, -1.0 / 5040.0, 1.0 / 120.0, -1.0 / 6.0, 1.0]
    {
        sin = sin.mul_add(square, c);
    }
    let mut cos = 1.0 / 20_922_789_888_000.0f64;
    for c in [
        -1.0 / 87_178_291_200.0f64,
        1.0 / 479_001_600.0,
        -1.0 / 3_628_800.0,
        1.0 / 40_320.0,
        -1.0 / 720.0,
        1.0 / 24.0,
        -0.5,
        1.0,
    ] {
        cos = cos.mul_add(square, c);
    }
    ((sign * sin * r) as f32, (sign * cos) as f32)
}

/// e^x − 1 without cancellation near zero; relative error below 3e-7.
#[inline(always)]
pub fn exp_m1(x: f32) -> f32 {
    // Taylor's series, whose ninth term is below 1e-8 of the first on |x| ≤ 1/2.
    let mut p = 1.0 / 40_320.0f32;
    for c in [1.0 / 5040.0f32, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0] {
        p = p.mul_add(x, c);
    }
    let far = exp(x) - 1.0;
    if x.abs() <= 0.5 { p * x } else { far }
}

/// ln(1 + e^x), relative error below 5e-7.
///
/// max(x, 0) + ln(1 + u) with u = e^−|x| ≤ 1, where ln(1 + u) = 2·artanh(s), s = u/(2 + u) ≤ 1/3: nine terms of the
/// series leave 3e-10.
#[inline(always)]
pub fn softplus(x: f32) -> f32 {
    let u = exp(-x.abs());
    let s = u / (2.0 + u);
    let z = s * s;
    let mut p = 1.0 / 17.0f32;
    for c in [1.0 / 15.0f32, 1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0] {
        p = p.mul_add(z, c);
    }
    // `max` would swallow a NaN.
    let positive = if x < 0.0 { 0.0 } else { x };
    (2.0 * s).mul_add(p, positive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_and_total() {
        let mut worst = 0.0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - want).abs() / want);
        }
        assert!(worst < 3e-7, "relative error {worst:e}");
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(1000.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn sigmoid_is_accurate_and_total() {
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let want = 1.0 / (1.0 + f64::from(-x).exp());
            assert!((f64::from(sigmoid(x)) - want).abs() <= 4e-7 * want, "sigmoid {x}");
        }
        assert_eq!([f32::NEG_INFINITY, -1e30, 0.0, 1e30, f32::INFINITY].map(sigmoid), [0.0, 0.0, 0.5, 1.0, 1.0]);
        assert!(sigmoid(f32::NAN).is_nan());
    }

    #[test]
    fn exp_m1_is_accurate() {
        for i in -1_000_000..1_000_000 {
            let x = i as f32 * 1e-6;
            let want = f64::from(x).exp_m1();
            assert!((f64::from(exp_m1(x)) - want).abs() <= 3e-7 * want.abs(), "exp_m1 {x}");
        }
        assert_eq!((exp_m1(0.0), exp_m1(-200.0)), (0.0, -1.0));
    }

    #[test]
    fn softplus_is_accurate_and_total() {
        for i in -850_000..850_000 {
            let x = i as f32 * 1e-4;
            let wide = f64::from(x);
            let want = wide.max(0.0) + (-wide.abs()).exp().ln_1p();
            assert!((f64::from(softplus(x)) - want).abs() < 5e-7 * want, "{x}");
        }
        assert_eq!((softplus(-1000.0), softplus(1000.0)), (0.0, 1000.0));
        assert!(softplus(f32::NAN).is_nan());
    }

    #[test]
    fn exp_decay_is_accurate_below_zero() {
        for i in -873_000..1000 {
            let x = i as f32 * 1e-4;
            let want = f64::from(x).exp();
            assert!((f64::from(exp_decay(x)) - want).abs() < 3e-7 * want, "{x}");
        }
        assert!(exp_decay(f32::NEG_INFINITY) < 1.2e-38);
        assert!(exp_decay(f32::NAN).is_nan());
        assert_eq!(exp_decay(0.0), 1.0);
    }

    #[test]
    fn exp_weight_is_accurate_below_zero() {
        for i in -873_000..1000 {
            let x = i as f32 * 1e-4;
            let want = f64::from(x).exp();
            let bound = 2.5e-7 + 2e-8 * f64::from(x.abs());
            assert!((f64::from(exp_weight(x)) - want).abs() < bound * want, "{x}");
        }
        assert!(exp_weight(f32::NEG_INFINITY) < 1.2e-38);
        assert!(exp_weight(f32::NAN).is_nan() && exp_weight(f32::from_bits(0x7fc0_1234)).is_nan());
        assert_eq!(exp_weight(0.0), 1.0);
    }

    #[test]
    fn ln_is_accurate() {
        let mut worst = 0.0f64;
        for i in 1..1_000_000 {
            for x in [i as f32 * 1e-5, 1.0 + i as f32 * 1e-3, 1.0 + i as f32 * 1.2e-7] {
                let want = f64::from(x).ln();
                worst = worst.max((f64::from(ln(x)) - want).abs() / want.abs().max(1e-30));
            }
        }
        assert!(worst < 3e-7, "relative error {worst:e}");
        assert_eq!((ln(1.0), ln(f32::INFINITY)), (0.0, f32::INFINITY));
        assert!(ln(f32::NAN).is_nan());
    }

    #[test]
    fn sin_cos_is_accurate() {
        for x in (-400_000..400_000).map(|i| i as f32 * 1e-3).chain([1e5, -3.7e6, 9.9e7]) {
            let ((sin, cos), (want_sin, want_cos)) = (sin_cos(x), f64::from(x).sin_cos());
            assert!((f64::from(sin) - want_sin).abs() < 2e-7, "sin {x}");
            assert!((f64::from(cos) - want_cos).abs() < 2e-7, "cos {x}");
        }
        assert_eq!(sin_cos(0.0), (0.0, 1.0));
        assert!(sin_cos(f32::INFINITY).0.is_nan() && sin_cos(f32::NAN).1.is_nan());
    }

    #[test]
    fn sin_cos_exact_rounds_as_f64_does() {
        let mut apart = 0;
        for x in (-400_000..400_000).map(|i| i as f32 * 2.5e-3).chain([1e5, -3.7e6, 9.9e7]) {
            let ((sin, cos), (want_sin, want_cos)) = (sin_cos_exact(x), f64::from(x).sin_cos());
            // Half a unit in the last place below 1, and the error before rounding.
            let bound = if x.abs() < 1e4 { 2.99e-8 } else { 4e-8 };
            assert!((f64::from(sin) - want_sin).abs() < bound, "sin {x}");
            assert!((f64::from(cos) - want_cos).abs() < bound, "cos {x}");
            apart += usize::from(sin != want_sin as f32) + usize::from(cos != want_cos as f32);
        }
        assert!(apart < 2000, "{apart} of 1.6 million apart");
        assert_eq!(sin_cos_exact(0.0), (0.0, 1.0));
        assert!(sin_cos_exact(f32::INFINITY).0.is_nan() && sin_cos_exact(f32::NAN).1.is_nan());
    }

    #[test]
    fn tanh_saturates() {
        assert_eq!(tanh(50.0), 1.0);
        assert_eq!(tanh(-50.0), -1.0);
        for i in -100..=100 {
            let x = i as f32 * 0.1;
            assert!((f64::from(tanh(x)) - f64::from(x).tanh()).abs() < 3e-7);
        }
    }

    #[test]
    fn sums_agree_with_plain_loops() {
        for len in [0, 1, 15, 16, 17, 100] {
            let sum = vectorised(|| sum_by(len, |i| i as f32));
            assert_eq!(sum, (0..len).sum::<usize>() as f32);
            let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(vectorised(|| sum_each(&x, |x| x)), sum);
            assert_eq!(vectorised(|| sum_pairs(&x, &x, |x, y| x + y)), 2.0 * sum);
        }
        for place in 0..LANES {
            let lanes: [f32; LANES] = std::array::from_fn(|lane| if lane == place { 3.0 } else { -(lane as f32) });
            assert_eq!(vectorised(|| largest(lanes)), 3.0);
            assert_eq!(vectorised(|| reduce(lanes)), 3.0 + place as f32 - 120.0);
        }
    }
}
