//! Softmax self-attention with queries and keys of 8 bits: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: exact attention in plain loops, f64 accumulation; what is rounded to 8 bits shows as an error.
pub mod reference {
    use crate::Real;
    use crate::attention::oracle;
    use crate::generated::attention_int8::{Dims, Forward};

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, n, h, e } = a.dims;
        let mut lse = vec![T::default(); b * h * n];
        oracle::forward_packed([b, n, h, e], a.params.scale, |_| (0..n).collect(), a.qkv, a.y, &mut lse);
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::generated::attention_int8::{Dims, Forward, Params};

    /// q = 1 and 0, k = ln 3 and 0 after any common offset: the first query weighs its keys 3 : 1, the second alike.
    #[test]
    fn two_tokens_by_hand() {
        let (dims, params) = (Dims { b: 1, n: 2, h: 1, e: 1 }, Params { scale: 1.0 });
        for offset in [0.0f32, 2.0] {
            let qkv = [1.0, f32::ln(3.0) + offset, 4.0, 0.0, offset, 8.0];
            for path in [reference::forward::<f32>, cpu::forward] {
                let mut y = [f32::NAN; 2];
                path(Forward { dims, params, qkv: &qkv, y: &mut y });
                assert!((y[0] - 5.0).abs() < 1e-5 && (y[1] - 6.0).abs() < 1e-5, "{y:?}");
            }
        }
    }
}
