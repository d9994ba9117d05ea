//! `y = residual + gate·act(x·wᵀ + bias + pos)`: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;
pub mod product;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::generated::gemm::{Backward, Dims, Forward, Params};
    use crate::{Real, Weight};
    use half::bf16;

    /// What the products round their operands to: bf16 where the parameter or the weight's storage says so.
    fn rounding<T>(params: Params, w: &Weight<'_, T>) -> impl Fn(f64) -> f64 + Copy + use<T> {
        let to_bf16 = params.bf16 || matches!(w, Weight::Bf16(_));
        // By way of f32: `bf16::from_f64` drops the low half of the f64 and so misjudges what is a tie.
        move |v| if to_bf16 { bf16::from_f32(v as f32).to_f64() } else { v }
    }

    fn sigmoid(v: f64) -> f64 {
        1.0 / (1.0 + (-v).exp())
    }

    /// act(u) and act′(u). GELU in its tanh form is u·σ(2z), z = √(2/π)·(u + 0.044715·u³).
    pub fn activation(act: usize, u: f64) -> (f64, f64) {
        let (s, slope) = match act {
            0 => return (u, 1.0),
            1 => {
                let scale = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
                (sigmoid(scale * (u + 0.044715 * u.powi(3))), scale * (1.0 + 3.0 * 0.044715 * u * u))
            }
            2 => (sigmoid(u), 1.0),
            _ => return u.sin_cos(),
        };
        (u * s, s + u * s * (1.0 - s) * slope)
    }

    /// Forward pass.
    pub fn forward<T: Real>(mut a: Forward<'_, T>) {
        let Dims { b, n, k, f, c } = a.dims;
        let round = rounding(a.params, &a.w);
        for (row, column) in (0..b * n * f).map(|i| (i / f, i % f)) {
            let product: f64 = (0..k).map(|j| round(a.x[row * k + j].f64()) * round(a.w.at(column * k + j))).sum();
            let bias = a.bias.map_or(0.0, |bias| bias[column].f64());
            let pos = a.pos.map_or(0.0, |pos| pos[row % n * f + column].f64());
            let gate = a.gate.map_or(1.0, |gate| gate[(row / n * c + a.params.gate_row) * f + column].f64());
            let residual = a.residual.map_or(0.0, |residual| residual[row * f + column].f64());
            let u = product + bias + pos;
            a.y[row * f + column] = T::from_f64(residual + gate * activation(a.params.act, u).0);
            if let Some(pre) = &mut a.pre {
                pre[row * f + column] = T::from_f64(u);
            }
        }
    }

    /// Backward pass: with du = dy·gate·act′(u), dx = du·w, dw = duᵀ·x, dbias = Σ_bn du, dpos = Σ_b du,
    /// dgate = Σ_n dy·u.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let Dims { b, n, k, f, c } = a.dims;
        let round = rounding(a.params, &a.w);
        let (mut dx, mut dw) = (vec![0.0; b * n * k], vec![0.0; f * k]);
        let (mut dbias, mut dpos, mut dgate) = (vec![0.0; f], vec![0.0; n * f], vec![0.0; b * c * f]);
        for (row, column) in (0..b * n * f).map(|i| (i / f, i % f)) {
            let (dy, u) = (a.dy[row * f + column].f64(), a.pre.map_or(0.0, |pre| pre[row * f + column].f64()));
            let mut du = dy * activation(a.params.act, u).1;
            if let Some(gate) = a.gate {
                let at = (row / n * c + a.params.gate_row) * f + column;
                dgate[at] += dy * u;
                du *= gate[at].f64();
            }
            dbias[column] += du;
            dpos[row % n * f + column] += du;
            for j in 0..k {
                dx[row * k + j] += round(du) * round(a.w.at(column * k + j));
                dw[column * k + j] += round(du) * round(a.x[row * k + j].f64());
            }
        }
        for (out, sums) in [(a.dx, dx), (a.dw, dw), (a.dbias, dbias), (a.dpos, dpos), (a.dgate, dgate)] {
            if let Some(out) = out {
                out.iter_mut().zip(sums).for_each(|(o, v)| *o = T::from_f64(v));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::reference;
    use crate::Weight;
    use crate::generated::gemm::{Dims, Forward, Params};

    #[test]
    fn two_products_by_hand() {
        // x = [1, 2], w = [[3, 4], [5, 6]]: products 11 and 17; bias and pos make 11.5 and 16; gate doubles, residual adds.
        let (mut y, mut pre) = ([0.0f64; 2], [0.0f64; 2]);
        reference::forward(Forward {
            dims: Dims { b: 1, n: 1, k: 2, f: 2, c: 2 },
            params: Params { act: 0, gate_row: 1, bf16: false },
            x: &[1.0, 2.0],
            w: Weight::Native(&[3.0, 4.0, 5.0, 6.0]),
            bias: Some(&[0.5, 0.0]),
            pos: Some(&[0.0, -1.0]),
            gate: Some(&[7.0, 7.0, 2.0, 2.0]),
            residual: Some(&[100.0, 200.0]),
            y: &mut y,
            pre: Some(&mut pre),
        });
        assert_eq!((y, pre), ([123.0, 232.0], [11.5, 16.0]));
    }

    #[test]
    fn activations_at_one() {
        // GELU(1) in its tanh form is 0.8411920; SiLU(1) = 1/(1 + e⁻¹).
        let (gelu, slope) = reference::activation(1, 1.0);
        assert!((gelu - 0.841_191_990_608).abs() < 1e-9 && (slope - 1.082_964_083_8).abs() < 1e-9, "{gelu} {slope}");
        assert!((reference::activation(2, 1.0).0 - 0.731_058_578_630).abs() < 1e-12);
        assert_eq!(reference::activation(0, -3.0), (-3.0, 1.0));
        assert_eq!(reference::activation(3, 0.0), (0.0, 1.0));
    }

    #[test]
    fn bf16_rounds_the_operands() {
        // 1 + 2⁻⁹ is not a bf16 number: it rounds to 1 as an operand, and stays itself without rounding.
        for (bf16, want) in [(true, 1.0f32), (false, 1.001_953_1)] {
            let mut y = [0.0f32];
            reference::forward(Forward {
                dims: Dims { b: 1, n: 1, k: 1, f: 1, c: 0 },
                params: Params { act: 0, gate_row: 0, bf16 },
                x: &[1.001_953_1],
                w: Weight::Native(&[1.0]),
                bias: None,
                pos: None,
                gate: None,
                residual: None,
                y: &mut y,
                pre: None,
            });
            assert_eq!(y, [want]);
        }
    }
}
