//! `y = u·rstd(u)·weight`, `u` the input or its gated self: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::generated::rms_norm::{Backward, Dims, Forward};

    fn silu(z: f64) -> f64 {
        z / (1.0 + (-z).exp())
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, n, d, w } = a.dims;
        for row in 0..b * n {
            let gate = |i: usize| a.gate.map_or(1.0, |z| silu(z[row * w + a.params.gate_offset + i].f64()));
            let u = |i: usize| a.x[row * d + i].f64() * gate(i);
            let mean = (0..d).map(|i| u(i) * u(i)).sum::<f64>() / d as f64;
            let rstd = 1.0 / (mean + f64::from(a.params.eps)).sqrt();
            (0..d).for_each(|i| a.y[row * d + i] = T::from_f64(u(i) * rstd * a.weight[i].f64()));
            a.rstd[row] = T::from_f64(rstd);
        }
    }

    /// Backward pass: with g = dy·weight, du = rstd·(g − u·rstd²·mean(g·u)); dx = du·silu(z), dz = du·x·silu'(z).
    pub fn backward<T: Real>(mut a: Backward<'_, T>) {
        let Dims { b, n, d, w } = a.dims;
        let mut d_weight = vec![0.0f64; d];
        if let Some(out) = &mut a.dgate {
            out.fill(T::default());
        }
        for row in 0..b * n {
            let rstd = a.rstd[row].f64();
            let z = |i: usize| a.gate.map(|z| z[row * w + a.params.gate_offset + i].f64());
            let u = |i: usize| a.x[row * d + i].f64() * z(i).map_or(1.0, silu);
            let g = |i: usize| a.dy[row * d + i].f64() * a.weight[i].f64();
            let mean = (0..d).map(|i| g(i) * u(i)).sum::<f64>() / d as f64;
            for i in 0..d {
                d_weight[i] += a.dy[row * d + i].f64() * u(i) * rstd;
                let du = rstd * (g(i) - u(i) * rstd * rstd * mean);
                if let Some(out) = &mut a.dx {
                    out[row * d + i] = T::from_f64(du * z(i).map_or(1.0, silu));
                }
                if let (Some(out), Some(z)) = (&mut a.dgate, z(i)) {
                    let s = 1.0 / (1.0 + (-z).exp());
                    let slope = s * (1.0 + z * (1.0 - s));
                    out[row * w + a.params.gate_offset + i] = T::from_f64(du * a.x[row * d + i].f64() * slope);
                }
            }
        }
        a.dweight.into_iter().flatten().zip(d_weight).for_each(|(o, v)| *o = T::from_f64(v));
    }
}

#[cfg(test)]
mod tests {
    use super::reference;
    use crate::generated::rms_norm::{Dims, Forward, Params};

    fn run(x: &[f64; 2], gate: Option<&[f64]>, w: usize, params: Params) -> ([f64; 2], [f64; 1]) {
        let (mut y, mut rstd) = ([0.0; 2], [0.0; 1]);
        let dims = Dims { b: 1, n: 1, d: 2, w };
        reference::forward(Forward { dims, params, x, gate, weight: &[10.0, 1.0], y: &mut y, rstd: &mut rstd });
        (y, rstd)
    }

    #[test]
    fn two_values_by_hand() {
        // Mean square of [1, 7] is 25.
        let (y, rstd) = run(&[1.0, 7.0], None, 0, Params { gate_offset: 0, eps: 0.0 });
        assert!((y[0] - 2.0).abs() < 1e-12 && (y[1] - 1.4).abs() < 1e-12 && (rstd[0] - 0.2).abs() < 1e-12);
    }

    #[test]
    fn the_gate_comes_first() {
        // silu(0) = 0 and silu(30) = 30: u = [0, 30·x], whose root mean square is |30·x|/√2 whatever x.
        let (y, _) = run(&[5.0, -3.0], Some(&[9.0, 0.0, 30.0]), 3, Params { gate_offset: 1, eps: 0.0 });
        assert!(y[0] == 0.0 && (y[1] + 2f64.sqrt()).abs() < 1e-9, "{y:?}");
    }
}
