//! The scan of Mamba-2 between its convolution and its norm: see `op.toml` for the formula and the shapes.

mod backward;
pub mod cpu;
pub mod launch;
mod scan;

/// The oracle: the plain recurrence, f64 accumulation.
pub mod reference {
    use crate::generated::mamba2::{Backward, Dims, Forward, Params};
    use crate::{Order, Real};

    /// One head of one sample at one time.
    struct Step {
        row: usize,
        x: Vec<f64>,
        write: Vec<f64>,
        read: Vec<f64>,
        raw: f64,
        dt: f64,
        /// d(ln a)/d(dt), negative.
        rate: f64,
    }

    /// What the recurrence reads, for every head of every sample: the steps in order.
    fn heads<'a, T: Real>(
        dims: Dims,
        params: Params,
        [xbc, p, dt_bias, a_log]: [&'a [T]; 4],
    ) -> impl Iterator<Item = (usize, Vec<Step>)> + 'a {
        let Dims { b, n, w, h, e, k } = dims;
        let order = Order { n, reverse: params.reverse };
        (0..b * h).map(move |i| {
            let (sample, head) = (i / h, i % h);
            let step = |time: usize| {
                let row = sample * n + order.token(time);
                let xbc = &xbc[row * (h * e + 2 * k)..][..h * e + 2 * k];
                let part = |from: usize, len: usize| xbc[from..][..len].iter().map(|v| v.f64()).collect();
                let raw = p[row * w + params.dt_offset + head].f64() + dt_bias[head].f64();
                let dt = raw.max(0.0) + (-raw.abs()).exp().ln_1p();
                let (x, write, read) = (part(head * e, e), part(h * e, k), part(h * e + k, k));
                Step { row, x, write, read, raw, dt, rate: -a_log[head].f64().exp() }
            };
            (head, (0..n).map(step).collect())
        })
    }

    /// States `[E, K]` before the first step and after each.
    fn states(steps: &[Step]) -> Vec<Vec<f64>> {
        let mut states = vec![vec![0.0; steps.first().map_or(0, |s| s.x.len() * s.write.len())]];
        for s in steps {
            let (decay, k) = ((s.rate * s.dt).exp(), s.write.len());
            let before = &states[states.len() - 1];
            let after = (0..before.len()).map(|i| decay * before[i] + s.dt * s.x[i / k] * s.write[i % k]);
            states.push(after.collect());
        }
        states
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { h, e, k, .. } = a.dims;
        for (head, steps) in heads(a.dims, a.params, [a.xbc, a.p, a.dt_bias, a.a_log]) {
            for (s, state) in steps.iter().zip(&states(&steps)[1..]) {
                for i in 0..e {
                    let at = s.row * h * e + head * e + i;
                    let read: f64 = (0..k).map(|j| state[i * k + j] * s.read[j]).sum();
                    let residual = a.residual.map_or(0.0, |r| r[at].f64());
                    a.y[at] = T::from_f64(read + a.skip[head].f64() * s.x[i] + residual);
                }
            }
        }
    }

    /// Backward pass: the gradient of the state runs through the recurrence the other way.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let Dims { b, n, w, h, e, k } = a.dims;
        let width = h * e + 2 * k;
        let (mut dxbc, mut dp) = (vec![0.0f64; b * n * width], vec![0.0f64; b * n * w]);
        let [mut d_bias, mut d_log, mut d_skip] = [(); 3].map(|()| vec![0.0f64; h]);
        for (head, steps) in heads(a.dims, a.params, [a.xbc, a.p, a.dt_bias, a.a_log]) {
            let (states, mut d_state) = (states(&steps), vec![0.0; e * k]);
            for (time, s) in steps.iter().enumerate().rev() {
                let decay = (s.rate * s.dt).exp();
                let (mut d_dt, mut d_decay) = (0.0, 0.0);
                for (i, j) in (0..e * k).map(|i| (i / k, i % k)) {
                    let (dy, at) = (a.dy[s.row * h * e + head * e + i].f64(), i * k + j);
                    let d = d_state[at] + dy * s.read[j];
                    dxbc[s.row * width + head * e + i] += d * s.dt * s.write[j];
                    dxbc[s.row * width + h * e + j] += d * s.dt * s.x[i];
                    dxbc[s.row * width + h * e + k + j] += states[time + 1][at] * dy;
                    d_dt += d * s.x[i] * s.write[j];
                    d_decay += d * states[time][at];
                    d_state[at] = d * decay;
                }
                for i in 0..e {
                    let dy = a.dy[s.row * h * e + head * e + i].f64();
                    dxbc[s.row * width + head * e + i] += a.skip[head].f64() * dy;
                    d_skip[head] += s.x[i] * dy;
                }
                d_log[head] += d_decay * decay * s.rate * s.dt;
                let d_raw = (d_dt + d_decay * decay * s.rate) / (1.0 + (-s.raw).exp());
                dp[s.row * w + a.params.dt_offset + head] = d_raw;
                d_bias[head] += d_raw;
            }
        }
        let outs = [(a.dxbc, dxbc), (a.dp, dp), (a.ddt_bias, d_bias), (a.da_log, d_log), (a.dskip, d_skip)];
        for (out, sums) in outs {
            out.into_iter().flatten().zip(sums).for_each(|(o, v)| *o = T::from_f64(v));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::reference;
    use crate::generated::mamba2::{Dims, Forward, Params};

    #[test]
    fn two_tokens_by_hand() {
        // softplus(ln(e − 1)) = 1 and exp(a_log) = ln 2: every step halves the state and adds x·B.
        let raw = (std::f64::consts::E - 1.0).ln();
        let run = |reverse: bool| {
            let mut y = [0.0f64; 2];
            reference::forward(Forward {
                dims: Dims { b: 1, n: 2, w: 2, h: 1, e: 1, k: 1 },
                params: Params { dt_offset: 1, reverse },
                // x, B, C of each token.
                xbc: &[3.0, 2.0, 5.0, 1.0, 4.0, 10.0],
                p: &[9.0, raw, 9.0, raw],
                dt_bias: &[0.0],
                a_log: &[2f64.ln().ln()],
                skip: &[0.5],
                residual: Some(&[100.0, 200.0]),
                y: &mut y,
            });
            y.map(|y| (y * 1e9).round() / 1e9)
        };
        // States 6, then 6/2 + 4 = 7; from the last on 4, then 4/2 + 6 = 8.
        assert_eq!(run(false), [30.0 + 1.5 + 100.0, 70.0 + 0.5 + 200.0]);
        assert_eq!(run(true), [40.0 + 1.5 + 100.0, 40.0 + 0.5 + 200.0]);
    }
}
