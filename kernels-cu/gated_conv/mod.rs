//! Hyena-SE, -X and -Y between their projections: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub(crate) mod taps;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::generated::gated_conv::{Backward, Dims, Forward};

    /// Depthwise convolution along the tokens of `[N]` series, one channel; the identity without weights.
    struct Conv {
        lead: usize,
        taps: Option<(Vec<f64>, f64)>,
    }

    impl Conv {
        fn new<T: Real>(lead: usize, k: usize, channel: usize, weight: Option<&[T]>, bias: Option<&[T]>) -> Self {
            let taps = |w: &[T]| w[channel * k..][..k].iter().map(|v| v.f64()).collect();
            Conv { lead, taps: weight.map(|w| (taps(w), bias.map_or(0.0, |b| b[channel].f64()))) }
        }

        /// The input token that tap `j` of output token `t` reads, where there is one.
        fn source(&self, t: usize, j: usize, n: usize) -> Option<usize> {
            (t + j).checked_sub(self.lead).filter(|&s| s < n)
        }

        fn forward(&self, x: &[f64]) -> Vec<f64> {
            let Some((w, bias)) = &self.taps else { return x.to_vec() };
            let tap = |t: usize, j: usize| self.source(t, j, x.len()).map_or(0.0, |s| w[j] * x[s]);
            (0..x.len()).map(|t| bias + (0..w.len()).map(|j| tap(t, j)).sum::<f64>()).collect()
        }

        /// Gradients of the input, the taps and the bias.
        fn backward(&self, x: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>, f64) {
            let Some((w, _)) = &self.taps else { return (dy.to_vec(), Vec::new(), 0.0) };
            let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
            for (t, j) in (0..x.len()).flat_map(|t| (0..w.len()).map(move |j| (t, j))) {
                if let Some(s) = self.source(t, j, x.len()) {
                    dx[s] += w[j] * dy[t];
                    dw[j] += x[s] * dy[t];
                }
            }
            (dx, dw, dy.iter().sum())
        }
    }

    fn product(a: &[f64], b: &[f64]) -> Vec<f64> {
        a.iter().zip(b).map(|(x, y)| x * y).collect()
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, n, c, k } = a.dims;
        let lead = a.params.lead;
        for (sample, ch) in (0..b).flat_map(|sample| (0..c).map(move |ch| (sample, ch))) {
            let [q, key, value] = [0, 1, 2].map(|part| {
                let x: Vec<f64> = (0..n).map(|t| a.p[((sample * n + t) * 3 + part) * c + ch].f64()).collect();
                Conv::new(lead, k, part * c + ch, a.short_weight, a.short_bias).forward(&x)
            });
            let mixed = Conv::new(lead, k, ch, a.inner_weight, a.inner_bias).forward(&product(&key, &value));
            product(&q, &mixed).iter().enumerate().for_each(|(t, y)| a.y[(sample * n + t) * c + ch] = T::from_f64(*y));
        }
    }

    /// Backward pass, the chain rule from the gates back through both convolutions.
    pub fn backward<T: Real>(mut a: Backward<'_, T>) {
        let Dims { b, n, c, k } = a.dims;
        let lead = a.params.lead;
        let (mut d_short, mut d_short_bias) = (vec![0.0f64; 3 * c * k], vec![0.0f64; 3 * c]);
        let (mut d_inner, mut d_inner_bias) = (vec![0.0f64; c * k], vec![0.0f64; c]);
        for (sample, ch) in (0..b).flat_map(|sample| (0..c).map(move |ch| (sample, ch))) {
            let at = |part: usize, t: usize| ((sample * n + t) * 3 + part) * c + ch;
            let x = [0, 1, 2].map(|part| (0..n).map(|t| a.p[at(part, t)].f64()).collect::<Vec<_>>());
            let short = [0, 1, 2].map(|part| Conv::new(lead, k, part * c + ch, a.short_weight, a.short_bias));
            let inner = Conv::new(lead, k, ch, a.inner_weight, a.inner_bias);
            let [q, key, value] = [0, 1, 2].map(|part| short[part].forward(&x[part]));
            let gated = product(&key, &value);
            let dy: Vec<f64> = (0..n).map(|t| a.dy[(sample * n + t) * c + ch].f64()).collect();
            let (d_gated, dw, db) = inner.backward(&gated, &product(&dy, &q));
            dw.iter().enumerate().for_each(|(j, v)| d_inner[ch * k + j] += v);
            d_inner_bias[ch] += db;
            let d = [product(&dy, &inner.forward(&gated)), product(&d_gated, &value), product(&d_gated, &key)];
            for part in 0..3 {
                let (dx, dw, db) = short[part].backward(&x[part], &d[part]);
                dw.iter().enumerate().for_each(|(j, v)| d_short[(part * c + ch) * k + j] += v);
                d_short_bias[part * c + ch] += db;
                if let Some(dp) = &mut a.dp {
                    dx.iter().enumerate().for_each(|(t, v)| dp[at(part, t)] = T::from_f64(*v));
                }
            }
        }
        store(a.dshort_weight, &d_short);
        store(a.dshort_bias, &d_short_bias);
        store(a.dinner_weight, &d_inner);
        store(a.dinner_bias, &d_inner_bias);
    }

    fn store<T: Real>(out: Option<&mut [T]>, sums: &[f64]) {
        out.into_iter().flatten().zip(sums).for_each(|(o, v)| *o = T::from_f64(*v));
    }
}
