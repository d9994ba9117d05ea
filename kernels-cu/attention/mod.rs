//! Softmax self-attention on the packed q, k, v projection: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub(crate) mod tiles;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::generated::attention::{Backward, Dims, Forward};

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, n, h, e } = a.dims;
        for (sample, head) in (0..b).flat_map(|sample| (0..h).map(move |head| (sample, head))) {
            let at = |part: usize, token: usize, i: usize| a.qkv[index(a.dims, sample, token, part, head) + i].f64();
            for query in 0..n {
                let score = |key: usize| {
                    f64::from(a.params.scale) * (0..e).map(|i| at(0, query, i) * at(1, key, i)).sum::<f64>()
                };
                let scores: Vec<f64> = (0..n).map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let lse = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
                for i in 0..e {
                    let o: f64 = (0..n).map(|key| (scores[key] - lse).exp() * at(2, key, i)).sum();
                    a.y[((sample * n + query) * h + head) * e + i] = T::from_f64(o);
                }
                a.lse[(sample * h + head) * n + query] = T::from_f64(lse);
            }
        }
    }

    /// Backward pass: with p = exp(s − lse) and delta_i = Σ_e dy·y, dv_j = Σ_i p_ij·dy_i,
    /// ds_ij = p_ij·(dy_i·v_j − delta_i), dq_i = scale·Σ_j ds_ij·k_j, dk_j = scale·Σ_i ds_ij·q_i.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let Some(dqkv) = a.dqkv else { return };
        let Dims { b, n, h, e } = a.dims;
        let scale = f64::from(a.params.scale);
        let mut sums = vec![0.0f64; dqkv.len()];
        for (sample, head) in (0..b).flat_map(|sample| (0..h).map(move |head| (sample, head))) {
            let base = |part: usize, token: usize| index(a.dims, sample, token, part, head);
            let at = |part: usize, token: usize, i: usize| a.qkv[base(part, token) + i].f64();
            for query in 0..n {
                let row = ((sample * n + query) * h + head) * e;
                let dy = |i: usize| a.dy[row + i].f64();
                let delta: f64 = (0..e).map(|i| dy(i) * a.y[row + i].f64()).sum();
                let lse = a.lse[(sample * h + head) * n + query].f64();
                for key in 0..n {
                    let p = (scale * (0..e).map(|i| at(0, query, i) * at(1, key, i)).sum::<f64>() - lse).exp();
                    let ds = scale * p * ((0..e).map(|i| dy(i) * at(2, key, i)).sum::<f64>() - delta);
                    for i in 0..e {
                        sums[base(0, query) + i] += ds * at(1, key, i);
                        sums[base(1, key) + i] += ds * at(0, query, i);
                        sums[base(2, key) + i] += p * dy(i);
                    }
                }
            }
        }
        dqkv.iter_mut().zip(sums).for_each(|(out, sum)| *out = T::from_f64(sum));
    }

    /// Where the row of one token, part (q, k, v) and head begins in `qkv`.
    fn index(Dims { n, h, e, .. }: Dims, sample: usize, token: usize, part: usize, head: usize) -> usize {
        (((sample * n + token) * 3 + part) * h + head) * e
    }
}
