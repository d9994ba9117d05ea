//! Attention with a kernel in place of the softmax: see `op.toml` for the formula and the shapes.

mod causal;
pub mod cpu;
pub mod launch;

/// Feature map elu(x) + 1.
pub const ELU_PLUS_ONE: usize = 0;
/// Feature map max(x, 0).
pub const RELU: usize = 1;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use super::RELU;
    use crate::Real;
    use crate::attention::oracle::Layout;
    use crate::generated::linear_attention::{Backward, Dims, Forward};

    fn phi(map: usize, x: f64) -> f64 {
        if map == RELU { x.max(0.0) } else { x.max(0.0) + x.min(0.0).exp() }
    }

    /// Its slope; that of relu is 0 at 0.
    fn slope(map: usize, x: f64) -> f64 {
        if x > 0.0 { 1.0 } else { if map == RELU { 0.0 } else { x.exp() } }
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let (Dims { b, n, h, e }, map) = (a.dims, a.params.map);
        let (packed, plain) = (Layout { n, parts: 3, h, e }, Layout { n, parts: 1, h, e });
        for (sample, head) in (0..b).flat_map(|sample| (0..h).map(move |head| (sample, head))) {
            let [q, k, v] = [0, 1, 2].map(|part| packed.read(a.qkv, sample, part, head));
            let index = sample * h + head;
            let (mut state, mut total) = (vec![0.0; e * e], vec![0.0; e]);
            let grow = |state: &mut [f64], total: &mut [f64], j: usize| {
                (0..e * e).for_each(|i| state[i] += phi(map, k[j][i / e]) * v[j][i % e]);
                (0..e).for_each(|d| total[d] += phi(map, k[j][d]));
            };
            if !a.params.causal {
                (0..n).for_each(|j| grow(&mut state, &mut total, j));
            }
            let mut y = vec![vec![0.0; e]; n];
            for i in 0..n {
                if a.params.causal {
                    grow(&mut state, &mut total, i);
                }
                let dot = |x: &dyn Fn(usize) -> f64| (0..e).map(|d| phi(map, q[i][d]) * x(d)).sum::<f64>();
                let norm = dot(&|d| total[d]) + f64::from(a.params.eps);
                (0..e).for_each(|c| y[i][c] = dot(&|d| state[d * e + c]) / norm);
                a.norm[index * n + i] = T::from_f64(norm);
            }
            plain.write(&y, a.y, sample, 0, head);
            (0..e * e).for_each(|i| a.state[index * e * e + i] = T::from_f64(state[i]));
            (0..e).for_each(|d| a.total[index * e + d] = T::from_f64(total[d]));
        }
    }

    /// Backward pass: with g_i = dy_i / norm_i and c_i = −g_i·y_i, dphi(q_i) = state·g_i + c_i·total,
    /// dstate = Σ_i phi(q_i)·g_iᵀ, dtotal = Σ_i c_i·phi(q_i), dphi(k_j) = dstate·v_j + dtotal, dv_j = dstateᵀ·phi(k_j).
    /// Causal: state and total are those of the tokens up to i, dstate and dtotal those of the tokens from j on.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let Some(dqkv) = a.dqkv else { return };
        let (Dims { b, n, h, e }, map, causal) = (a.dims, a.params.map, a.params.causal);
        let (packed, plain) = (Layout { n, parts: 3, h, e }, Layout { n, parts: 1, h, e });
        for (sample, head) in (0..b).flat_map(|sample| (0..h).map(move |head| (sample, head))) {
            let [q, k, v] = [0, 1, 2].map(|part| packed.read(a.qkv, sample, part, head));
            let [y, dy] = [a.y, a.dy].map(|x| plain.read(x, sample, 0, head));
            let index = sample * h + head;
            let kept = |x: &[T], of: usize| -> Vec<f64> {
                x[index * of..][..of].iter().map(|x| if causal { 0.0 } else { x.f64() }).collect()
            };
            let (mut state, mut total) = (kept(a.state, e * e), kept(a.total, e));
            let g = |i: usize, c: usize| dy[i][c] / a.norm[index * n + i].f64();
            let fall = |i: usize| -(0..e).map(|c| g(i, c) * y[i][c]).sum::<f64>();
            let mut gradients = [0; 3].map(|_| vec![vec![0.0; e]; n]);
            for i in 0..n {
                if causal {
                    (0..e * e).for_each(|at| state[at] += phi(map, k[i][at / e]) * v[i][at % e]);
                    (0..e).for_each(|d| total[d] += phi(map, k[i][d]));
                }
                for d in 0..e {
                    let sum: f64 = (0..e).map(|c| state[d * e + c] * g(i, c)).sum();
                    gradients[0][i][d] = (sum + fall(i) * total[d]) * slope(map, q[i][d]);
                }
            }
            let (mut dstate, mut dtotal) = (vec![0.0; e * e], vec![0.0; e]);
            let back = |dstate: &mut [f64], dtotal: &mut [f64], i: usize| {
                (0..e * e).for_each(|at| dstate[at] += phi(map, q[i][at / e]) * g(i, at % e));
                (0..e).for_each(|d| dtotal[d] += phi(map, q[i][d]) * fall(i));
            };
            if !causal {
                (0..n).for_each(|i| back(&mut dstate, &mut dtotal, i));
            }
            for j in (0..n).rev() {
                if causal {
                    back(&mut dstate, &mut dtotal, j);
                }
                for d in 0..e {
                    let sum: f64 = (0..e).map(|c| dstate[d * e + c] * v[j][c]).sum();
                    gradients[1][j][d] = (sum + dtotal[d]) * slope(map, k[j][d]);
                    (0..e).for_each(|c| gradients[2][j][c] += phi(map, k[j][d]) * dstate[d * e + c]);
                }
            }
            (0..3).for_each(|part| packed.write(&gradients[part], dqkv, sample, part, head));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ELU_PLUS_ONE, RELU, cpu, reference};
    use crate::check::{Tolerance, assert_close};
    use crate::generated::linear_attention::{Backward, Dims, Forward, Params};

    struct Out {
        y: Vec<f32>,
        norm: Vec<f32>,
        state: Vec<f32>,
        total: Vec<f32>,
        dqkv: Vec<f32>,
    }

    /// One head of width 1; both paths.
    fn run(map: usize, eps: f32, causal: bool, qkv: &[f32], dy: &[f32]) -> [Out; 2] {
        let n = dy.len();
        let (dims, params) = (Dims { b: 1, n, h: 1, e: 1 }, Params { map, eps, causal });
        [
            (reference::forward as fn(Forward<'_, f32>), reference::backward as fn(Backward<'_, f32>)),
            (cpu::forward, cpu::backward),
        ]
        .map(|(forward, backward)| {
            let of = |len: usize| vec![9.0; len];
            let mut o = Out { y: of(n), norm: of(n), state: of(1), total: of(1), dqkv: of(3 * n) };
            let Out { y, norm, state, total, dqkv } = &mut o;
            forward(Forward { dims, params, qkv, y, norm, state, total });
            backward(Backward { dims, params, dy, qkv, y, norm, state, total, dqkv: Some(dqkv) });
            o
        })
    }

    #[test]
    fn elu_by_hand() {
        // phi(k) = [3, 1/2], phi(q) = [2, 1]; total 7/2, state 3·10 + 1/2·20 = 40; eps 1/2.
        let half = f32::ln(0.5);
        for o in run(ELU_PLUS_ONE, 0.5, false, &[1.0, 2.0, 10.0, 0.0, half, 20.0], &[1.0, 0.0]) {
            assert_close("total", &o.total, &[3.5], Tolerance::F32);
            assert_close("state", &o.state, &[40.0], Tolerance::F32);
            assert_close("norm", &o.norm, &[7.5, 4.0], Tolerance::F32);
            assert_close("y", &o.y, &[80.0 / 7.5, 10.0], Tolerance::F32);
            // g = 1/7.5, fall = −y/7.5; dphi(q) = 40·g + 3.5·fall; dstate = 2·g, dtotal = 2·fall.
            let (g, fall) = (1.0 / 7.5, -80.0 / 56.25);
            let dk = |v: f32| 2.0 * g * v + 2.0 * fall;
            let want = [40.0 * g + 3.5 * fall, dk(10.0), 3.0 * 2.0 * g, 0.0, 0.5 * dk(20.0), 0.5 * 2.0 * g];
            assert_close("dqkv", &o.dqkv, &want, Tolerance::F32);
        }
    }

    #[test]
    fn relu_passes_nothing_below_zero() {
        for o in run(RELU, 1e-6, false, &[-1.0, 2.0, 10.0, 3.0, -5.0, 20.0], &[1.0, 1.0]) {
            assert_close("norm", &o.norm, &[1e-6, 6.0], Tolerance::F32);
            assert_close("y", &o.y, &[0.0, 10.0], Tolerance::F32);
            assert_eq!((o.dqkv[0], o.dqkv[4], o.dqkv[5]), (0.0, 0.0, 0.0));
            assert_close("dv", &o.dqkv[2..3], &[1.0], Tolerance::F32);
        }
    }

    #[test]
    fn causal_by_hand() {
        // As `elu_by_hand`, but the first query meets its own key alone: norm 2·3 + 1/2, y 2·30/6.5.
        let half = f32::ln(0.5);
        for o in run(ELU_PLUS_ONE, 0.5, true, &[1.0, 2.0, 10.0, 0.0, half, 20.0], &[1.0, 1.0]) {
            assert_close("total", &o.total, &[3.5], Tolerance::F32);
            assert_close("state", &o.state, &[40.0], Tolerance::F32);
            assert_close("norm", &o.norm, &[6.5, 4.0], Tolerance::F32);
            assert_close("y", &o.y, &[60.0 / 6.5, 10.0], Tolerance::F32);
            let (g, fall) = ([1.0 / 6.5, 0.25], [-60.0 / 42.25, -2.5]);
            // Of both queries for the first key, of the second alone for the second.
            let (dstate, dtotal) = (2.0 * g[0] + g[1], 2.0 * fall[0] + fall[1]);
            let want = [
                30.0 * g[0] + 3.0 * fall[0],
                10.0 * dstate + dtotal,
                3.0 * dstate,
                40.0 * g[1] + 3.5 * fall[1],
                0.5 * (20.0 * g[1] + fall[1]),
                0.5 * g[1],
            ];
            assert_close("dqkv", &o.dqkv, &want, Tolerance::F32);
        }
    }
}
