//! Convolution of images, channels last: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::generated::conv2d::{Dims, Forward};
    use crate::{Real, Weight};
    use half::bf16;

    /// The pixel along one axis that tap `tap` of output `at` reads, where it is inside.
    fn source(at: usize, tap: usize, stride: usize, pad: usize, size: usize) -> Option<usize> {
        (at * stride + tap).checked_sub(pad).filter(|&s| s < size)
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { h, w, c, f, kh, kw, oh, ow, .. } = a.dims;
        let p = a.params;
        let rounded = p.bf16 || matches!(a.filters, Weight::Bf16(_));
        // By way of f32: `bf16::from_f64` drops the low half of the f64 and so misjudges what is a tie.
        let round = |v: f64| if rounded { bf16::from_f32(v as f32).to_f64() } else { v };
        for (at, y) in a.y.iter_mut().enumerate() {
            let (filter, j, i, image) = (at % f, at / f % ow, at / (f * ow) % oh, at / (f * ow * oh));
            let mut sum = a.bias.map_or(0.0, |bias| bias[filter].f64());
            for (tap_h, tap_w) in (0..kh).flat_map(|tap_h| (0..kw).map(move |tap_w| (tap_h, tap_w))) {
                let row = source(i, tap_h, p.stride, p.pad_h, h);
                let column = source(j, tap_w, p.stride, p.pad_w, w);
                let (Some(row), Some(column)) = (row, column) else { continue };
                let pixel = &a.x[((image * h + row) * w + column) * c..][..c];
                let kernel = ((filter * kh + tap_h) * kw + tap_w) * c;
                sum += pixel
                    .iter()
                    .enumerate()
                    .map(|(k, x)| round(x.f64()) * round(a.filters.at(kernel + k)))
                    .sum::<f64>();
            }
            *y = T::from_f64(if p.relu { sum.max(0.0) } else { sum });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Weight;
    use crate::generated::conv2d::{Dims, Forward, Params};

    const PARAMS: Params = Params { stride: 1, pad_h: 0, pad_w: 0, relu: false, bf16: false };

    fn both(dims: Dims, params: Params, x: &[f32], w: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
        let mut results = [reference::forward::<f32>, cpu::forward].map(|path| {
            let mut y = vec![f32::NAN; dims.b * dims.oh * dims.ow * dims.f];
            path(Forward { dims, params, x, filters: Weight::Native(w), bias, y: &mut y });
            y
        });
        assert_eq!(results[0], results[1]);
        std::mem::take(&mut results[0])
    }

    #[test]
    fn a_square_by_hand() {
        // x = 1 2 3 / 4 5 6 / 7 8 9, w = 1 10 / 100 1000: the first window is 1 + 20 + 400 + 5000.
        let x: Vec<f32> = (1..10).map(|v| v as f32).collect();
        let dims = Dims { b: 1, h: 3, w: 3, c: 1, f: 1, kh: 2, kw: 2, oh: 2, ow: 2 };
        let w = [1.0, 10.0, 100.0, 1000.0];
        assert_eq!(both(dims, PARAMS, &x, &w, None), [5421.0, 6532.0, 8754.0, 9865.0]);
        // One column and row of zeros before: the first window holds only 1000·1, the others 100·1 + 1000·2 and so on.
        let padded = Params { pad_h: 1, pad_w: 1, stride: 2, ..PARAMS };
        assert_eq!(both(dims, padded, &x, &w, None), [1000.0, 3200.0, 7040.0, 9865.0]);
        // Windows that end outside: the last column and row see zeros.
        let beyond = Dims { oh: 3, ow: 3, ..dims };
        assert_eq!(both(beyond, PARAMS, &x, &w, None)[2..9], [603.0, 8754.0, 9865.0, 906.0, 87.0, 98.0, 9.0]);
    }

    #[test]
    fn channels_filters_bias_and_relu_by_hand() {
        // One row of two pixels with two channels; filters of two taps.
        let dims = Dims { b: 1, h: 1, w: 2, c: 2, f: 2, kh: 1, kw: 2, oh: 1, ow: 1 };
        let (x, w) = ([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0, -1.0, 0.0, 0.0, -2.0]);
        assert_eq!(both(dims, PARAMS, &x, &w, Some(&[0.5, 1.0])), [10.5, -8.0]);
        assert_eq!(both(dims, Params { relu: true, ..PARAMS }, &x, &w, Some(&[0.5, 1.0])), [10.5, 0.0]);
    }
}
