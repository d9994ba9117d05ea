//! Nearest-neighbour enlargement by two: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: the index map, element by element.
pub mod reference {
    use crate::Real;
    use crate::generated::upsample::{Backward, Dims, Forward};

    /// Calls `f(index in x, index in y)` for every element of y.
    fn pairs(Dims { b, h, w, c }: Dims, mut f: impl FnMut(usize, usize)) {
        for at in 0..b * 2 * h * 2 * w * c {
            let (channel, column, row, image) =
                (at % c, at / c % (2 * w), at / (c * 2 * w) % (2 * h), at / (c * 4 * w * h));
            f(((image * h + row / 2) * w + column / 2) * c + channel, at);
        }
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        pairs(a.dims, |x, y| a.y[y] = a.x[x]);
    }

    /// Backward pass.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let Some(dx) = a.dx else { return };
        let mut sums = vec![0.0f64; dx.len()];
        pairs(a.dims, |x, y| sums[x] += a.dy[y].f64());
        dx.iter_mut().zip(sums).for_each(|(dx, sum)| *dx = T::from_f64(sum));
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::generated::upsample::{Backward, Dims, Forward, Params};

    #[test]
    fn squares_by_hand() {
        // Two pixels of two channels.
        let (dims, params) = (Dims { b: 1, h: 1, w: 2, c: 2 }, Params {});
        let row = [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0];
        let dy: Vec<f32> = (0..16).map(|v| v as f32).collect();
        for (forward, backward) in [
            (reference::forward as fn(Forward<'_, f32>), reference::backward as fn(Backward<'_, f32>)),
            (cpu::forward, cpu::backward),
        ] {
            let (mut y, mut dx) = ([f32::NAN; 16], [f32::NAN; 4]);
            forward(Forward { dims, params, x: &[1.0, 2.0, 3.0, 4.0], y: &mut y });
            assert_eq!(y, [row, row].concat()[..]);
            // The first square is elements 0, 2, 8 and 10.
            backward(Backward { dims, params, dy: &dy, dx: Some(&mut dx) });
            assert_eq!(dx, [20.0, 24.0, 36.0, 40.0]);
        }
    }
}
