//! Softmax attention from one sequence to another: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::attention::oracle::{self, Layout};
    use crate::generated::cross_attention::{Backward, Dims, Forward};

    /// Layouts of q, kv and y.
    fn layouts(Dims { n, m, r, h, e, .. }: Dims) -> [Layout; 3] {
        [(n, r), (m, 2), (n, 1)].map(|(n, parts)| Layout { n, parts, h, e })
    }

    fn keys(dims: Dims, counts: Option<&[i32]>, sample: usize) -> Vec<usize> {
        (0..counts.map_or(dims.m, |counts| counts[sample] as usize)).collect()
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let (Dims { b, n, h, .. }, [of_q, of_kv, of_y]) = (a.dims, layouts(a.dims));
        for (sample, head) in (0..b).flat_map(|sample| (0..h).map(move |head| (sample, head))) {
            let q = of_q.read(a.q, sample, 0, head);
            let [k, v] = [0, 1].map(|part| of_kv.read(a.kv, sample, part, head));
            let keys = keys(a.dims, a.counts, sample);
            let (y, sums) = oracle::forward(&[q, k, v], f64::from(a.params.scale), |_| keys.clone());
            of_y.write(&y, a.y, sample, 0, head);
            sums.iter().enumerate().for_each(|(i, sum)| a.lse[(sample * h + head) * n + i] = T::from_f64(*sum));
        }
    }

    /// Backward pass.
    pub fn backward<T: Real>(mut a: Backward<'_, T>) {
        let (Dims { b, n, h, .. }, [of_q, of_kv, of_y]) = (a.dims, layouts(a.dims));
        a.dq.iter_mut().for_each(|dq| dq.fill(T::default()));
        for (sample, head) in (0..b).flat_map(|sample| (0..h).map(move |head| (sample, head))) {
            let q = of_q.read(a.q, sample, 0, head);
            let [k, v] = [0, 1].map(|part| of_kv.read(a.kv, sample, part, head));
            let saved = [a.y, a.dy].map(|x| of_y.read(x, sample, 0, head));
            let lse: Vec<f64> = a.lse[(sample * h + head) * n..][..n].iter().map(|v| v.f64()).collect();
            let keys = keys(a.dims, a.counts, sample);
            let scale = f64::from(a.params.scale);
            let [dq, dk, dv] = oracle::backward(&[q, k, v], &saved, &lse, scale, |_| keys.clone());
            a.dq.iter_mut().for_each(|out| of_q.write(&dq, out, sample, 0, head));
            for (part, gradient) in [dk, dv].iter().enumerate() {
                a.dkv.iter_mut().for_each(|out| of_kv.write(gradient, out, sample, part, head));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::check::{Tolerance, assert_close};
    use crate::generated::cross_attention::{Backward, Dims, Forward, Params};

    const INF: f32 = f32::INFINITY;

    /// Three samples count 0, 1 and 2 of two keys; what does not count is not a number and must not be read.
    #[test]
    fn counted_keys_by_hand() {
        let (dims, params) = (Dims { b: 3, n: 1, m: 2, r: 2, h: 1, e: 1 }, Params { scale: 0.5 });
        let q = [1.0, f32::NAN, 3.0, f32::NAN, 2.0, f32::NAN];
        let no = f32::NAN;
        // Scores of the last sample are ln 3 and 0.
        let kv = [no, no, no, no, 4.0, 5.0, no, no, f32::ln(3.0), 4.0, 0.0, 8.0];
        let counts = [0, 1, 2];
        for (forward, backward) in [
            (reference::forward as fn(Forward<'_, f32>), reference::backward as fn(Backward<'_, f32>)),
            (cpu::forward, cpu::backward),
        ] {
            let (mut y, mut lse) = ([9.0; 3], [9.0; 3]);
            forward(Forward { dims, params, q: &q, kv: &kv, counts: Some(&counts), y: &mut y, lse: &mut lse });
            assert_close("y", &y, &[0.0, 5.0, 5.0], Tolerance::F32);
            assert_close("lse", &lse, &[-INF, 6.0, f32::ln(4.0)], Tolerance::F32);
            let (mut dq, mut dkv) = ([9.0; 6], [9.0; 12]);
            backward(Backward {
                dims,
                params,
                dy: &[1.0, 2.0, 4.0],
                q: &q,
                kv: &kv,
                counts: Some(&counts),
                y: &y,
                lse: &lse,
                dq: Some(&mut dq),
                dkv: Some(&mut dkv),
            });
            // ds = scale·p·dy·(v − y) = [−3/2, 3/2] in the last sample.
            assert_close("dq", &dq, &[0.0, 0.0, 0.0, 0.0, -1.5 * f32::ln(3.0), 0.0], Tolerance::F32);
            let want = [0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, -3.0, 3.0, 3.0, 1.0];
            assert_close("dkv", &dkv, &want, Tolerance::F32);
        }
    }

    /// Each gradient alone equals the one asked for with the other.
    #[test]
    fn gradients_may_be_asked_for_alone() {
        let (dims, params) = (Dims { b: 1, n: 3, m: 2, r: 1, h: 1, e: 2 }, Params { scale: 1.0 });
        let wave = |len: usize| (0..len).map(|i| (i as f32).sin()).collect::<Vec<f32>>();
        let (q, kv, dy) = (wave(6), wave(8), wave(6));
        let (mut y, mut lse) = (vec![0.0; 6], vec![0.0; 3]);
        cpu::forward(Forward { dims, params, q: &q, kv: &kv, counts: None, y: &mut y, lse: &mut lse });
        let run = |want_q: bool, want_kv: bool| {
            let (mut dq, mut dkv) = (vec![9.0; 6], vec![9.0; 8]);
            let (q, kv, y, lse, dy) = (&q[..], &kv[..], &y[..], &lse[..], &dy[..]);
            let asked = (want_q.then_some(&mut dq[..]), want_kv.then_some(&mut dkv[..]));
            cpu::backward(Backward { dims, params, dy, q, kv, counts: None, y, lse, dq: asked.0, dkv: asked.1 });
            (dq, dkv)
        };
        let both = run(true, true);
        assert_eq!(run(true, false), (both.0.clone(), vec![9.0; 8]));
        assert_eq!(run(false, true), (vec![9.0; 6], both.1));
    }
}
