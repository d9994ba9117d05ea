//! `gemm` with operands rounded to e4m3: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// Largest finite number of e4m3.
pub const LARGEST: f32 = 448.0;

/// `v` rounded to the nearest number of e4m3 (4 bits of exponent, 3 of mantissa, no infinity), ties to even; larger
/// ones saturate.
pub fn e4m3(v: f32) -> f32 {
    let size = v.abs();
    if size >= LARGEST {
        return LARGEST.copysign(v);
    }
    // Spacing of the numbers: three bits below the leading one, 2⁻⁹ below 2⁻⁶.
    let unit = if size < 0.015_625 { 0.001_953_125 } else { f32::from_bits((size.to_bits() >> 23 << 23) - (3 << 23)) };
    ((size / unit).round_ties_even() * unit).copysign(v)
}

/// The scale of a row: its largest magnitude becomes [`LARGEST`]; 1 for a row of zeros.
pub fn scale(row: impl Iterator<Item = f32>) -> f32 {
    let largest = row.fold(0.0f32, |largest, v| largest.max(v.abs()));
    if largest > 0.0 { largest / LARGEST } else { 1.0 }
}

/// The oracle: plain loops, f64 accumulation. Scales and quotients are f32, so that every path rounds the same numbers.
pub mod reference {
    use super::{e4m3, scale};
    use crate::Real;
    use crate::gemm::reference::activation;
    use crate::generated::gemm_fp8::{Dims, Forward};

    /// The rows of a matrix as e4m3 numbers, and their scales.
    fn rounded(rows: usize, k: usize, at: impl Fn(usize) -> f64) -> (Vec<f64>, Vec<f64>) {
        let scales: Vec<f32> = (0..rows).map(|r| scale((0..k).map(|j| at(r * k + j) as f32))).collect();
        let values = (0..rows * k).map(|i| f64::from(e4m3(at(i) as f32 / scales[i / k]))).collect();
        (values, scales.into_iter().map(f64::from).collect())
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, n, k, f, c } = a.dims;
        let (x, sx) = rounded(b * n, k, |i| a.x[i].f64());
        let (w, sw) = rounded(f, k, |i| a.w.at(i));
        for (row, column) in (0..b * n * f).map(|i| (i / f, i % f)) {
            let product: f64 = (0..k).map(|j| x[row * k + j] * w[column * k + j]).sum();
            let u = sx[row] * sw[column] * product + a.bias.map_or(0.0, |bias| bias[column].f64());
            let gate = a.gate.map_or(1.0, |gate| gate[(row / n * c + a.params.gate_row) * f + column].f64());
            let residual = a.residual.map_or(0.0, |residual| residual[row * f + column].f64());
            a.y[row * f + column] = T::from_f64(residual + gate * activation(a.params.act, u).0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, e4m3, reference};
    use crate::Weight;
    use crate::check::{Fill, draw_f64};
    use crate::generated::gemm_fp8::{Dims, Forward, Params};

    #[test]
    fn numbers_of_e4m3() {
        for (v, want) in [
            (1.0, 1.0),
            (1.0625, 1.0), // halfway between 1 and 1.125: to the even one
            (1.1875, 1.25),
            (17.0, 16.0),
            (19.0, 20.0),
            (447.0, 448.0),
            (1e9, 448.0),
            (-0.3, -0.3125),
            (0.001_953_125, 0.001_953_125), // the smallest
            (0.000_9, 0.0),
            (0.015, 0.015_625),
        ] {
            assert_eq!(e4m3(v), want, "{v}");
            assert_eq!(e4m3(e4m3(v)), want, "{v} twice");
        }
    }

    fn run(forward: impl Fn(Forward<'_, f32>), x: &[f32], w: &[f32], [n, k, f]: [usize; 3]) -> Vec<f32> {
        let mut y = vec![f32::NAN; n * f];
        forward(Forward {
            dims: Dims { b: 1, n, k, f, c: 0 },
            params: Params { act: 0, gate_row: 0 },
            x,
            w: Weight::Native(w),
            bias: None,
            gate: None,
            residual: None,
            y: &mut y,
        });
        y
    }

    #[test]
    fn scales_by_hand() {
        // Rows are scaled to 448: 2 and -448 of e4m3 are exact, so the product is, too; a row of zeros gives zero.
        for forward in [reference::forward as fn(Forward<'_, f32>), cpu::forward] {
            assert_eq!(run(forward, &[0.5, -112.0, 0.0, 0.0], &[1.75, 0.007_812_5], [2, 2, 1]), [0.0, 0.0]);
        }
    }

    /// The bound that callers may rely on: operands keep 2⁻⁴ of each number at the worst, so a product of independent
    /// rows is off by less than 4 % of its size in the mean of squares.
    #[test]
    fn error_against_the_exact_product_is_bounded() {
        let [n, k, f] = [24, 512, 40];
        let x: Vec<f32> = draw_f64("fp8", "x", n * k, Fill::Normal).into_iter().map(|v| v as f32).collect();
        let w: Vec<f32> =
            draw_f64("fp8", "w", f * k, Fill::Uniform(-0.25, 0.25)).into_iter().map(|v| v as f32).collect();
        let got = run(cpu::forward, &x, &w, [n, k, f]);
        let (mut error, mut size) = (0.0, 0.0);
        for (i, got) in got.iter().enumerate() {
            let (row, column) = (i / f * k, i % f * k);
            let want: f64 = (0..k).map(|j| f64::from(x[row + j]) * f64::from(w[column + j])).sum();
            error += (f64::from(*got) - want).powi(2);
            size += want * want;
        }
        let relative = (error / size).sqrt();
        assert!((0.01..0.04).contains(&relative), "{relative}");
    }
}
