//! Random numbers that are the same everywhere: Philox4x32-10 and exactly specified transforms of its words.
//!
//! Philox (Salmon et al., SC'11, "Parallel random numbers: as easy as 1, 2, 3") maps a 128-bit counter and a 64-bit key
//! to four 32-bit words, so any element of any stream can be computed on its own, on any device.
//! Key = seed (low word first); counter = (block low, block high, stream low, stream high).
//!
//! # Standard normals, bit by bit
//! Element i of a stream is number i mod 4 of block i / 4. Words (a, b) give numbers 0 and 1, words (c, d) 2 and 3:
//! with p = 2·(a >> 9) + 1 and q = 2·(b >> 9) + 1 (odd, below 2^24, so both are exact in f32), u = p·2^-24 and
//! w = q·2^-24, the pair is √(-2 ln u)·cos 2πw, √(-2 ln u)·sin 2πw. Hence |z| ≤ √(48 ln 2) = 5.768.
//! Every operation is an f32 add, subtract, multiply, divide or square root, rounded to nearest even and never
//! contracted into a fused multiply-add; `ln_unit` and `cos_sin_turn` below state them in order. A port that performs
//! the same operations (`__fadd_rn`, `__fmul_rn`, `__fdiv_rn`, `__fsqrt_rn` in CUDA) gives the same bits.
//!
//! The operator `philox` computes the same numbers in vector lanes, from the functions below.
//!
//! # Conventions
//! Image i of a request uses seed + i (wrapping), whatever the batch. Stream 0 is its initial latent, stream 1 + s the
//! noise of sampler step s.

/// Philox4x32 with ten rounds: four random words from a counter and a key, least significant word first.
#[inline(always)]
pub const fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let mut round = 0;
    while round < 10 {
        let (a, b) = (0xD251_1F53 * counter[0] as u64, 0xCD9E_8D57 * counter[2] as u64);
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        round += 1;
    }
    counter
}

/// Stream of an image's initial latent.
pub const LATENT_STREAM: u64 = 0;

/// Stream of the noise that sampler step `step` adds.
pub const fn step_stream(step: u64) -> u64 {
    step + 1
}

/// Seed of image `index` of a request.
pub const fn image_seed(seed: u64, index: u64) -> u64 {
    seed.wrapping_add(index)
}

/// One stream of random words: random access by block, and a cursor for drawing in order.
#[derive(Clone, Debug)]
pub struct Philox {
    key: [u32; 2],
    stream: [u32; 2],
    next_block: u64,
    words: [u32; 4],
    used: usize,
}

impl Philox {
    /// The given stream of a seed, with the cursor at its start.
    pub const fn new(seed: u64, stream: u64) -> Self {
        Philox { key: halves(seed), stream: halves(stream), next_block: 0, words: [0; 4], used: 4 }
    }

    /// Words of block `index`; independent of the cursor.
    #[inline(always)]
    pub const fn block(&self, index: u64) -> [u32; 4] {
        let [lo, hi] = halves(index);
        philox4x32_10([lo, hi, self.stream[0], self.stream[1]], self.key)
    }

    /// Standard normals 4·index .. 4·index + 4 of the stream; independent of the cursor.
    pub fn normals(&self, index: u64) -> [f32; 4] {
        let [a, b, c, d] = self.block(index);
        let ([x, y], [z, w]) = (box_muller(a, b), box_muller(c, d));
        [x, y, z, w]
    }

    /// Fills `out` with standard normals 0, 1, 2, … of the stream; independent of the cursor.
    pub fn fill_normal(&self, out: &mut [f32]) {
        for (index, chunk) in out.chunks_mut(4).enumerate() {
            chunk.copy_from_slice(&self.normals(index as u64)[..chunk.len()]);
        }
    }

    /// The next word of the stream.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.words = self.block(self.next_block);
            self.next_block = self.next_block.wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// The next uniform number in (0, 1): (2·(word >> 9) + 1)·2^-24, exact, never 0 or 1.
    pub fn uniform(&mut self) -> f32 {
        unit(self.next_u32())
    }

    /// A uniform integer in `0..n`, without bias; 0 when `n` is 0.
    ///
    /// The high half of word·n is the answer; words whose low half falls below 2^32 mod n are drawn again, which
    /// leaves every answer the same number of words (Lemire, arXiv 1805.10941).
    pub fn below(&mut self, n: u32) -> u32 {
        loop {
            let product = u64::from(self.next_u32()) * u64::from(n);
            let low = product as u32;
            // 2^32 mod n, needed only for the few words below n.
            if low >= n || low >= n.wrapping_neg().checked_rem(n).unwrap_or(0) {
                return (product >> 32) as u32;
            }
        }
    }

