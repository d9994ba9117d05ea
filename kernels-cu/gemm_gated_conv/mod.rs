//! The in-projection of Hyena-X with its convolution and gates: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

use crate::generated::{gated_conv, gemm, gemm_gated_conv};

/// Sizes and settings of the projection alone.
pub(crate) fn projection(dims: gemm_gated_conv::Dims, params: gemm_gated_conv::Params) -> (gemm::Dims, gemm::Params) {
    let gemm_gated_conv::Dims { b, n, d, c, .. } = dims;
    (gemm::Dims { b, n, k: d, f: 3 * c, c: 0 }, gemm::Params { act: 0, gate_row: 0, bf16: params.bf16 })
}

/// Sizes and settings of the convolution and the gates alone.
pub(crate) fn gates(
    dims: gemm_gated_conv::Dims,
    params: gemm_gated_conv::Params,
) -> (gated_conv::Dims, gated_conv::Params) {
    let gemm_gated_conv::Dims { b, n, c, k, .. } = dims;
    (gated_conv::Dims { b, n, c, k }, gated_conv::Params { lead: params.lead, reversed: params.reversed })
}

/// The oracle: those of the two operators that it is made of, one after the other, in f64 throughout.
pub mod reference {
    use super::{gates, projection};
    use crate::generated::gemm_gated_conv::{Backward, Dims, Forward, Params};
    use crate::generated::{gated_conv, gemm};
    use crate::{Real, Weight};

    fn wide<T: Real>(x: &[T]) -> Vec<f64> {
        x.iter().map(|v| v.f64()).collect()
    }

    fn narrow<T: Real>(to: &mut [T], from: &[f64]) {
        to.iter_mut().zip(from).for_each(|(to, v)| *to = T::from_f64(*v));
    }

    /// The weight in f64, and the settings that round it where its storage does.
    fn weight<T: Real>((dims, params): (Dims, Params), w: &Weight<'_, T>) -> (Vec<f64>, Params) {
        let bf16 = params.bf16 || matches!(w, Weight::Bf16(_));
        ((0..3 * dims.c * dims.d).map(|i| w.at(i)).collect(), Params { bf16, ..params })
    }

    fn project((dims, params): (Dims, Params), x: &[f64], w: &[f64], bias: Option<&[f64]>) -> Vec<f64> {
        let mut p = vec![0.0; dims.b * dims.n * 3 * dims.c];
        let (dims, params) = projection(dims, params);
        let (w, y) = (Weight::Native(w), &mut p[..]);
        let of = gemm::Forward { dims, params, x, w, bias, pos: None, gate: None, residual: None, y, pre: None };
        crate::gemm::reference::forward(of);
        p
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let (w, params) = weight((a.dims, a.params), &a.w);
        let p = project((a.dims, params), &wide(a.x), &w, a.bias.map(wide).as_deref());
        if let Some(to) = a.p {
            narrow(to, &p);
        }
        let (short_weight, short_bias) = (wide(a.short_weight), wide(a.short_bias));
        let mut y = vec![0.0; a.y.len()];
        let (dims, params) = gates(a.dims, params);
        crate::gated_conv::reference::forward(gated_conv::Forward {
            dims,
            params,
            p: &p,
            short_weight: Some(&short_weight),
            short_bias: Some(&short_bias),
            inner_weight: None,
            inner_bias: None,
            y: &mut y,
        });
        narrow(a.y, &y);
    }

    /// Backward pass: through the gates and the convolution to dp, then through the product.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let (w, params) = weight((a.dims, a.params), &a.w);
        let (x, of) = (wide(a.x), (a.dims, params));
        let p = a.p.map_or_else(|| project(of, &x, &w, a.bias.map(wide).as_deref()), wide);
        let (short_weight, short_bias) = (wide(a.short_weight), wide(a.short_bias));
        let [mut dp, mut dw, mut dbias] = [p.len(), w.len(), 3 * a.dims.c].map(|len| vec![0.0; len]);
        let [mut dx, mut dshort, mut dshort_bias] =
            [x.len(), short_weight.len(), short_bias.len()].map(|len| vec![0.0; len]);
        let (dims, settings) = gates(a.dims, params);
        crate::gated_conv::reference::backward(gated_conv::Backward {
            dims,
            params: settings,
            dy: &wide(a.dy),
            p: &p,
            short_weight: Some(&short_weight),
            short_bias: Some(&short_bias),
            inner_weight: None,
            inner_bias: None,
            dp: Some(&mut dp),
            dshort_weight: Some(&mut dshort),
            dshort_bias: Some(&mut dshort_bias),
            dinner_weight: None,
            dinner_bias: None,
        });
        let (dims, params) = projection(a.dims, params);
        crate::gemm::reference::backward(gemm::Backward {
            dims,
            params,
            dy: &dp,
            x: &x,
            w: Weight::Native(&w),
            gate: None,
            pre: None,
            dx: Some(&mut dx),
            dw: Some(&mut dw),
            dbias: Some(&mut dbias),
            dpos: None,
            dgate: None,
        });
        let all = [(a.dx, dx), (a.dw, dw), (a.dbias, dbias), (a.dshort_weight, dshort), (a.dshort_bias, dshort_bias)];
        all.into_iter().for_each(|(to, from)| to.into_iter().for_each(|to| narrow(to, &from)));
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Weight;
    use crate::generated::gemm_gated_conv::{Dims, Forward, Params};

    #[test]
    fn two_tokens_by_hand() {
        // One channel, x = (1, 2), (3, 4). q = x0, k = x1 + 10, v = x0 + x1 + 0.5: q = 1, 3; k = 12, 14; v = 3.5, 7.5.
        // Taps (2, 1) of q, (0, 1) of k and v, biases 0, 1, 0: q = 1, 2·1 + 3 = 5; k = 13, 15; v as it was.
        let short_weight = [2.0, 1.0, 0.0, 1.0, 0.0, 1.0];
        for (reversed, want) in [(0, [1.0 * 13.0 * 3.5, 5.0 * 15.0 * 7.5]), (1, [7.0 * 13.0 * 3.5, 3.0 * 15.0 * 7.5])] {
            for path in [reference::forward::<f32>, cpu::forward] {
                let (mut y, mut p) = ([f32::NAN; 2], [f32::NAN; 6]);
                path(Forward {
                    dims: Dims { b: 1, n: 2, d: 2, c: 1, k: 2 },
                    params: Params { lead: 1, reversed, bf16: false },
                    x: &[1.0, 2.0, 3.0, 4.0],
                    w: Weight::Native(&[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]),
                    bias: Some(&[0.0, 10.0, 0.5]),
                    short_weight: &short_weight,
                    short_bias: &[0.0, 1.0, 0.0],
                    y: &mut y,
                    p: Some(&mut p),
                });
                assert_eq!((y, p), (want, [1.0, 12.0, 3.5, 3.0, 14.0, 7.5]), "reversed {reversed}");
            }
        }
    }
}
