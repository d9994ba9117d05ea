//! Hyena-SE, -X and -Y on the grid of tokens: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::gated_conv::oracle::{Call, Conv};
    use crate::generated::gated_conv_2d::{Backward, Dims, Forward};

    /// Runs `then` on the call that the tensors of a forward or backward pass describe.
    fn with_call<T: Real, R>(
        Dims { b, gh, gw, c, k }: Dims,
        p: &[T],
        short: [Option<&[T]>; 2],
        inner: [Option<&[T]>; 2],
        then: impl FnOnce(Call<'_, T>) -> R,
    ) -> R {
        let source = |token: usize, tap: usize| {
            let row = (token / gw + tap / k).checked_sub(k / 2).filter(|&row| row < gh)?;
            let column = (token % gw + tap % k).checked_sub(k / 2).filter(|&column| column < gw)?;
            Some(row * gw + column)
        };
        let filters = |ch: usize| {
            let part = |part: usize| Conv::new(&source, k * k, part * c + ch, short[0], short[1]);
            [part(0), part(1), part(2), Conv::new(&source, k * k, ch, inner[0], inner[1])]
        };
        then(Call { dims: [b, gh * gw, c], p, filters: &filters })
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let (short, inner) = ([a.short_weight, a.short_bias], [a.inner_weight, a.inner_bias]);
        with_call(a.dims, a.p, short, inner, |call| call.forward(a.y));
    }

    /// Backward pass.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let (short, inner) = ([a.short_weight, a.short_bias], [a.inner_weight, a.inner_bias]);
        let sums = with_call(a.dims, a.p, short, inner, |call| call.backward(a.dy));
        sums.store(a.dp, [a.dshort_weight, a.dshort_bias], [a.dinner_weight, a.dinner_bias]);
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::generated::gated_conv_2d::{Dims, Forward, Params};

    #[test]
    fn a_two_by_two_grid_by_hand() {
        // q = k = 1 and v = 1, 2 / 3, 4; the inner window weighs left 10, middle 1, below 100, and has bias 0.5.
        let run = |forward: fn(Forward<'_, f32>)| {
            let mut y = [0.0f32; 4];
            forward(Forward {
                dims: Dims { b: 1, gh: 2, gw: 2, c: 1, k: 3 },
                params: Params {},
                p: &[1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 3.0, 1.0, 1.0, 4.0],
                short_weight: None,
                short_bias: None,
                inner_weight: Some(&[0.0, 0.0, 0.0, 10.0, 1.0, 0.0, 0.0, 100.0, 0.0]),
                inner_bias: Some(&[0.5]),
                y: &mut y,
            });
            y
        };
        assert_eq!(run(reference::forward), [301.5, 412.5, 3.5, 34.5]);
        assert_eq!(run(cpu::forward), [301.5, 412.5, 3.5, 34.5]);
    }
}
