//! `y = residual + gate·branch`: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::generated::gate_residual::{Backward, Dims, Forward};

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, n, c, d } = a.dims;
        for i in 0..b * n * d {
            let gate = a.modulation[(i / (n * d) * c + a.params.gate_row) * d + i % d].f64();
            a.y[i] = T::from_f64(a.residual[i].f64() + gate * a.branch[i].f64());
        }
    }

    /// Backward pass: dbranch = gate·dy, dgate = Σ_n branch·dy.
    pub fn backward<T: Real>(mut a: Backward<'_, T>) {
        let Dims { b, n, c, d } = a.dims;
        let mut table = vec![0.0f64; b * c * d];
        for i in 0..b * n * d {
            let at = (i / (n * d) * c + a.params.gate_row) * d + i % d;
            table[at] += a.dy[i].f64() * a.branch[i].f64();
            if let Some(out) = &mut a.dbranch {
                out[i] = T::from_f64(a.dy[i].f64() * a.modulation[at].f64());
            }
        }
        if let Some(out) = a.dmodulation {
            out.iter_mut().zip(table).for_each(|(o, v)| *o = T::from_f64(v));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::reference;
    use crate::generated::gate_residual::{Dims, Forward, Params};

    #[test]
    fn by_hand() {
        let mut y = [0.0f32; 2];
        reference::forward(Forward {
            dims: Dims { b: 1, n: 2, c: 2, d: 1 },
            params: Params { gate_row: 1 },
            residual: &[1.0, 2.0],
            modulation: &[100.0, 3.0],
            branch: &[10.0, 20.0],
            y: &mut y,
        });
        assert_eq!(y, [31.0, 62.0]);
    }
}
