//! `y = LN(x)·(1 + scale) + shift`: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::generated::ln_modulate::{Backward, Dims, Forward};

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, n, c, d } = a.dims;
        for token in 0..b * n {
            let x = &a.x[token * d..][..d];
            let table = &a.modulation[token / n * c * d..][..c * d];
            let mean = x.iter().map(|v| v.f64()).sum::<f64>() / d as f64;
            let var = x.iter().map(|v| (v.f64() - mean).powi(2)).sum::<f64>() / d as f64;
            let rstd = 1.0 / (var + f64::from(a.params.eps)).sqrt();
            for i in 0..d {
                let (shift, scale) = (table[a.params.shift * d + i].f64(), table[a.params.scale * d + i].f64());
                a.y[token * d + i] = T::from_f64((x[i].f64() - mean) * rstd * (1.0 + scale) + shift);
            }
            (a.mean[token], a.rstd[token]) = (T::from_f64(mean), T::from_f64(rstd));
        }
    }

    /// Backward pass: with h = (x − mean)·rstd and g = dy·(1 + scale),
    /// dx = rstd·(g − mean_d(g) − h·mean_d(g·h)), dshift = Σ_n dy, dscale = Σ_n dy·h.
    pub fn backward<T: Real>(mut a: Backward<'_, T>) {
        let Dims { b, n, c, d } = a.dims;
        let mut table_grad = vec![0.0f64; b * c * d];
        for token in 0..b * n {
            let (mean, rstd) = (a.mean[token].f64(), a.rstd[token].f64());
            let base = token / n * c * d;
            let h = |i: usize| (a.x[token * d + i].f64() - mean) * rstd;
            let dy = |i: usize| a.dy[token * d + i].f64();
            let g = |i: usize| dy(i) * (1.0 + a.modulation[base + a.params.scale * d + i].f64());
            let mean_g = (0..d).map(g).sum::<f64>() / d as f64;
            let mean_gh = (0..d).map(|i| g(i) * h(i)).sum::<f64>() / d as f64;
            for i in 0..d {
                table_grad[base + a.params.shift * d + i] += dy(i);
                table_grad[base + a.params.scale * d + i] += dy(i) * h(i);
                if let Some(dx) = &mut a.dx {
                    dx[token * d + i] = T::from_f64(rstd * (g(i) - mean_g - h(i) * mean_gh));
                }
            }
        }
        if let Some(out) = a.dmodulation {
            out.iter_mut().zip(table_grad).for_each(|(o, v)| *o = T::from_f64(v));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::reference;
    use crate::generated::ln_modulate::{Dims, Forward, Params};

    #[test]
    fn two_values_by_hand() {
        // x = [1, 3]: mean 2, variance 1, normalised [-1, 1]; scale 1 doubles, shift adds [10, 20].
        let (mut y, mut mean, mut rstd) = ([0.0f64; 2], [0.0f64; 1], [0.0f64; 1]);
        reference::forward(Forward {
            dims: Dims { b: 1, n: 1, c: 2, d: 2 },
            params: Params { shift: 0, scale: 1, eps: 0.0 },
            x: &[1.0, 3.0],
            modulation: &[10.0, 20.0, 1.0, 1.0],
            y: &mut y,
            mean: &mut mean,
            rstd: &mut rstd,
        });
        assert_eq!((y, mean, rstd), ([8.0, 22.0], [2.0], [1.0]));
    }
}
