//! Standard normal numbers by counter: the streams of [`crate::rng`], which defines them bit by bit, as an operator.
//!
//! Number i needs no number before it, so any split of the work over threads, blocks or calls gives the same.

pub mod cpu;
pub mod launch;

/// The oracle: the definition, a number at a time.
pub mod reference {
    use crate::Real;
    use crate::generated::philox::Forward;
    use crate::rng::Philox;

    /// The numbers.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        for (at, z) in a.z.iter_mut().enumerate() {
            let (row, i) = ((at / a.dims.l) as u64, (at % a.dims.l) as u64);
            let stream = Philox::new(a.params.seed.wrapping_add(row), a.params.stream);
            let index = a.params.offset.wrapping_add(i);
            *z = T::from_f64(stream.normals(index / 4)[(index % 4) as usize].into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Tier;
    use crate::generated::philox::{CASES, Dims, Forward, Params};
    use crate::rng::Philox;

    fn draw(forward: fn(Forward<'_, f32>), params: Params, l: usize) -> Vec<u32> {
        draw_rows(forward, params, Dims { b: 1, l })
    }

    fn draw_rows(forward: fn(Forward<'_, f32>), params: Params, dims: Dims) -> Vec<u32> {
        let mut z = vec![f32::NAN; dims.b * dims.l];
        forward(Forward { dims, params, z: &mut z });
        z.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn a_row_is_that_of_its_own_key() {
        let params = |seed| Params { seed, stream: 6, offset: 2 };
        for forward in [reference::forward::<f32>, cpu::forward] {
            let rows = draw_rows(forward, params(u64::MAX - 1), Dims { b: 3, l: 9 });
            let alone = [u64::MAX - 1, u64::MAX, 0].map(|seed| draw(forward, params(seed), 9));
            assert_eq!(rows, alone.concat());
        }
    }

    #[test]
    fn first_numbers_by_hand() {
        // u = (6627e9, e169c5, bc57ad, 9b00db hexadecimal) / 2^24.
        let want = [0.991_137_6, -0.924_662_6, -0.617_609, -0.482_068_5];
        for forward in [reference::forward::<f32>, cpu::forward] {
            for (got, want) in draw(forward, Params { seed: 0, stream: 0, offset: 0 }, 4).into_iter().zip(want) {
                assert!((f32::from_bits(got) - want).abs() < 3e-7, "{} {want}", f32::from_bits(got));
            }
        }
    }

    #[test]
    fn any_offset_continues_the_stream() {
        let (seed, stream) = (9, (1 << 40) + 2);
        let mut whole = vec![0.0; 100_000];
        Philox::new(seed, stream).fill_normal(&mut whole);
        let whole: Vec<u32> = whole.into_iter().map(f32::to_bits).collect();
        for (start, len) in [(0, 100_000), (0, 3), (1, 1), (2, 50), (3, 4096), (7, 70_000), (99_999, 1)] {
            for forward in [reference::forward::<f32>, cpu::forward] {
                let part = draw(forward, Params { seed, stream, offset: start as u64 }, len);
                assert_eq!(part, whole[start..start + len], "{start} + {len}");
            }
        }
    }

    #[test]
    fn the_index_wraps() {
        let got = draw(cpu::forward, Params { seed: 1, stream: 0, offset: u64::MAX - 1 }, 6);
        let stream = Philox::new(1, 0);
        let (last, first) = (stream.normals(u64::MAX / 4), stream.normals(0));
        assert_eq!(got, [last[2], last[3], first[0], first[1], first[2], first[3]].map(f32::to_bits));
    }

    #[test]
    fn cpu_has_the_bits_of_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let [got, want] = [cpu::forward, reference::forward].map(|f| draw_rows(f, case.params, case.dims));
            assert_eq!(got, want, "{}", case.name);
        }
    }
}
