//! Standard normal numbers by counter: see `op.toml` for the definition.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11) is a keyed bijection of 128-bit
//! counters: number i needs no number before it, so any split of the work over threads, blocks or calls gives the same.

pub mod cpu;

use crate::generated::philox::Params;

/// Four random words of a counter under a key: ten rounds.
#[inline(always)]
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let wide = |a: u32, b: u32| {
        let product = u64::from(a) * u64::from(b);
        ((product >> 32) as u32, product as u32)
    };
    for _ in 0..10 {
        let ((hi0, lo0), (hi1, lo1)) = (wide(0xD251_1F53, counter[0]), wide(0xCD9E_8D57, counter[2]));
        counter = [hi1 ^ counter[1] ^ key[0], lo1, hi0 ^ counter[3] ^ key[1], lo0];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// The words of one block of four numbers.
#[inline(always)]
pub(crate) fn words(p: Params, block: u64) -> [u32; 4] {
    let [(b0, b1), (s0, s1), (k0, k1)] = [block, p.stream, p.seed].map(|v| (v as u32, (v >> 32) as u32));
    philox4x32_10([b0, b1, s0, s1], [k0, k1])
}

/// Uniform in (0, 1] from the upper 24 bits of a word, in f32.
#[inline(always)]
pub(crate) fn uniform(word: u32) -> f32 {
    ((word >> 8) as f32 + 0.5) * (1.0 / 16_777_216.0)
}

/// The oracle: Box–Muller in f64 of the f32 uniforms.
pub mod reference {
    use super::{uniform, words};
    use crate::Real;
    use crate::generated::philox::Forward;
    use std::f64::consts::TAU;

    /// The numbers.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        for i in 0..a.dims.l {
            let index = a.params.offset.wrapping_add(i as u64);
            let u = words(a.params, index / 4).map(|word| f64::from(uniform(word)));
            let pair = if index % 4 < 2 { [u[0], u[1]] } else { [u[2], u[3]] };
            let (radius, angle) = ((-2.0 * pair[0].ln()).sqrt(), TAU * pair[1]);
            a.z[i] = T::from_f64(radius * if index.is_multiple_of(2) { angle.cos() } else { angle.sin() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, philox4x32_10, reference};
    use crate::Tier;
    use crate::check::{Tolerance, assert_close};
    use crate::generated::philox::{CASES, Dims, Forward, Params};

    #[test]
    fn known_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, want) in cases {
            assert_eq!(philox4x32_10(counter, key), want);
        }
    }

    fn draw(forward: fn(Forward<'_, f32>), params: Params, l: usize) -> Vec<f32> {
        let mut z = vec![f32::NAN; l];
        forward(Forward { dims: Dims { l }, params, z: &mut z });
        z
    }

    #[test]
    fn first_numbers_by_hand() {
        // u = (6627e8.8, e169c5.8, bc57ac.8, 9b00db.8 hexadecimal) / 2^24.
        let want = [0.991_137_7, -0.924_662_6, -0.617_609, -0.482_068_5];
        for forward in [reference::forward::<f32>, cpu::forward] {
            let got = draw(forward, Params { seed: 0, stream: 0, offset: 0 }, 4);
            assert_close("first block", &got, &want, Tolerance::F32);
        }
    }

    #[test]
    fn any_split_gives_the_same_numbers() {
        let params = Params { seed: 9, stream: 2, offset: 1 };
        let whole = draw(cpu::forward, params, 100_000);
        for (start, len) in [(0, 3), (1, 1), (2, 50), (7, 70_000), (99_999, 1)] {
            let part = draw(cpu::forward, Params { offset: 1 + start as u64, ..params }, len);
            assert_eq!(part, whole[start..start + len], "{start} + {len}");
        }
    }

    #[test]
    fn moments_of_a_normal() {
        let z = draw(cpu::forward, Params { seed: 3, stream: 0, offset: 0 }, 1 << 20);
        let moment = |k: i32| z.iter().map(|z| f64::from(*z).powi(k)).sum::<f64>() / z.len() as f64;
        // Five standard errors of each: 1, sqrt 2, sqrt 15, sqrt 96 over 2^10.
        for (k, want, bound) in [(1, 0.0, 5e-3), (2, 1.0, 7e-3), (3, 0.0, 2e-2), (4, 3.0, 5e-2)] {
            assert!((moment(k) - want).abs() < bound, "moment {k}: {}", moment(k));
        }
    }

    #[test]
    fn cpu_agrees_with_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let got = draw(cpu::forward, case.params, case.dims.l);
            let want = draw(reference::forward, case.params, case.dims.l);
            assert_close(case.name, &got, &want, Tolerance::F32);
        }
    }
}
