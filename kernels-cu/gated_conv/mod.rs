//! Hyena-SE, -X and -Y between their projections: see `op.toml` for the formula and the shapes.

pub mod cpu;
mod grid;
pub mod launch;
pub(crate) mod oracle;
mod square;
pub(crate) mod strips;
pub(crate) mod taps;
pub(crate) mod window;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use super::oracle::{Call, Conv, line};
    use crate::Real;
    use crate::generated::gated_conv::{Backward, Dims, Forward, Params};

    /// Runs `then` on the call that the tensors of a forward or backward pass describe.
    fn with_call<T: Real, R>(
        (Dims { b, n, c, k }, Params { lead, reversed }): (Dims, Params),
        p: &[T],
        short: [Option<&[T]>; 2],
        inner: [Option<&[T]>; 2],
        then: impl FnOnce(Call<'_, T>) -> R,
    ) -> R {
        let (ahead, back) = (line(n, lead, false), line(n, lead, true));
        let filters = |ch: usize| {
            let source: &dyn Fn(usize, usize) -> Option<usize> = if ch + reversed < c { &ahead } else { &back };
            let part = |part: usize| Conv::new(source, k, part * c + ch, short[0], short[1]);
            [part(0), part(1), part(2), Conv::new(source, k, ch, inner[0], inner[1])]
        };
        then(Call { dims: [b, n, c], p, filters: &filters })
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let (short, inner) = ([a.short_weight, a.short_bias], [a.inner_weight, a.inner_bias]);
        with_call((a.dims, a.params), a.p, short, inner, |call| call.forward(a.y));
    }

    /// Backward pass.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let (short, inner) = ([a.short_weight, a.short_bias], [a.inner_weight, a.inner_bias]);
        let sums = with_call((a.dims, a.params), a.p, short, inner, |call| call.backward(a.dy));
        sums.store(a.dp, [a.dshort_weight, a.dshort_bias], [a.dinner_weight, a.dinner_bias]);
    }
}

#[cfg(test)]
mod tests {
    use super::reference;
    use crate::generated::gated_conv::{Dims, Forward, Params};

    /// y of three tokens of one channel, q = 1, k = 1, v = 1, 2, 3, inner taps 10 and 1.
    fn inner_of_three_tokens(lead: usize, reversed: usize) -> [f64; 3] {
        let mut y = [0.0f64; 3];
        reference::forward(Forward {
            dims: Dims { b: 1, n: 3, c: 1, k: 2 },
            params: Params { lead, reversed },
            p: &[1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 3.0],
            short_weight: None,
            short_bias: None,
            inner_weight: Some(&[10.0, 1.0]),
            inner_bias: Some(&[0.5]),
            y: &mut y,
        });
        y
    }

    #[test]
    fn directions_by_hand() {
        // Causal: 1, 10·1 + 2, 10·2 + 3. Centred on the first tap: the next token by the second. Backward: from the end.
        assert_eq!(inner_of_three_tokens(1, 0), [1.5, 12.5, 23.5]);
        assert_eq!(inner_of_three_tokens(0, 0), [12.5, 23.5, 30.5]);
        assert_eq!(inner_of_three_tokens(1, 1), [21.5, 32.5, 3.5]);
    }

    #[test]
    fn gates_and_short_filters_by_hand() {
        // One channel, two tokens, taps (2, 1) of q alone: q = 1, 2·1 + 2 = 4; k = 3·1, 3·1 by bias; v = 5, 6 as given.
        let mut y = [0.0f64; 2];
        reference::forward(Forward {
            dims: Dims { b: 1, n: 2, c: 1, k: 2 },
            params: Params { lead: 1, reversed: 0 },
            p: &[1.0, 7.0, 5.0, 2.0, 7.0, 6.0],
            short_weight: Some(&[2.0, 1.0, 0.0, 0.0, 0.0, 1.0]),
            short_bias: Some(&[0.0, 3.0, 0.0]),
            inner_weight: None,
            inner_bias: None,
            y: &mut y,
        });
        assert_eq!(y, [15.0, 72.0]);
    }
}
