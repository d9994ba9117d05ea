//! What the oracles of the gated convolutions share: one channel at a time, f64 throughout.
//!
//! A convolution is known by which input token each tap of each output token reads, so that a sequence, a grid, either
//! direction and a filter as long as the sequence are one definition.

use crate::Real;

/// The input token that tap `j` of output token `t` reads, where there is one.
pub(crate) type Source<'s> = &'s dyn Fn(usize, usize) -> Option<usize>;

/// Source of a convolution over `n` tokens with `lead` taps before the current one, in or against token order.
pub(crate) fn line(n: usize, lead: usize, backward: bool) -> impl Fn(usize, usize) -> Option<usize> {
    move |t, j| if backward { (t + lead).checked_sub(j) } else { (t + j).checked_sub(lead) }.filter(|&s| s < n)
}

/// Depthwise convolution of one channel; the identity without taps.
pub(crate) struct Conv<'s> {
    source: Source<'s>,
    taps: Option<(Vec<f64>, f64)>,
}

impl<'s> Conv<'s> {
    /// With taps and bias of a channel out of weights `[.., K]` and biases `[..]`.
    pub fn new<T: Real>(
        source: Source<'s>,
        k: usize,
        channel: usize,
        weight: Option<&[T]>,
        bias: Option<&[T]>,
    ) -> Self {
        let taps = |w: &[T]| w[channel * k..][..k].iter().map(|v| v.f64()).collect();
        Conv { source, taps: weight.map(|w| (taps(w), bias.map_or(0.0, |b| b[channel].f64()))) }
    }

    /// With the given taps and no bias.
    pub fn with_taps(source: Source<'s>, taps: Vec<f64>) -> Self {
        Conv { source, taps: Some((taps, 0.0)) }
    }

    fn forward(&self, x: &[f64]) -> Vec<f64> {
        let Some((w, bias)) = &self.taps else { return x.to_vec() };
        let tap = |t: usize, j: usize| (self.source)(t, j).map_or(0.0, |s| w[j] * x[s]);
        (0..x.len()).map(|t| bias + (0..w.len()).map(|j| tap(t, j)).sum::<f64>()).collect()
    }

    /// Gradients of the input, the taps and the bias.
    fn backward(&self, x: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>, f64) {
        let Some((w, _)) = &self.taps else { return (dy.to_vec(), Vec::new(), 0.0) };
        let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
        for (t, j) in (0..x.len()).flat_map(|t| (0..w.len()).map(move |j| (t, j))) {
            if let Some(s) = (self.source)(t, j) {
                dx[s] += w[j] * dy[t];
                dw[j] += x[s] * dy[t];
            }
        }
        (dx, dw, dy.iter().sum())
    }
}

/// A call: samples, tokens, channels, and the filters of a channel in the order q, k, v, inner.
pub(crate) struct Call<'a, T> {
    pub dims: [usize; 3],
    /// `[B, N, 3, C]`
    pub p: &'a [T],
    pub filters: &'a dyn Fn(usize) -> [Conv<'a>; 4],
}

/// Gradients of a call: of `p`, and the sums over samples of taps and bias by channel and filter.
pub(crate) struct Sums {
    pub dp: Vec<f64>,
    /// `[C][4]`: taps and bias.
    pub filters: Vec<[(Vec<f64>, f64); 4]>,
}

fn product(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(x, y)| x * y).collect()
}

impl<T: Real> Call<'_, T> {
    fn at(&self, sample: usize, token: usize, part: usize, channel: usize) -> usize {
        let [_, n, c] = self.dims;
        ((sample * n + token) * 3 + part) * c + channel
    }

    /// q, k, v before their filters.
    fn parts(&self, sample: usize, channel: usize) -> [Vec<f64>; 3] {
        [0, 1, 2].map(|part| (0..self.dims[1]).map(|t| self.p[self.at(sample, t, part, channel)].f64()).collect())
    }

    /// Forward pass.
    pub fn forward(&self, y: &mut [T]) {
        let [b, n, c] = self.dims;
        for (sample, ch) in (0..b).flat_map(|sample| (0..c).map(move |ch| (sample, ch))) {
            let (x, f) = (self.parts(sample, ch), (self.filters)(ch));
            let [q, k, v] = [0, 1, 2].map(|part| f[part].forward(&x[part]));
            let mixed = product(&q, &f[3].forward(&product(&k, &v)));
            mixed.iter().enumerate().for_each(|(t, v)| y[(sample * n + t) * c + ch] = T::from_f64(*v));
        }
    }

    /// Backward pass: the chain rule from the gates back through the convolutions.
    pub fn backward(&self, dy: &[T]) -> Sums {
        let [b, n, c] = self.dims;
        let mut sums = Sums { dp: vec![0.0; self.p.len()], filters: Vec::new() };
        for ch in 0..c {
            let f = (self.filters)(ch);
            let mut total: [(Vec<f64>, f64); 4] =
                [0, 1, 2, 3].map(|i| (f[i].taps.as_ref().map_or(Vec::new(), |(w, _)| vec![0.0; w.len()]), 0.0));
            for sample in 0..b {
                let x = self.parts(sample, ch);
                let [q, k, v] = [0, 1, 2].map(|part| f[part].forward(&x[part]));
                let (gated, dy): (_, Vec<f64>) =
                    (product(&k, &v), (0..n).map(|t| dy[(sample * n + t) * c + ch].f64()).collect());
                let (d_gated, dw, db) = f[3].backward(&gated, &product(&dy, &q));
                let d = [product(&dy, &f[3].forward(&gated)), product(&d_gated, &v), product(&d_gated, &k)];
                let [dq, dk, dv] = [0, 1, 2].map(|part| f[part].backward(&x[part], &d[part]));
                for (part, dx) in [&dq.0, &dk.0, &dv.0].into_iter().enumerate() {
                    dx.iter().enumerate().for_each(|(t, v)| sums.dp[self.at(sample, t, part, ch)] = *v);
                }
                for (total, (dw, db)) in total.iter_mut().zip([(dq.1, dq.2), (dk.1, dk.2), (dv.1, dv.2), (dw, db)]) {
                    total.0.iter_mut().zip(dw).for_each(|(sum, v)| *sum += v);
                    total.1 += db;
                }
            }
            sums.filters.push(total);
        }
        sums
    }
}

impl Sums {
    /// Writes the gradients that are asked for: `dp`, then weight and bias of the short filters and of the inner one.
    pub fn store<T: Real>(&self, dp: Option<&mut [T]>, short: [Option<&mut [T]>; 2], inner: [Option<&mut [T]>; 2]) {
        let write = |out: Option<&mut [T]>, values: &mut dyn Iterator<Item = f64>| {
            out.into_iter().flatten().zip(values).for_each(|(o, v)| *o = T::from_f64(v));
        };
        write(dp, &mut self.dp.iter().copied());
        let ([short, short_bias], [inner, inner_bias]) = (short, inner);
        let shorts = || (0..3).flat_map(|part| self.filters.iter().map(move |f| &f[part]));
        write(short, &mut shorts().flat_map(|(w, _)| w.iter().copied()));
        write(short_bias, &mut shorts().map(|(_, b)| *b));
        write(inner, &mut self.filters.iter().flat_map(|f| f[3].0.iter().copied()));
        write(inner_bias, &mut self.filters.iter().map(|f| f[3].1));
    }
}
