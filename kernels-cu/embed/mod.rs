//! `y = act(table[index] + addend)`: see `op.toml` for the formula and the shapes.

pub mod cpu;
pub mod launch;

/// `act` of no activation.
pub const NONE: usize = 0;
/// `act` of SiLU, x·sigmoid(x).
pub const SILU: usize = 2;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use super::SILU;
    use crate::Real;
    use crate::generated::embed::{Backward, Dims, Forward};

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { b, d, .. } = a.dims;
        for i in 0..b * d {
            let row = a.index[i / d] as usize;
            let pre = a.table[row * d + i % d].f64() + a.addend.map_or(0.0, |addend| addend[i].f64());
            let y = if a.params.act == SILU { pre * sigmoid(pre) } else { pre };
            (a.pre[i], a.y[i]) = (T::from_f64(pre), T::from_f64(y));
        }
    }

    /// Backward pass: dsilu(x) = s·(1 + x·(1 − s)) with s = sigmoid(x).
    pub fn backward<T: Real>(mut a: Backward<'_, T>) {
        let Dims { b, v, d } = a.dims;
        let mut dtable = vec![0.0f64; v * d];
        for i in 0..b * d {
            let (pre, mut dpre) = (a.pre[i].f64(), a.dy[i].f64());
            if a.params.act == SILU {
                let s = sigmoid(pre);
                dpre *= s * (1.0 + pre * (1.0 - s));
            }
            dtable[a.index[i / d] as usize * d + i % d] += dpre;
            if let Some(daddend) = &mut a.daddend {
                daddend[i] = T::from_f64(dpre);
            }
        }
        if let Some(out) = a.dtable {
            out.iter_mut().zip(dtable).for_each(|(o, g)| *o = T::from_f64(g));
        }
    }

    fn sigmoid(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }
}

#[cfg(test)]
mod tests {
    use super::{NONE, SILU, cpu, reference};
    use crate::Tier;
    use crate::check::{Fill, Tolerance, assert_close, draw_f32, draw_i32};
    use crate::generated::embed::{Backward, CASES, Dims, Forward, Params};

    #[test]
    fn by_hand() {
        let (table, index) = ([1.0f64, 2.0, 3.0, 4.0], [1, 0, 1]);
        let (mut y, mut pre) = ([0.0; 6], [0.0; 6]);
        let (dims, params) = (Dims { b: 3, v: 2, d: 2 }, Params { act: NONE });
        let addend = [0.5; 6];
        reference::forward(Forward {
            dims,
            params,
            table: &table,
            index: &index,
            addend: Some(&addend),
            y: &mut y,
            pre: &mut pre,
        });
        assert_eq!(y, [3.5, 4.5, 1.5, 2.5, 3.5, 4.5]);
        let (dy, mut dtable) = ([1.0, 10.0, 2.0, 20.0, 4.0, 40.0], [0.0; 4]);
        reference::backward(Backward {
            dims,
            params,
            dy: &dy,
            index: &index,
            pre: &pre,
            dtable: Some(&mut dtable),
            daddend: None,
        });
        assert_eq!(dtable, [2.0, 20.0, 5.0, 50.0]);
    }

    #[test]
    fn silu_of_one() {
        let (mut y, mut pre) = ([0.0f64], [0.0]);
        let (dims, params) = (Dims { b: 1, v: 1, d: 1 }, Params { act: SILU });
        reference::forward(Forward {
            dims,
            params,
            table: &[1.0],
            index: &[0],
            addend: None,
            y: &mut y,
            pre: &mut pre,
        });
        assert!((y[0] - 0.731_058_578_630_004_9).abs() < 1e-15);
    }

    #[test]
    fn cpu_agrees_with_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let (dims, params) = (case.dims, case.params);
            let Dims { b, v, d } = dims;
            let draw = |name, len| draw_f32(case.name, name, len, Fill::Normal);
            let (table, addend, dy) = (draw("table", v * d), draw("addend", b * d), draw("dy", b * d));
            let index = draw_i32(case.name, "index", b, Fill::Index(v));
            let addend = (!case.absent.contains(&"addend")).then_some(&addend[..]);
            let run = |forward: fn(Forward<'_, f32>), backward: fn(Backward<'_, f32>)| {
                let (mut y, mut pre, mut dtable, mut daddend) =
                    (vec![0.0; b * d], vec![0.0; b * d], vec![9.0; v * d], vec![0.0; b * d]);
                forward(Forward { dims, params, table: &table, index: &index, addend, y: &mut y, pre: &mut pre });
                let daddend_asked = addend.is_some().then_some(&mut daddend[..]);
                backward(Backward {
                    dims,
                    params,
                    dy: &dy,
                    index: &index,
                    pre: &pre,
                    dtable: Some(&mut dtable),
                    daddend: daddend_asked,
                });
                [y, pre, dtable, daddend]
            };
            let got = run(cpu::forward, cpu::backward);
            let want = run(reference::forward, reference::backward);
            for (name, (got, want)) in ["y", "pre", "dtable", "daddend"].iter().zip(got.iter().zip(&want)) {
                assert_close(&format!("{}: {name}", case.name), got, want, Tolerance::F32);
            }
        }
    }
}
