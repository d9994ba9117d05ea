//! The softmax of one head over stated keys, in plain loops and f64: the oracle of the attention family.

use crate::Real;

/// Vectors of one head, one per token.
pub(crate) type Vectors = Vec<Vec<f64>>;

/// The sizes N, parts, H, E of a tensor `[B, N, parts, H, E]`, where parts are vectors side by side per token.
#[derive(Clone, Copy)]
pub(crate) struct Layout {
    pub n: usize,
    pub parts: usize,
    pub h: usize,
    pub e: usize,
}

impl Layout {
    fn row(&self, sample: usize, token: usize, part: usize, head: usize) -> usize {
        (((sample * self.n + token) * self.parts + part) * self.h + head) * self.e
    }

    /// One part of one head of one sample.
    pub fn read<T: Real>(&self, x: &[T], sample: usize, part: usize, head: usize) -> Vectors {
        let vector = |token| x[self.row(sample, token, part, head)..][..self.e].iter().map(|v| v.f64()).collect();
        (0..self.n).map(vector).collect()
    }

    /// The reverse of [`Layout::read`].
    pub fn write<T: Real>(&self, vectors: &Vectors, out: &mut [T], sample: usize, part: usize, head: usize) {
        for (token, vector) in vectors.iter().enumerate() {
            let row = self.row(sample, token, part, head);
            vector.iter().enumerate().for_each(|(i, v)| out[row + i] = T::from_f64(*v));
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn add(sum: &mut [f64], factor: f64, x: &[f64]) {
    sum.iter_mut().zip(x).for_each(|(s, x)| *s += factor * x);
}

/// y and lse of every query over `keys(query)`; without keys, y is zero and lse −∞.
pub(crate) fn forward([q, k, v]: &[Vectors; 3], scale: f64, keys: impl Fn(usize) -> Vec<usize>) -> (Vectors, Vec<f64>) {
    let one = |(query, q): (usize, &Vec<f64>)| {
        let scores: Vec<(usize, f64)> = keys(query).iter().map(|&key| (key, scale * dot(q, &k[key]))).collect();
        let max = scores.iter().fold(f64::NEG_INFINITY, |max, (_, s)| max.max(*s));
        let lse = max + scores.iter().map(|(_, s)| (s - max).exp()).sum::<f64>().ln();
        let mut y = vec![0.0; q.len()];
        scores.iter().for_each(|(key, s)| add(&mut y, (s - lse).exp(), &v[*key]));
        (y, lse)
    };
    q.iter().enumerate().map(one).unzip()
}

/// Gradients of q, k, v: with p = exp(s − lse) and delta_i = dy_i·y_i, dv_j = Σ_i p_ij·dy_i,
/// ds_ij = p_ij·(dy_i·v_j − delta_i), dq_i = scale·Σ_j ds_ij·k_j, dk_j = scale·Σ_i ds_ij·q_i.
pub(crate) fn backward(
    [q, k, v]: &[Vectors; 3],
    [y, dy]: &[Vectors; 2],
    lse: &[f64],
    scale: f64,
    keys: impl Fn(usize) -> Vec<usize>,
) -> [Vectors; 3] {
    let zeros = |like: &Vectors| like.iter().map(|x| vec![0.0; x.len()]).collect::<Vectors>();
    let (mut dq, mut dk, mut dv) = (zeros(q), zeros(k), zeros(v));
    for query in 0..q.len() {
        let delta = dot(&dy[query], &y[query]);
        for key in keys(query) {
            let p = (scale * dot(&q[query], &k[key]) - lse[query]).exp();
            let ds = scale * p * (dot(&dy[query], &v[key]) - delta);
            add(&mut dq[query], ds, &k[key]);
            add(&mut dk[key], ds, &q[query]);
            add(&mut dv[key], p, &dy[query]);
        }
    }
    [dq, dk, dv]
}

/// Forward pass from a packed projection `[B, N, 3, H, E]` to `y [B, N, H, E]` and `lse [B, H, N]`.
pub(crate) fn forward_packed<T: Real>(
    [b, n, h, e]: [usize; 4],
    scale: f32,
    keys: impl Fn(usize) -> Vec<usize>,
    qkv: &[T],
    y: &mut [T],
    lse: &mut [T],
) {
    let (packed, plain) = (Layout { n, parts: 3, h, e }, Layout { n, parts: 1, h, e });
    for (sample, head) in (0..b).flat_map(|sample| (0..h).map(move |head| (sample, head))) {
        let parts = [0, 1, 2].map(|part| packed.read(qkv, sample, part, head));
        let (rows, sums) = forward(&parts, f64::from(scale), &keys);
        plain.write(&rows, y, sample, 0, head);
        sums.iter().enumerate().for_each(|(query, sum)| lse[(sample * h + head) * n + query] = T::from_f64(*sum));
    }
}

/// Backward pass of [`forward_packed`]; `given` is qkv, y, dy and lse.
pub(crate) fn backward_packed<T: Real>(
    [b, n, h, e]: [usize; 4],
    scale: f32,
    keys: impl Fn(usize) -> Vec<usize>,
    [qkv, y, dy, lse]: [&[T]; 4],
    dqkv: &mut [T],
) {
    let (packed, plain) = (Layout { n, parts: 3, h, e }, Layout { n, parts: 1, h, e });
    for (sample, head) in (0..b).flat_map(|sample| (0..h).map(move |head| (sample, head))) {
        let parts = [0, 1, 2].map(|part| packed.read(qkv, sample, part, head));
        let saved = [y, dy].map(|x| plain.read(x, sample, 0, head));
        let sums: Vec<f64> = lse[(sample * h + head) * n..][..n].iter().map(|v| v.f64()).collect();
        let gradients = backward(&parts, &saved, &sums, f64::from(scale), &keys);
        (0..3).for_each(|part| packed.write(&gradients[part], dqkv, sample, part, head));
    }
}