    /// Shuffles uniformly (Fisher-Yates from the last element down). Reaches at most 2^32 elements: beyond that the
    /// choice of a partner is limited to the first 2^32.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let choices = u32::try_from(last + 1).unwrap_or(u32::MAX);
            items.swap(last, self.below(choices) as usize);
        }
    }
}

#[inline(always)]
const fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// (2·(word >> 9) + 1)·2^-24: odd multiples of 2^-24 in (0, 1), all exact.
#[inline(always)]
fn unit(word: u32) -> f32 {
    odd(word) as f32 * (1.0 / 16_777_216.0)
}

#[inline(always)]
fn odd(word: u32) -> u32 {
    2 * (word >> 9) + 1
}

/// Two independent standard normals from two words.
#[inline(always)]
pub(crate) fn box_muller(a: u32, b: u32) -> [f32; 2] {
    let radius = (-2.0 * ln_unit(unit(a))).sqrt();
    let (cos, sin) = cos_sin_turn(odd(b));
    [radius * cos, radius * sin]
}

/// Natural logarithm of a normal f32 in (0, 1), within 2 units in the last place or 1.2e-7 relative.
///
/// u = m·2^e with m in [√½, √2), s = (m-1)/(m+1), ln u = e·ln 2 + 2s(1 + s²/3 + s⁴/5 + s⁶/7 + s⁸/9).
#[inline(always)]
fn ln_unit(u: f32) -> f32 {
    // Subtracting the bits of √½ makes the exponent field round to the power of two nearest in ratio.
    let shifted = u.to_bits().wrapping_sub(0x3F35_04F3);
    let exponent = (shifted as i32) >> 23;
    let m = f32::from_bits((shifted & 0x007F_FFFF) + 0x3F35_04F3);
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let series = (((z * (1.0 / 9.0) + (1.0 / 7.0)) * z + 0.2) * z + (1.0 / 3.0)) * z;
    let twice = s + s;
    exponent as f32 * std::f32::consts::LN_2 + (twice + twice * series)
}

