//! Group norm of images with channels last, and SiLU: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::generated::group_norm_silu::{Backward, Dims, Forward};

    fn sigmoid(z: f64) -> f64 {
        1.0 / (1.0 + (-z).exp())
    }

    /// Indices of the elements of one group of one image.
    fn members(Dims { h, w, c, g, .. }: Dims, group: usize) -> impl Iterator<Item = usize> + Clone {
        let (image, first, width) = (group / g, group % g * (c / g), c / g);
        (image * h * w..(image + 1) * h * w).flat_map(move |pixel| (first..first + width).map(move |i| pixel * c + i))
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, h, w, c, g } = a.dims;
        let count = (h * w * (c / g)) as f64;
        for group in 0..b * g {
            let of = members(a.dims, group);
            let own_mean = of.clone().map(|i| a.x[i].f64()).sum::<f64>() / count;
            let own_var = of.clone().map(|i| (a.x[i].f64() - own_mean).powi(2)).sum::<f64>() / count;
            let own = (own_mean, 1.0 / (own_var + f64::from(a.params.eps)).sqrt());
            let at = |row: usize| (group / g * 2 + row) * g + group % g;
            let (mean, rstd) = a.stats.map_or(own, |stats| (stats[at(0)].f64(), stats[at(1)].f64()));
            for i in of {
                let z = (a.x[i].f64() - mean) * rstd * a.gamma[i % c].f64() + a.beta[i % c].f64();
                a.y[i] = T::from_f64(if a.params.silu { z * sigmoid(z) } else { z });
            }
            (a.mean[group], a.rstd[group]) = (T::from_f64(mean), T::from_f64(rstd));
        }
    }

    /// Backward pass: with n = (x − mean)·rstd, u = dy·act'(z) and v = u·gamma, dx = rstd·(v − mean(v) − n·mean(v·n)),
    /// the means absent where the statistics are given.
    pub fn backward<T: Real>(mut a: Backward<'_, T>) {
        let Dims { b, h, w, c, g } = a.dims;
        let count = (h * w * (c / g)) as f64;
        let (mut d_gamma, mut d_beta) = (vec![0.0f64; c], vec![0.0f64; c]);
        for group in 0..b * g {
            let (mean, rstd) = (a.mean[group].f64(), a.rstd[group].f64());
            let n = |i: usize| (a.x[i].f64() - mean) * rstd;
            let u = |i: usize| {
                let z = n(i) * a.gamma[i % c].f64() + a.beta[i % c].f64();
                let s = sigmoid(z);
                a.dy[i].f64() * if a.params.silu { s * (1.0 + z * (1.0 - s)) } else { 1.0 }
            };
            let v = |i: usize| u(i) * a.gamma[i % c].f64();
            let own = if a.stats.is_some() { 0.0 } else { 1.0 / count };
            let mean_v = members(a.dims, group).map(v).sum::<f64>() * own;
            let mean_vn = members(a.dims, group).map(|i| v(i) * n(i)).sum::<f64>() * own;
            for i in members(a.dims, group) {
                d_gamma[i % c] += u(i) * n(i);
                d_beta[i % c] += u(i);
                if let Some(dx) = &mut a.dx {
                    dx[i] = T::from_f64(rstd * (v(i) - mean_v - n(i) * mean_vn));
                }
            }
        }
        a.dgamma.into_iter().flatten().zip(d_gamma).for_each(|(o, v)| *o = T::from_f64(v));
        a.dbeta.into_iter().flatten().zip(d_beta).for_each(|(o, v)| *o = T::from_f64(v));
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::check::{Tolerance, assert_close};
    use crate::generated::group_norm_silu::{Dims, Forward, Params};

    const DIMS: Dims = Dims { b: 1, h: 1, w: 2, c: 4, g: 2 };

    fn both(params: Params, stats: Option<&[f32]>, want: [f32; 8], moments: [f32; 4]) {
        // Two pixels of two groups of variance 16: 18 10 10 18 about 14, and 0 0 8 8 about 4.
        let x = [18.0, 10.0, 0.0, 0.0, 10.0, 18.0, 8.0, 8.0];
        let (gamma, beta) = ([1.0, 1.0, 4.0, 2.0], [0.0, 0.0, 0.0, 1.0]);
        for forward in [reference::forward::<f32>, cpu::forward] {
            let (mut y, mut mean, mut rstd) = ([f32::NAN; 8], [f32::NAN; 2], [f32::NAN; 2]);
            forward(Forward {
                dims: DIMS,
                params,
                x: &x,
                gamma: &gamma,
                beta: &beta,
                stats,
                y: &mut y,
                mean: &mut mean,
                rstd: &mut rstd,
            });
            assert_close("y", &y, &want, Tolerance::F32);
            assert_close("moments", &[mean[0], mean[1], rstd[0], rstd[1]], &moments, Tolerance::F32);
        }
    }

    #[test]
    fn two_groups_by_hand() {
        let want = [0.8, -0.8, -3.2, -0.6, -0.8, 0.8, 3.2, 2.6];
        both(Params { eps: 9.0, silu: false }, None, want, [14.0, 4.0, 0.2, 0.2]);
    }

    #[test]
    fn given_statistics_replace_those_of_the_strip() {
        // Mean 16 and rstd 2 in the first group, mean 8 and rstd 0.25 in the second; silu(z) = z/(1 + e^-z).
        let silu = |z: f32| z / (1.0 + (-z).exp());
        let want = [4.0, -12.0, -8.0, -3.0, -12.0, 4.0, 0.0, 1.0].map(silu);
        both(Params { eps: 1.0, silu: true }, Some(&[16.0, 8.0, 2.0, 0.25]), want, [16.0, 8.0, 2.0, 0.25]);
    }
}
