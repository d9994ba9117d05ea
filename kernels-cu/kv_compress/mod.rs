//! Keys and values of a coarser grid: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::generated::kv_compress::{Backward, Dims, Forward};

    /// The squares and parts in the order of the output: (sample, row, column, part).
    fn vectors(Dims { b, gh, gw, k, .. }: Dims) -> impl Iterator<Item = [usize; 4]> {
        let each = move |i: usize| [i / 2 / (gw / k) / (gh / k), i / 2 / (gw / k) % (gh / k), i / 2 % (gw / k), i % 2];
        (0..b * (gh / k) * (gw / k) * 2).map(each)
    }

    /// Where `x` holds what tap (i, j) of channel d reads.
    fn source(dims: Dims, first: usize, [sample, row, column, part]: [usize; 4], [i, j]: [usize; 2]) -> usize {
        let Dims { gh, gw, r, d, k, .. } = dims;
        (((sample * gh + row * k + i) * gw + column * k + j) * r + first + part) * d
    }

    /// The convolution at one place, every channel.
    fn convolve<T: Real>(dims: Dims, first: usize, at: [usize; 4], x: &[T], w: &[T], bias: &[T]) -> Vec<f64> {
        let (k, tap) = (dims.k, |d: usize, t: usize| w[d * dims.k * dims.k + t].f64());
        let read = |d: usize, t: usize| x[source(dims, first, at, [t / k, t % k]) + d].f64();
        (0..dims.d).map(|d| bias[d].f64() + (0..k * k).map(|t| tap(d, t) * read(d, t)).sum::<f64>()).collect()
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let d = a.dims.d;
        for (index, at) in vectors(a.dims).enumerate() {
            let c = convolve(a.dims, a.params.first, at, a.x, a.weight, a.bias);
            let mean = c.iter().sum::<f64>() / d as f64;
            let var = c.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / d as f64;
            let rstd = 1.0 / (var + f64::from(a.params.eps)).sqrt();
            for i in 0..d {
                a.y[index * d + i] = T::from_f64((c[i] - mean) * rstd * a.gamma[i].f64() + a.beta[i].f64());
            }
            (a.mean[index], a.rstd[index]) = (T::from_f64(mean), T::from_f64(rstd));
        }
    }

    /// Backward pass: with n = (c − mean)·rstd and g = dy·gamma, dc = rstd·(g − mean_d(g) − n·mean_d(g·n)),
    /// dgamma = Σ dy·n, dbeta = Σ dy, dbias = Σ dc, dweight = Σ dc·x, dx = dc·weight.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let (Dims { d, k, .. }, first) = (a.dims, a.params.first);
        let (mut dx, mut dweight) = (vec![0.0f64; a.x.len()], vec![0.0f64; d * k * k]);
        let [mut dbias, mut dgamma, mut dbeta] = [0; 3].map(|_| vec![0.0f64; d]);
        for (index, at) in vectors(a.dims).enumerate() {
            let (mean, rstd) = (a.mean[index].f64(), a.rstd[index].f64());
            let c = convolve(a.dims, first, at, a.x, a.weight, a.bias);
            let n = |i: usize| (c[i] - mean) * rstd;
            let dy = |i: usize| a.dy[index * d + i].f64();
            let g = |i: usize| dy(i) * a.gamma[i].f64();
            let mean_g = (0..d).map(g).sum::<f64>() / d as f64;
            let mean_gn = (0..d).map(|i| g(i) * n(i)).sum::<f64>() / d as f64;
            for i in 0..d {
                let dc = rstd * (g(i) - mean_g - n(i) * mean_gn);
                dbias[i] += dc;
                dgamma[i] += dy(i) * n(i);
                dbeta[i] += dy(i);
                for t in 0..k * k {
                    let from = source(a.dims, first, at, [t / k, t % k]) + i;
                    dweight[i * k * k + t] += dc * a.x[from].f64();
                    dx[from] = dc * a.weight[i * k * k + t].f64();
                }
            }
        }
        store(a.dx, &dx);
        store(a.dweight, &dweight);
        store(a.dbias, &dbias);
        store(a.dgamma, &dgamma);
        store(a.dbeta, &dbeta);
    }

    fn store<T: Real>(out: Option<&mut [T]>, sums: &[f64]) {
        out.into_iter().flatten().zip(sums).for_each(|(o, v)| *o = T::from_f64(*v));
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::check::{Tolerance, assert_close};
    use crate::generated::kv_compress::{Backward, Dims, Forward, Params};

    /// A 3 × 5 grid has one row of two squares; two channels normalise to ±1.
    #[test]
    fn squares_by_hand() {
        let dims = Dims { b: 1, gh: 3, gw: 5, r: 3, d: 2, k: 2 };
        let params = Params { first: 1, eps: 0.0 };
        // Token t has query 99, key [t, 0] and value [0, 10 + t].
        let x: Vec<f32> = (0..15).map(|t| t as f32).flat_map(|t| [99.0, 99.0, t, 0.0, 0.0, 10.0 + t]).collect();
        let weight = [0.25, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0, 1.0];
        let (bias, gamma, beta) = ([1.0, 2.0], [2.0, 3.0], [10.0, 20.0]);
        for (forward, backward) in [
            (reference::forward as fn(Forward<'_, f32>), reference::backward as fn(Backward<'_, f32>)),
            (cpu::forward, cpu::backward),
        ] {
            let (mut y, mut mean, mut rstd) = ([0.0; 8], [0.0; 4], [0.0; 4]);
            forward(Forward {
                dims,
                params,
                x: &x,
                weight: &weight,
                bias: &bias,
                gamma: &gamma,
                beta: &beta,
                y: &mut y,
                mean: &mut mean,
                rstd: &mut rstd,
            });
            // Convolved: keys [1 + 3, 2] and [1 + 5, 2], values [1, 2 + 16] and [1, 2 + 18].
            assert_close("mean", &mean, &[3.0, 9.5, 4.0, 10.5], Tolerance::F32);
            assert_close("rstd", &rstd, &[1.0, 1.0 / 8.5, 0.5, 1.0 / 9.5], Tolerance::F32);
            assert_close("y", &y, &[12.0, 17.0, 8.0, 23.0, 12.0, 17.0, 8.0, 23.0], Tolerance::F32);
            let [mut dx, mut dweight] = [vec![7.0; 90], vec![7.0; 8]];
            let [mut dbias, mut dgamma, mut dbeta] = [0; 3].map(|_| [7.0; 2]);
            backward(Backward {
                dims,
                params,
                dy: &[1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 4.0, 0.0],
                x: &x,
                weight: &weight,
                bias: &bias,
                gamma: &gamma,
                mean: &mean,
                rstd: &rstd,
                dx: Some(&mut dx),
                dweight: Some(&mut dweight),
                dbias: Some(&mut dbias),
                dgamma: Some(&mut dgamma),
                dbeta: Some(&mut dbeta),
            });
            // Two normalised channels are ±1 whatever comes in, so nothing goes back through them.
            assert_close("dx", &dx, &[0.0; 90], Tolerance::F32);
            assert_close("dweight", &dweight, &[0.0; 8], Tolerance { atol: 1e-4, ..Tolerance::F32 });
            assert_close("dbias", &dbias, &[0.0; 2], Tolerance::F32);
            assert_close("dgamma", &dgamma, &[1.0 - 4.0, -2.0], Tolerance::F32);
            assert_close("dbeta", &dbeta, &[5.0, 2.0], Tolerance::F32);
        }
    }
}
