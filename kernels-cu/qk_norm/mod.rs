//! LayerNorm of the queries and keys of a packed projection: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::generated::qk_norm::{Backward, Dims, Forward};

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, n, d } = a.dims;
        for token in 0..b * n {
            for part in 0..3 {
                let first = (token * 3 + part) * d;
                let Some((gamma, beta)) = [(a.q_gamma, a.q_beta), (a.k_gamma, a.k_beta)].get(part).copied() else {
                    (0..d).for_each(|i| a.y[first + i] = a.x[first + i]);
                    continue;
                };
                let x = |i: usize| a.x[first + i].f64();
                let mean = (0..d).map(x).sum::<f64>() / d as f64;
                let var = (0..d).map(|i| (x(i) - mean).powi(2)).sum::<f64>() / d as f64;
                let rstd = 1.0 / (var + f64::from(a.params.eps)).sqrt();
                for i in 0..d {
                    a.y[first + i] = T::from_f64((x(i) - mean) * rstd * gamma[i].f64() + beta[i].f64());
                }
                (a.mean[token * 2 + part], a.rstd[token * 2 + part]) = (T::from_f64(mean), T::from_f64(rstd));
            }
        }
    }

    /// Backward pass: with g = dy·gamma, dx = rstd·(g − mean(g) − n·mean(g·n)).
    pub fn backward<T: Real>(mut a: Backward<'_, T>) {
        let Dims { b, n, d } = a.dims;
        let mut sums = vec![0.0f64; 4 * d];
        for token in 0..b * n {
            for part in 0..3 {
                let first = (token * 3 + part) * d;
                let Some(gamma) = [a.q_gamma, a.k_gamma].get(part).copied() else {
                    if let Some(dx) = &mut a.dx {
                        (0..d).for_each(|i| dx[first + i] = a.dy[first + i]);
                    }
                    continue;
                };
                let (mean, rstd) = (a.mean[token * 2 + part].f64(), a.rstd[token * 2 + part].f64());
                let norm = |i: usize| (a.x[first + i].f64() - mean) * rstd;
                let g = |i: usize| a.dy[first + i].f64() * gamma[i].f64();
                let mean_g = (0..d).map(g).sum::<f64>() / d as f64;
                let mean_gn = (0..d).map(|i| g(i) * norm(i)).sum::<f64>() / d as f64;
                for i in 0..d {
                    sums[2 * part * d + i] += a.dy[first + i].f64() * norm(i);
                    sums[(2 * part + 1) * d + i] += a.dy[first + i].f64();
                    if let Some(dx) = &mut a.dx {
                        dx[first + i] = T::from_f64(rstd * (g(i) - mean_g - norm(i) * mean_gn));
                    }
                }
            }
        }
        let outputs = [a.dq_gamma, a.dq_beta, a.dk_gamma, a.dk_beta];
        for (out, sums) in outputs.into_iter().zip(sums.chunks(d)) {
            out.into_iter().flatten().zip(sums).for_each(|(o, v)| *o = T::from_f64(*v));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::check::{Tolerance, assert_close};
    use crate::generated::qk_norm::{Dims, Forward, Params};

    #[test]
    fn a_token_by_hand() {
        // Queries 1 and 7: mean 4, deviation 3. Keys 2 and 2: deviation 0, so only eps counts. Values pass.
        let x = [1.0, 7.0, 2.0, 2.0, -5.0, 6.0];
        for forward in [reference::forward::<f32>, cpu::forward] {
            let (mut y, mut mean, mut rstd) = ([f32::NAN; 6], [f32::NAN; 2], [f32::NAN; 2]);
            forward(Forward {
                dims: Dims { b: 1, n: 1, d: 2 },
                params: Params { eps: 16.0 },
                x: &x,
                q_gamma: &[5.0, 10.0],
                q_beta: &[0.0, 1.0],
                k_gamma: &[1.0, 1.0],
                k_beta: &[3.0, 4.0],
                y: &mut y,
                mean: &mut mean,
                rstd: &mut rstd,
            });
            assert_close("y", &y, &[-3.0, 7.0, 3.0, 4.0, -5.0, 6.0], Tolerance::F32);
            assert_close("moments", &[mean[0], mean[1], rstd[0], rstd[1]], &[4.0, 2.0, 0.2, 0.25], Tolerance::F32);
        }
    }
}
