//! What happens to a product after the sums: bias, positions, activation, gate and residual, and their derivatives.

use crate::generated::gemm::{Backward, Dims, Params};
use crate::simd::{sigmoid, sin_cos, vectorised};

/// The optional tensors of the forward epilogue.
#[derive(Clone, Copy)]
pub struct Epilogue<'a> {
    /// Dims of the whole call.
    pub dims: Dims,
    /// Parameters of the call.
    pub params: Params,
    /// [F]
    pub bias: Option<&'a [f32]>,
    /// [N, F]
    pub pos: Option<&'a [f32]>,
    /// [B, C, F]
    pub gate: Option<&'a [f32]>,
    /// [B, N, F]
    pub residual: Option<&'a [f32]>,
}

impl Epilogue<'_> {
    /// Turns columns `from..from + y.len()` of row `row` from the product into the result, and saves u in `pre`.
    pub fn row(&self, row: usize, from: usize, y: &mut [f32], pre: Option<&mut [f32]>) {
        let Dims { n, f, c, .. } = self.dims;
        let len = y.len();
        let bias = self.bias.map(|t| &t[from..][..len]);
        let pos = self.pos.map(|t| &t[row % n * f + from..][..len]);
        let gate = self.gate.map(|t| &t[(row / n * c + self.params.gate_row) * f + from..][..len]);
        let residual = self.residual.map(|t| &t[row * f + from..][..len]);
        vectorised(
            #[inline(always)]
            || {
                [bias, pos].into_iter().flatten().for_each(|t| zip(y, t, |y, t| y + t));
                if let Some(pre) = pre {
                    pre.copy_from_slice(y);
                }
                match self.params.act {
                    0 => {}
                    1 => y.iter_mut().for_each(|y| *y = gelu(*y).0),
                    2 => y.iter_mut().for_each(|y| *y = silu(*y).0),
                    _ => y.iter_mut().for_each(|y| *y = sin_cos(*y).0),
                }
                if let Some(gate) = gate {
                    zip(y, gate, |y, gate| y * gate);
                }
                if let Some(residual) = residual {
                    zip(y, residual, |y, residual| y + residual);
                }
            },
        );
    }
}

#[inline(always)]
fn zip(out: &mut [f32], with: &[f32], f: impl Fn(f32, f32) -> f32) {
    for (out, with) in out.iter_mut().zip(with) {
        *out = f(*out, *with);
    }
}

/// GELU in its tanh form and its derivative: u·σ(2z), z = √(2/π)·(u + 0.044715·u³).
#[inline(always)]
fn gelu(u: f32) -> (f32, f32) {
    const SCALE: f32 = 1.595_769;
    const CUBIC: f32 = 0.044_715;
    let square = u * u;
    let s = sigmoid(SCALE * u * CUBIC.mul_add(square, 1.0));
    (u * s, (u * s * (1.0 - s) * SCALE).mul_add((3.0 * CUBIC).mul_add(square, 1.0), s))
}

/// u·σ(u) and its derivative.
#[inline(always)]
fn silu(u: f32) -> (f32, f32) {
    let s = sigmoid(u);
    (u * s, (u * s).mul_add(1.0 - s, s))
}

/// Row `row` of du = dy·gate·act′(u).
pub fn pre_gradient(a: &Backward<'_, f32>, row: usize, du: &mut [f32]) {
    let Dims { n, f, c, .. } = a.dims;
    let dy = &a.dy[row * f..][..f];
    let gate = a.gate.map(|t| &t[(row / n * c + a.params.gate_row) * f..][..f]);
    let pre = a.pre.map(|t| &t[row * f..][..f]).unwrap_or(dy);
    vectorised(
        #[inline(always)]
        || {
            match a.params.act {
                0 => du.copy_from_slice(dy),
                1 => du.iter_mut().zip(dy).zip(pre).for_each(|((du, dy), u)| *du = dy * gelu(*u).1),
                2 => du.iter_mut().zip(dy).zip(pre).for_each(|((du, dy), u)| *du = dy * silu(*u).1),
                _ => du.iter_mut().zip(dy).zip(pre).for_each(|((du, dy), u)| *du = dy * sin_cos(*u).1),
            }
            if let Some(gate) = gate {
                zip(du, gate, |du, gate| du * gate);
            }
        },
    );
}

/// `sum[i] += a[i]·b[i]`, or `sum[i] += a[i]` without `b`.
pub fn accumulate(sum: &mut [f32], a: &[f32], b: Option<&[f32]>) {
    vectorised(
        #[inline(always)]
        || match b {
            Some(b) => sum.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum = a.mul_add(*b, *sum)),
            None => zip(sum, a, |sum, a| sum + a),
        },
    );
}
