//! `y = [first − x; second − x]`: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 arithmetic.
pub mod reference {
    use crate::Real;
    use crate::generated::branch_deltas::{Backward, Dims, Forward};

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, n, d } = a.dims;
        for token in 0..b * n {
            for i in 0..d {
                let x = a.x[token * d + i].f64();
                a.y[2 * token * d + i] = T::from_f64(a.first[token * d + i].f64() - x);
                a.y[(2 * token + 1) * d + i] = T::from_f64(a.second[token * d + i].f64() - x);
            }
        }
    }

    /// Backward pass: dfirst and dsecond are the halves of dy, dx = −(dfirst + dsecond).
    pub fn backward<T: Real>(mut a: Backward<'_, T>) {
        let Dims { b, n, d } = a.dims;
        for token in 0..b * n {
            for i in 0..d {
                let (first, second) = (a.dy[2 * token * d + i], a.dy[(2 * token + 1) * d + i]);
                for (out, value) in [
                    (&mut a.dx, T::from_f64(-(first.f64() + second.f64()))),
                    (&mut a.dfirst, first),
                    (&mut a.dsecond, second),
                ] {
                    if let Some(out) = out {
                        out[token * d + i] = value;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::reference;
    use crate::generated::branch_deltas::{Backward, Dims, Forward, Params};

    const DIMS: Dims = Dims { b: 1, n: 2, d: 2 };

    #[test]
    fn by_hand() {
        let mut y = [0.0f32; 8];
        reference::forward(Forward {
            dims: DIMS,
            params: Params {},
            x: &[1.0, 2.0, 3.0, 4.0],
            first: &[11.0, 22.0, 33.0, 44.0],
            second: &[0.0, 0.0, 0.0, 1.0],
            y: &mut y,
        });
        assert_eq!(y, [10.0, 20.0, -1.0, -2.0, 30.0, 40.0, -3.0, -3.0]);
        let (mut dx, mut dfirst, mut dsecond) = ([0.0f32; 4], [0.0f32; 4], [0.0f32; 4]);
        reference::backward(Backward {
            dims: DIMS,
            params: Params {},
            dy: &[1.0, 2.0, 10.0, 20.0, 3.0, 4.0, 30.0, 40.0],
            dx: Some(&mut dx),
            dfirst: Some(&mut dfirst),
            dsecond: Some(&mut dsecond),
        });
        assert_eq!(dx, [-11.0, -22.0, -33.0, -44.0]);
        assert_eq!((dfirst, dsecond), ([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]));
    }
}
