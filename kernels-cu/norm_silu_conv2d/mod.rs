//! Group norm, SiLU and the convolution behind them: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

use crate::generated::{conv2d, group_norm_silu, norm_silu_conv2d};

/// Sizes of the norm.
pub(crate) fn norm_dims(dims: norm_silu_conv2d::Dims) -> group_norm_silu::Dims {
    let norm_silu_conv2d::Dims { b, h, w, c, g, .. } = dims;
    group_norm_silu::Dims { b, h, w, c, g }
}

/// Settings of the norm.
pub(crate) fn norm_params(params: norm_silu_conv2d::Params) -> group_norm_silu::Params {
    group_norm_silu::Params { eps: params.eps, silu: true }
}

/// Sizes and settings of the convolution.
pub(crate) fn conv(dims: norm_silu_conv2d::Dims, params: norm_silu_conv2d::Params) -> (conv2d::Dims, conv2d::Params) {
    let norm_silu_conv2d::Dims { b, h, w, c, f, kh, kw, .. } = dims;
    let params = conv2d::Params { stride: 1, pad_h: kh / 2, pad_w: kw / 2, relu: false, bf16: params.bf16 };
    (conv2d::Dims { b, h, w, c, f, kh, kw, oh: h, ow: w }, params)
}

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::generated::norm_silu_conv2d::{Dims, Forward};
    use crate::{Real, Weight};
    use half::bf16;

    /// The activation of every pixel and channel, in f64.
    fn activated<T: Real>(a: &Forward<'_, T>) -> Vec<f64> {
        let Dims { b, h, w, c, g, .. } = a.dims;
        let (mut out, width) = (vec![0.0; b * h * w * c], c / g);
        for (image, group) in (0..b).flat_map(|image| (0..g).map(move |group| (image, group))) {
            let pixels = image * h * w..(image + 1) * h * w;
            let of = pixels.flat_map(|pixel| (group * width..(group + 1) * width).map(move |i| pixel * c + i));
            let count = (h * w * width) as f64;
            let mean = of.clone().map(|i| a.x[i].f64()).sum::<f64>() / count;
            let variance = of.clone().map(|i| (a.x[i].f64() - mean).powi(2)).sum::<f64>() / count;
            let rstd = 1.0 / (variance + f64::from(a.params.eps)).sqrt();
            for i in of {
                let n = (a.x[i].f64() - mean) * rstd * a.gamma[i % c].f64() + a.beta[i % c].f64();
                out[i] = n / (1.0 + (-n).exp());
            }
        }
        out
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { h, w, c, f, kh, kw, .. } = a.dims;
        let ready = activated(&a);
        let rounded = a.params.bf16 || matches!(a.filters, Weight::Bf16(_));
        // By way of f32: `bf16::from_f64` drops the low half of the f64 and so misjudges what is a tie.
        let round = |v: f64| if rounded { bf16::from_f32(v as f32).to_f64() } else { v };
        for (at, y) in a.y.iter_mut().enumerate() {
            let (filter, j, i, image) = (at % f, at / f % w, at / (f * w) % h, at / (f * w * h));
            let mut sum = a.bias.map_or(0.0, |bias| bias[filter].f64()) + a.residual.map_or(0.0, |r| r[at].f64());
            for (p, q) in (0..kh).flat_map(|p| (0..kw).map(move |q| (p, q))) {
                let row = (i + p).checked_sub(kh / 2).filter(|&row| row < h);
                let column = (j + q).checked_sub(kw / 2).filter(|&column| column < w);
                let (Some(row), Some(column)) = (row, column) else { continue };
                let (pixel, kernel) = (((image * h + row) * w + column) * c, ((filter * kh + p) * kw + q) * c);
                sum += (0..c).map(|k| round(ready[pixel + k]) * round(a.filters.at(kernel + k))).sum::<f64>();
            }
            *y = T::from_f64(sum);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Weight;
    use crate::generated::norm_silu_conv2d::{Dims, Forward, Params};

    #[test]
    fn two_pixels_by_hand() {
        // One group of one channel: mean 2, variance 1 with eps 0, n = ∓1·2 + 0.5; a = −1.5·s(−1.5), 2.5·s(2.5).
        let dims = Dims { b: 1, h: 1, w: 2, c: 1, g: 1, f: 1, kh: 1, kw: 3 };
        let params = Params { eps: 0.0, bf16: false };
        let (x, gamma, beta) = ([1.0f32, 3.0], [2.0], [0.5]);
        let (filters, bias, residual) = ([10.0, 1.0, 100.0], [7.0], [0.25, 0.5]);
        let a = [-1.5f64 / (1.0 + 1.5f64.exp()), 2.5 / (1.0 + (-2.5f64).exp())];
        // Nothing outside of the picture, not even the SiLU of the shift.
        let want = [7.25 + a[0] + 100.0 * a[1], 7.5 + 10.0 * a[0] + a[1]];
        for path in [reference::forward::<f32>, cpu::forward] {
            let mut y = [f32::NAN; 2];
            path(Forward {
                dims,
                params,
                x: &x,
                gamma: &gamma,
                beta: &beta,
                filters: Weight::Native(&filters),
                bias: Some(&bias),
                residual: Some(&residual),
                y: &mut y,
            });
            for (y, want) in y.iter().zip(want) {
                assert!((f64::from(*y) - want).abs() < 1e-4, "{y} is not {want}");
            }
        }
    }
}
