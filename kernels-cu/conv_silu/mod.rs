//! Depthwise causal convolution and SiLU, as before the scan of Mamba: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::generated::conv_silu::{Backward, Dims, Forward};
    use crate::{Order, Real};

    /// The row that tap `j` reads at a time, where there is one.
    fn source(order: Order, dims: Dims, sample: usize, time: usize, j: usize) -> Option<usize> {
        (time + j).checked_sub(dims.k - 1).map(|earlier| sample * dims.n + order.token(earlier))
    }

    /// Every (sample, time, channel).
    fn places(Dims { b, n, c, .. }: Dims) -> impl Iterator<Item = (usize, usize, usize)> {
        (0..b * n * c).map(move |i| (i / (n * c), i / c % n, i % c))
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let dims @ Dims { n, w, c, k, .. } = a.dims;
        let order = Order { n, reverse: a.params.reverse };
        for (sample, time, ch) in places(dims) {
            let mut u = a.bias[ch].f64();
            for (j, row) in (0..k).filter_map(|j| Some((j, source(order, dims, sample, time, j)?))) {
                u += a.weight[ch * k + j].f64() * a.p[row * w + a.params.offset + ch].f64();
            }
            a.y[(sample * n + order.token(time)) * c + ch] = T::from_f64(u / (1.0 + (-u).exp()));
        }
    }

    /// Backward pass: with s = sigmoid(u), du = dy·s·(1 + u·(1 − s)); the rest is that of the convolution.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let dims @ Dims { b, n, w, c, k } = a.dims;
        let order = Order { n, reverse: a.params.reverse };
        let (mut dp, mut dw, mut db) = (vec![0.0f64; b * n * w], vec![0.0f64; c * k], vec![0.0f64; c]);
        for (sample, time, ch) in places(dims) {
            let at = |row: usize| row * w + a.params.offset + ch;
            let reads = || (0..k).filter_map(|j| Some((j, source(order, dims, sample, time, j)?)));
            let u = reads().fold(a.bias[ch].f64(), |u, (j, row)| u + a.weight[ch * k + j].f64() * a.p[at(row)].f64());
            let s = 1.0 / (1.0 + (-u).exp());
            let du = a.dy[(sample * n + order.token(time)) * c + ch].f64() * s * (1.0 + u * (1.0 - s));
            db[ch] += du;
            for (j, row) in reads() {
                dw[ch * k + j] += du * a.p[at(row)].f64();
                dp[at(row)] += du * a.weight[ch * k + j].f64();
            }
        }
        for (out, sums) in [(a.dp, dp), (a.dweight, dw), (a.dbias, db)] {
            out.into_iter().flatten().zip(sums).for_each(|(o, v)| *o = T::from_f64(v));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::reference;
    use crate::generated::conv_silu::{Dims, Forward, Params};

    #[test]
    fn two_taps_by_hand() {
        let silu = |u: f64| u / (1.0 + (-u).exp());
        // Column 1 of the rows holds 1, 2, 3; taps: half of the token before, all of the current one; bias 1.
        let run = |reverse: bool| {
            let mut y = [0.0f64; 3];
            reference::forward(Forward {
                dims: Dims { b: 1, n: 3, w: 2, c: 1, k: 2 },
                params: Params { offset: 1, reverse },
                p: &[9.0, 1.0, 9.0, 2.0, 9.0, 3.0],
                weight: &[0.5, 1.0],
                bias: &[1.0],
                y: &mut y,
            });
            y
        };
        assert_eq!(run(false), [2.0, 3.5, 5.0].map(silu));
        // From the last token on, the token before the current one is the one behind it.
        assert_eq!(run(true), [3.0, 4.5, 4.0].map(silu));
    }
}
