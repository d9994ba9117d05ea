//! Attention to a window of neighbouring tokens: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::attention::oracle;
    use crate::generated::window_attention::{Backward, Dims, Forward};

    fn keys(n: usize, w: usize, query: usize) -> Vec<usize> {
        (0..n).filter(|key| key.abs_diff(query) <= w).collect()
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, n, h, e, w } = a.dims;
        oracle::forward_packed([b, n, h, e], a.params.scale, |query| keys(n, w, query), a.qkv, a.y, a.lse);
    }

    /// Backward pass.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let Some(dqkv) = a.dqkv else { return };
        let (Dims { b, n, h, e, w }, given) = (a.dims, [a.qkv, a.y, a.dy, a.lse]);
        oracle::backward_packed([b, n, h, e], a.params.scale, |query| keys(n, w, query), given, dqkv);
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::check::{Tolerance, assert_close};
    use crate::generated::window_attention::{Backward, Dims, Forward, Params};

    /// Queries of zero weigh their keys alike, so a row is the mean of the values around it.
    #[test]
    fn means_of_neighbours() {
        let values = [1.0f32, 2.0, 4.0, 8.0, 16.0];
        let qkv: Vec<f32> = values.iter().flat_map(|v| [0.0, 7.0, *v]).collect();
        let (dims, params) = (Dims { b: 1, n: 5, h: 1, e: 1, w: 1 }, Params { scale: 1.0 });
        for forward in [reference::forward as fn(Forward<'_, f32>), cpu::forward] {
            let (mut y, mut lse) = ([0.0; 5], [0.0; 5]);
            forward(Forward { dims, params, qkv: &qkv, y: &mut y, lse: &mut lse });
            assert_close("y", &y, &[1.5, 7.0 / 3.0, 14.0 / 3.0, 28.0 / 3.0, 12.0], Tolerance::F32);
            let (two, three) = (f32::ln(2.0), f32::ln(3.0));
            assert_close("lse", &lse, &[two, three, three, three, two], Tolerance::F32);
        }
    }

    /// With W ≥ N every query sees every key, and with W = 0 only itself.
    #[test]
    fn extremes_of_the_window() {
        let qkv: Vec<f32> = (0..4 * 3).map(|i| (i as f32 * 0.7).sin()).collect();
        let run = |w: usize| {
            let (mut y, mut lse, mut dqkv) = ([0.0; 4], [0.0; 4], [0.0; 12]);
            let (dims, params) = (Dims { b: 1, n: 4, h: 1, e: 1, w }, Params { scale: 2.0 });
            cpu::forward(Forward { dims, params, qkv: &qkv, y: &mut y, lse: &mut lse });
            let dy = [1.0, -2.0, 3.0, 0.5];
            cpu::backward(Backward { dims, params, dy: &dy, qkv: &qkv, y: &y, lse: &lse, dqkv: Some(&mut dqkv) });
            (y, dqkv)
        };
        let (y, dqkv) = run(0);
        assert_eq!(y, [qkv[2], qkv[5], qkv[8], qkv[11]]);
        assert_eq!([2, 5, 8, 11].map(|i| dqkv[i]), [1.0, -2.0, 3.0, 0.5]);
        assert!([0, 1, 3, 4, 6, 7, 9, 10].iter().all(|&i: &usize| dqkv[i].abs() < 1e-6));
        assert_eq!(run(3), run(usize::MAX));
        assert_ne!(run(2), run(3));
    }
}
