//! `y += alpha·x`: see `op.toml`.

pub mod cpu;
pub mod launch;

/// The oracle.
pub mod reference {
    use crate::Real;
    use crate::generated::axpy::Forward;

    /// The update.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let alpha = f64::from(a.params.alpha);
        a.y.iter_mut().zip(a.x).for_each(|(y, x)| *y = T::from_f64(y.f64() + alpha * x.f64()));
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Tier;
    use crate::check::{Fill, Tolerance, assert_close, draw_f32};
    use crate::generated::axpy::{CASES, Dims, Forward, Params};

    #[test]
    fn by_hand() {
        let mut y = [1.0f64, 2.0];
        reference::forward(Forward { dims: Dims { l: 2 }, params: Params { alpha: -2.0 }, x: &[3.0, 5.0], y: &mut y });
        assert_eq!(y, [-5.0, -8.0]);
    }

    #[test]
    fn cpu_agrees_with_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let draw = |name| draw_f32(case.name, name, case.dims.l, Fill::Normal);
            let (x, mut got, mut want) = (draw("x"), draw("y"), draw("y"));
            cpu::forward(Forward { dims: case.dims, params: case.params, x: &x, y: &mut got });
            reference::forward(Forward { dims: case.dims, params: case.params, x: &x, y: &mut want });
            assert_close(case.name, &got, &want, Tolerance::F32);
        }
    }
}