/// Cosine and sine of 2π·q·2^-24 for q < 2^24.
///
/// The nearest quarter turn comes off exactly, in integers; the rest x lies in ±π/4, where Taylor polynomials of degree
/// 10 and 9 are exact to f32 rounding.
#[inline(always)]
fn cos_sin_turn(q: u32) -> (f32, f32) {
    let quarter = (q + (1 << 21)) >> 22;
    let rest = q as i32 - (quarter << 22) as i32;
    let x = rest as f32 * (std::f32::consts::TAU / 16_777_216.0);
    let z = x * x;
    let sin_series = (((z * (1.0 / 362_880.0) - (1.0 / 5040.0)) * z + (1.0 / 120.0)) * z - (1.0 / 6.0)) * z;
    let sin = x + x * sin_series;
    let cos_series = (((z * (-1.0 / 3_628_800.0) + (1.0 / 40_320.0)) * z - (1.0 / 720.0)) * z + (1.0 / 24.0)) * z;
    let cos = 1.0 + (cos_series - 0.5) * z;
    // Odd quarters swap the two; the signs come on as bits, so that lanes need no branch.
    let (c, s) = if quarter & 1 == 0 { (cos, sin) } else { (sin, cos) };
    let negative = |turned: u32| (turned & 2) << 30;
    (f32::from_bits(c.to_bits() ^ negative(quarter + 1)), f32::from_bits(s.to_bits() ^ negative(quarter)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Published known answers of Random123.
    #[test]
    fn known_answers() {
        for (counter, key, want) in [
            ([0; 4], [0; 2], [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]),
            (
                [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
                [0xa4093822, 0x299f31d0],
                [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
            ),
        ] {
            assert_eq!(philox4x32_10(counter, key), want);
        }
        let rng = Philox::new(0x299f31d0_a4093822, 0x03707344_13198a2e);
        assert_eq!(rng.block(0x85a308d3_243f6a88), [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
    }

    #[test]
    fn cursor_walks_the_blocks() {
        let mut rng = Philox::new(7, 3);
        let words: Vec<u32> = (0..10).map(|_| rng.next_u32()).collect();
        let blocks: Vec<u32> = (0..3).flat_map(|i| rng.block(i)).take(10).collect();
        assert_eq!(words, blocks);
        assert_ne!(Philox::new(7, 4).block(0), rng.block(0));
        assert_ne!(Philox::new(8, 3).block(0), rng.block(0));
        assert_eq!((image_seed(u64::MAX, 2), step_stream(0)), (1, 1));
    }

    /// Against f64 library functions, over random words and the extremes.
    #[test]
    fn normals_are_accurate() {
        let rng = Philox::new(1, 0);
        let extremes =
            [[0, 0], [u32::MAX, u32::MAX], [0, u32::MAX], [u32::MAX, 0], [1 << 31, 1 << 31], [1 << 31, 1 << 30]];
        let random = (0..50_000).map(|i| rng.block(i)).map(|w| [w[0], w[1]]);
        for [a, b] in extremes.into_iter().chain(random) {
            let (u, w) = (f64::from(odd(a)) / 2f64.powi(24), f64::from(odd(b)) / 2f64.powi(24));
            let (radius, angle) = ((-2.0 * u.ln()).sqrt(), std::f64::consts::TAU * w);
            let got = box_muller(a, b);
            for (got, want) in got.into_iter().zip([radius * angle.cos(), radius * angle.sin()]) {
                let error = (f64::from(got) - want).abs();
                assert!(error <= 4e-7 * radius.max(1e-3), "{a:x} {b:x}: {got} {want}");
            }
            assert!((f64::from(ln_unit(u as f32)) / u.ln() - 1.0).abs() < 2.5e-7, "{u}");
        }
    }

    /// Against an independent program that rounds every operation by hand: the bits are part of the contract.
    #[test]
    fn normals_are_exact_to_the_bit() {
        for (seed, stream, index, want) in [
            (0, 0, 0, [0x3f7dbb2f, 0xbf6cb6b3, 0xbf1e1ba1, 0xbef6d1a9]),
            (42, 0, 0, [0xbf785e59, 0x3e46acec, 0xbf9e28cd, 0x3ff6433e]),
            (42, 1, 12345, [0xbe86032f, 0xc012de97, 0xbd2c0339, 0xbfd32d78]),
        ] {
            assert_eq!(Philox::new(seed, stream).normals(index).map(f32::to_bits), want);
        }
        let mut z = vec![0.0; 20_000];
        Philox::new(2026, 0).fill_normal(&mut z);
        let digest = z.iter().fold(0u64, |d, x| d.wrapping_mul(1_000_003).wrapping_add(x.to_bits().into()));
        assert_eq!(digest, 0x8f2b_6225_fd6d_18af);
    }

    #[test]
    fn normals_have_the_right_moments() {
        let mut z = vec![0.0f32; 400_001];
        Philox::new(42, 0).fill_normal(&mut z);
        let mean = |f: &dyn Fn(f64) -> f64| z.iter().map(|&x| f(f64::from(x))).sum::<f64>() / z.len() as f64;
        // Six standard errors each.
        for (power, want, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
            let error: f64 = mean(&|x| x.powi(power)) - want;
            assert!(error.abs() < 6.0 * f64::sqrt(variance / z.len() as f64), "{power}: {error}");
        }
        assert!((mean(&|x| f64::from(x.abs() < 1.0)) - 0.682689).abs() < 0.0045);
        let neighbours: f64 = z.windows(2).map(|w| f64::from(w[0]) * f64::from(w[1])).sum::<f64>() / z.len() as f64;
        assert!(neighbours.abs() < 0.01, "{neighbours}");
        assert!(z.iter().all(|x| x.abs() <= 5.7682));
    }

    #[test]
    fn fill_is_addressed_by_element() {
        let rng = Philox::new(5, 9);
        let mut z = [0.0; 7];
        rng.fill_normal(&mut z);
        assert_eq!(z[..4], rng.normals(0));
        assert_eq!(z[4..], rng.normals(1)[..3]);
    }

    #[test]
    fn uniform_numbers_stay_inside() {
        assert_eq!((unit(0), unit(u32::MAX)), (2f32.powi(-24), 1.0 - 2f32.powi(-24)));
        let mut rng = Philox::new(0, 0);
        assert_eq!(rng.uniform(), (2 * (0x6627e8d5u32 >> 9) + 1) as f32 / 16_777_216.0);
    }

    #[test]
    fn integers_are_unbiased() {
        let mut rng = Philox::new(3, 0);
        let mut counts = [0u32; 6];
        for _ in 0..60_000 {
            counts[rng.below(6) as usize] += 1;
        }
        assert!(counts.iter().all(|&c| c.abs_diff(10_000) < 550), "{counts:?}");
        // Scaling without redrawing would give multiples of 3 two words and all others one: a half instead of a third.
        let multiples = (0..60_000).filter(|_| rng.below(3 << 30).is_multiple_of(3)).count();
        assert!(multiples.abs_diff(20_000) < 700, "{multiples}");
        assert_eq!((rng.below(1), rng.below(0)), (0, 0));
    }

    #[test]
    fn shuffle_is_a_uniform_permutation() {
        let mut rng = Philox::new(11, 0);
        let mut seen = std::collections::BTreeMap::new();
        for _ in 0..24_000 {
            let mut items = [0, 1, 2, 3];
            rng.shuffle(&mut items);
            *seen.entry(items).or_insert(0u32) += 1;
        }
        assert_eq!(seen.len(), 24);
        assert!(seen.values().all(|&c| c.abs_diff(1000) < 190), "{seen:?}");
    }
}
