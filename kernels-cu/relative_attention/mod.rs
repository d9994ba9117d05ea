//! Softmax self-attention with a bias for the distance of key and query: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::generated::relative_attention::{Backward, Dims, Forward};

    /// Index of element 0 of a part (q 0, k 1, v 2) of a token's head.
    fn at(Dims { n, h, e, .. }: Dims, b: usize, token: usize, part: usize, head: usize) -> usize {
        (((b * n + token) * 3 + part) * h + head) * e
    }

    fn keys(dims: Dims, counts: Option<&[i32]>, b: usize) -> usize {
        counts.map_or(dims.n, |counts| (counts[b].max(1) as usize).min(dims.n))
    }

    /// Scores of one query.
    fn scores<T: Real>(
        dims: Dims,
        scale: f32,
        (qkv, bias): (&[T], &[T]),
        (b, head, i): (usize, usize, usize),
        keys: usize,
    ) -> Vec<f64> {
        let Dims { n, h, e, .. } = dims;
        let q = at(dims, b, i, 0, head);
        let score = |j: usize| {
            let k = at(dims, b, j, 1, head);
            let dot: f64 = (0..e).map(|c| qkv[q + c].f64() * qkv[k + c].f64()).sum();
            f64::from(scale) * dot + bias[(j + n - 1 - i) * h + head].f64()
        };
        (0..keys).map(score).collect()
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, n, h, e } = a.dims;
        for (row, lse) in a.lse.iter_mut().enumerate() {
            let (i, head, sample) = (row % n, row / n % h, row / (n * h));
            let keys = keys(a.dims, a.counts, sample);
            let s = scores(a.dims, a.params.scale, (a.qkv, a.bias), (sample, head, i), keys);
            let largest = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = s.iter().map(|s| (s - largest).exp()).sum();
            *lse = T::from_f64(largest + sum.ln());
            for c in 0..e {
                let value = |j: usize| a.qkv[at(a.dims, sample, j, 2, head) + c].f64();
                let y = s.iter().enumerate().map(|(j, s)| (s - largest).exp() / sum * value(j)).sum();
                a.y[((sample * n + i) * h + head) * e + c] = T::from_f64(y);
            }
        }
        debug_assert_eq!(a.lse.len(), b * n * h);
    }

    /// Backward pass: with p = exp(s − lse) and ds = p·(dy·v − dy·y), dq = scale·Σ ds·k, dk = scale·Σ ds·q, dv = Σ p·dy
    /// and dbias the sum of ds over all pairs of the same distance.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let Dims { b, n, h, e } = a.dims;
        let (mut d_qkv, mut d_bias) = (vec![0.0f64; a.qkv.len()], vec![0.0f64; a.bias.len()]);
        let rows = (0..b).flat_map(|sample| (0..h).flat_map(move |head| (0..n).map(move |i| (sample, head, i))));
        for (sample, head, i) in rows {
            let keys = keys(a.dims, a.counts, sample);
            let lse = a.lse[(sample * h + head) * n + i].f64();
            let out = ((sample * n + i) * h + head) * e;
            let own: f64 = (0..e).map(|c| a.dy[out + c].f64() * a.y[out + c].f64()).sum();
            let s = scores(a.dims, a.params.scale, (a.qkv, a.bias), (sample, head, i), keys);
            for (j, s) in s.iter().enumerate() {
                let p = (s - lse).exp();
                let [q, k, v] = [(i, 0), (j, 1), (j, 2)].map(|(token, part)| at(a.dims, sample, token, part, head));
                let ds = p * ((0..e).map(|c| a.dy[out + c].f64() * a.qkv[v + c].f64()).sum::<f64>() - own);
                d_bias[(j + n - 1 - i) * h + head] += ds;
                for c in 0..e {
                    d_qkv[q + c] += f64::from(a.params.scale) * ds * a.qkv[k + c].f64();
                    d_qkv[k + c] += f64::from(a.params.scale) * ds * a.qkv[q + c].f64();
                    d_qkv[v + c] += p * a.dy[out + c].f64();
                }
            }
        }
        a.dqkv.into_iter().flatten().zip(d_qkv).for_each(|(o, v)| *o = T::from_f64(v));
        a.dbias.into_iter().flatten().zip(d_bias).for_each(|(o, v)| *o = T::from_f64(v));
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::check::{Tolerance, assert_close};
    use crate::generated::relative_attention::{Dims, Forward, Params};

    #[test]
    fn the_bias_belongs_to_the_distance() {
        // Two tokens, no products: scores are the biases ln 3 (key before), 0 (itself) and ln 7 (key after).
        let dims = Dims { b: 1, n: 2, h: 1, e: 1 };
        let qkv = [0.0, 0.0, 8.0, 0.0, 0.0, 16.0];
        let bias = [f32::ln(3.0), 0.0, f32::ln(7.0)];
        for forward in [reference::forward::<f32>, cpu::forward] {
            for (counts, want, sums) in [
                (None, [(8.0 + 7.0 * 16.0) / 8.0, (3.0 * 8.0 + 16.0) / 4.0], [8.0f32, 4.0]),
                // The second token is no key, but it is a query.
                (Some(&[1][..]), [8.0, 8.0], [1.0, 3.0]),
            ] {
                let (mut y, mut lse) = ([f32::NAN; 2], [f32::NAN; 2]);
                let params = Params { scale: 1.0 };
                forward(Forward { dims, params, qkv: &qkv, bias: &bias, counts, y: &mut y, lse: &mut lse });
                assert_close("y", &y, &want, Tolerance::F32);
                assert_close("lse", &lse, &sums.map(f32::ln), Tolerance::F32);
            }
        }
    }
}
