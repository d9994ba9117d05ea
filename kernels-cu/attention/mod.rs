//! Softmax self-attention on the packed q, k, v projection: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub(crate) mod dense;
#[cfg(target_arch = "x86_64")]
mod half;
mod hopper;
pub mod launch;
pub(crate) mod layout;
pub(crate) mod local;
pub(crate) mod mma;
pub(crate) mod oracle;
pub(crate) mod panels;
pub(crate) mod softmax;
pub(crate) mod tiles;
pub(crate) mod turn;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use super::oracle;
    use crate::Real;
    use crate::generated::attention::{Backward, Dims, Forward};

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, n, h, e } = a.dims;
        oracle::forward_packed([b, n, h, e], a.params.scale, |_| (0..n).collect(), a.qkv, a.y, a.lse);
    }

    /// Backward pass.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let Some(dqkv) = a.dqkv else { return };
        let (Dims { b, n, h, e }, given) = (a.dims, [a.qkv, a.y, a.dy, a.lse]);
        oracle::backward_packed([b, n, h, e], a.params.scale, |_| (0..n).collect(), given, dqkv);
    }
}

#[cfg(test)]
mod tests {
    use super::reference;
    use crate::generated::attention::{Backward, Dims, Forward, Params};

    /// q = [1, 0], k = [ln 3, 0]: the first query weighs its keys 3 : 1, the second alike.
    #[test]
    fn two_tokens_by_hand() {
        let (dims, params) = (Dims { b: 1, n: 2, h: 1, e: 1 }, Params { scale: 1.0 });
        let qkv = [1.0, f64::ln(3.0), 4.0, 0.0, 0.0, 8.0];
        let (mut y, mut lse, mut dqkv) = ([0.0; 2], [0.0; 2], [0.0; 6]);
        reference::forward(Forward { dims, params, qkv: &qkv, y: &mut y, lse: &mut lse });
        let near = |got: &[f64], want: &[f64]| got.iter().zip(want).for_each(|(g, w)| assert!((g - w).abs() < 1e-6));
        near(&y, &[5.0, 6.0]);
        near(&lse, &[f64::ln(4.0), f64::ln(2.0)]);
        let dy = [1.0, 0.0];
        reference::backward(Backward { dims, params, dy: &dy, qkv: &qkv, y: &y, lse: &lse, dqkv: Some(&mut dqkv) });
        // ds = p·(v − y) = [3/4·(−1), 1/4·3]: dq = −3/4·ln 3, dk = ds·q, dv = p.
        near(&dqkv, &[-0.75 * f64::ln(3.0), -0.75, 0.75, 0.0, 0.75, 0.25]);
    }
}
