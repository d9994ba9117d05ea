//! Sum of squares in f64: see `op.toml`.

pub mod cpu;
pub mod launch;

/// The oracle.
pub mod reference {
    use crate::Real;
    use crate::generated::sum_squares::Forward;

    /// The sum.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        a.out[0] = T::from_f64(a.x.iter().map(|x| x.f64() * x.f64()).sum());
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Tier;
    use crate::check::{Fill, Tolerance, assert_close, draw_f32};
    use crate::generated::sum_squares::{CASES, Dims, Forward, Params};

    fn sum(forward: fn(Forward<'_, f32>), x: &[f32]) -> f32 {
        let mut out = [f32::NAN];
        forward(Forward { dims: Dims { l: x.len() }, params: Params {}, x, out: &mut out });
        out[0]
    }

    #[test]
    fn by_hand() {
        assert_eq!((sum(reference::forward, &[3.0, -4.0]), sum(cpu::forward, &[3.0, -4.0])), (25.0, 25.0));
        assert_eq!((sum(reference::forward, &[]), sum(cpu::forward, &[])), (0.0, 0.0));
    }

    #[test]
    fn a_long_sum_loses_nothing() {
        // 2^24 ones: a single f32 accumulator would stay there, and one more would be lost.
        let x = vec![1.0; (1 << 24) + 2];
        assert_eq!(sum(cpu::forward, &x), 16_777_218.0);
    }

    #[test]
    fn cpu_agrees_with_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let x = draw_f32(case.name, "x", case.dims.l, Fill::Normal);
            assert_close(case.name, &[sum(cpu::forward, &x)], &[sum(reference::forward, &x)], Tolerance::F32);
        }
    }
}
