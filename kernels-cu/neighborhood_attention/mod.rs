//! Attention to a square of neighbouring tokens of a grid: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::attention::oracle;
    use crate::generated::neighborhood_attention::{Backward, Dims, Forward};

    /// The keys of a query: those in the K rows and columns from its starts on.
    fn keys(Dims { gh, gw, k, .. }: Dims, query: usize) -> Vec<usize> {
        let start = |i: usize, n: usize| (i as i64 - (k as i64 - 1) / 2).clamp(0, (n - k) as i64) as usize;
        let (row, column) = (start(query / gw, gh), start(query % gw, gw));
        (row..row + k).flat_map(|r| (column..column + k).map(move |c| r * gw + c)).collect()
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let dims @ Dims { b, gh, gw, h, e, .. } = a.dims;
        let sizes = [b, gh * gw, h, e];
        oracle::forward_packed(sizes, a.params.scale, |query| keys(dims, query), a.qkv, a.y, a.lse);
    }

    /// Backward pass.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let Some(dqkv) = a.dqkv else { return };
        let (dims @ Dims { b, gh, gw, h, e, .. }, given) = (a.dims, [a.qkv, a.y, a.dy, a.lse]);
        oracle::backward_packed([b, gh * gw, h, e], a.params.scale, |query| keys(dims, query), given, dqkv);
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::check::{Tolerance, assert_close};
    use crate::generated::neighborhood_attention::{Backward, Dims, Forward, Params};

    /// Queries of zero weigh their keys alike, so a row is the mean of a 3 × 3 square, shifted inside at the borders.
    #[test]
    fn means_of_squares() {
        let (gh, gw) = (4, 5);
        let qkv: Vec<f32> = (0..gh * gw).flat_map(|i| [0.0, 1.0, i as f32]).collect();
        let (dims, params) = (Dims { b: 1, gh, gw, h: 1, e: 1, k: 3 }, Params { scale: 1.0 });
        // Token r·5 + c has this value, so the mean is that of the square's centre.
        let row = |r: f32| [1.0, 1.0, 2.0, 3.0, 3.0].map(|c| 5.0 * r + c);
        let want = [row(1.0), row(1.0), row(2.0), row(2.0)].concat();
        for forward in [reference::forward as fn(Forward<'_, f32>), cpu::forward] {
            let (mut y, mut lse) = ([0.0; 20], [0.0; 20]);
            forward(Forward { dims, params, qkv: &qkv, y: &mut y, lse: &mut lse });
            assert_close("y", &y, &want, Tolerance::F32);
            assert_close("lse", &lse, &[f32::ln(9.0); 20], Tolerance::F32);
        }
    }

    /// The values that a query sees get 1/9 of its gradient; a corner's square is that of the inner token beside it.
    #[test]
    fn gradients_of_a_corner() {
        let (gh, gw) = (3, 4);
        let qkv: Vec<f32> = (0..gh * gw).flat_map(|i| [0.0, 0.0, i as f32]).collect();
        let (dims, params) = (Dims { b: 1, gh, gw, h: 1, e: 1, k: 3 }, Params { scale: 1.0 });
        for (forward, backward) in [
            (reference::forward as fn(Forward<'_, f32>), reference::backward as fn(Backward<'_, f32>)),
            (cpu::forward, cpu::backward),
        ] {
            let (mut y, mut lse, mut dqkv, mut dy) = ([0.0; 12], [0.0; 12], [9.0; 36], [0.0; 12]);
            forward(Forward { dims, params, qkv: &qkv, y: &mut y, lse: &mut lse });
            dy[3] = 9.0;
            backward(Backward { dims, params, dy: &dy, qkv: &qkv, y: &y, lse: &lse, dqkv: Some(&mut dqkv) });
            let dv: Vec<f32> = dqkv.iter().skip(2).step_by(3).copied().collect();
            assert_close("dv", &dv, &[0., 1., 1., 1., 0., 1., 1., 1., 0., 1., 1., 1.], Tolerance::F32);
        }
    }
}
