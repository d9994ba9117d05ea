//! The long Hyena operator between its projections: see `op.toml` for the formula and the shapes.

pub mod cpu;
mod direct;
pub mod launch;
mod plan;
mod spectrum;

/// The oracle: plain loops, f64 accumulation.
pub mod reference {
    use crate::Real;
    use crate::gated_conv::oracle::{Call, Conv, line};
    use crate::generated::long_conv::{Backward, Dims, Forward, Params};

    /// Runs `then` on the call that the tensors describe: the skip term is part of the filter's tap on the current token.
    fn with_call<T: Real, R>(
        (Dims { b, n, c, k, l }, Params { lead, centre, reversed }): (Dims, Params),
        p: &[T],
        short: [Option<&[T]>; 2],
        (filter, skip): (&[T], &[T]),
        then: impl FnOnce(Call<'_, T>) -> R,
    ) -> R {
        // A tap of the long filter is a lag, so it counts back where a short one counts forth.
        let ahead = (line(n, lead, false), line(n, centre, true));
        let back = (line(n, lead, true), line(n, centre, false));
        type Source<'s> = &'s dyn Fn(usize, usize) -> Option<usize>;
        let filters = |ch: usize| {
            let [near, far]: [Source<'_>; 2] =
                if ch + reversed < c { [&ahead.0, &ahead.1] } else { [&back.0, &back.1] };
            let part = |part: usize| Conv::new(near, k, part * c + ch, short[0], short[1]);
            let mut taps: Vec<f64> = filter[ch * l..][..l].iter().map(|v| v.f64()).collect();
            taps[centre] += skip[ch].f64();
            [part(0), part(1), part(2), Conv::with_taps(far, taps)]
        };
        then(Call { dims: [b, n, c], p, filters: &filters })
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let (short, long) = ([a.short_weight, a.short_bias], (a.filter, a.skip));
        with_call((a.dims, a.params), a.p, short, long, |call| call.forward(a.y));
    }

    /// Backward pass.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let (short, long) = ([a.short_weight, a.short_bias], (a.filter, a.skip));
        let sums = with_call((a.dims, a.params), a.p, short, long, |call| call.backward(a.dy));
        if let Some(dskip) = a.dskip {
            dskip.iter_mut().zip(&sums.filters).for_each(|(o, f)| *o = T::from_f64(f[3].0[a.params.centre]));
        }
        sums.store(a.dp, [a.dshort_weight, a.dshort_bias], [a.dfilter, None]);
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Tier;
    use crate::check::{Fill, Tolerance, assert_close, draw_f32};
    use crate::generated::long_conv::{Backward, CASES, Dims, Forward, INFO, Params};

    #[test]
    fn directions_by_hand() {
        // q = k = 1, v = 1, 2, 3; lags 0, 1, 2 weigh 1, 10, 100; the skip adds 0.5 of the token itself.
        let run = |forward: fn(Forward<'_, f32>), l: usize, centre: usize, reversed: usize, filter: &[f32]| {
            let mut y = [0.0f32; 3];
            forward(Forward {
                dims: Dims { b: 1, n: 3, c: 1, k: 0, l },
                params: Params { lead: 0, centre, reversed },
                p: &[1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 3.0],
                short_weight: None,
                short_bias: None,
                filter,
                skip: &[0.5],
                y: &mut y,
            });
            y
        };
        for forward in [reference::forward, cpu::forward] {
            assert_eq!(run(forward, 3, 0, 0, &[1.0, 10.0, 100.0]), [1.5, 13.0, 124.5]);
            assert_eq!(run(forward, 3, 0, 1, &[1.0, 10.0, 100.0]), [321.5, 33.0, 4.5]);
            // Lags -1, 0, 1: the next token by 2.
            assert_eq!(run(forward, 3, 1, 0, &[2.0, 1.0, 10.0]), [5.5, 19.0, 24.5]);
        }
    }

    #[test]
    fn cpu_agrees_with_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let (dims @ Dims { b, n, c, k, l }, params) = (case.dims, case.params);
            let draw = |name: &str, len, fill| draw_f32(case.name, name, len, fill);
            let (p, dy) = (draw("p", b * n * 3 * c, Fill::Normal), draw("dy", b * n * c, Fill::Normal));
            let taps =
                |name: &str, len| (!case.absent.contains(&name)).then(|| draw(name, len, Fill::Uniform(-0.5, 0.5)));
            let short = [taps("short_weight", 3 * c * k), taps("short_bias", 3 * c)];
            let [short_weight, short_bias] = short.each_ref().map(|t| t.as_deref());
            let (filter, skip) = (draw("filter", c * l, Fill::Uniform(-0.3, 0.3)), draw("skip", c, Fill::Normal));
            let run = |forward: fn(Forward<'_, f32>), backward: fn(Backward<'_, f32>)| {
                let nan = |len: usize| vec![f32::NAN; len];
                let (mut y, mut dp, mut df, mut ds) = (nan(b * n * c), nan(p.len()), nan(c * l), nan(c));
                let [mut dw, mut db] = short.each_ref().map(|t| t.as_ref().map(|t| nan(t.len())));
                let (p, filter, skip) = (&p[..], &filter[..], &skip[..]);
                forward(Forward { dims, params, p, short_weight, short_bias, filter, skip, y: &mut y });
                backward(Backward {
                    dims,
                    params,
                    dy: &dy,
                    p,
                    short_weight,
                    short_bias,
                    filter,
                    skip,
                    dp: Some(&mut dp),
                    dshort_weight: dw.as_deref_mut(),
                    dshort_bias: db.as_deref_mut(),
                    dfilter: Some(&mut df),
                    dskip: Some(&mut ds),
                });
                [y, dp, df, ds, dw.unwrap_or_default(), db.unwrap_or_default()]
            };
            let (got, want) = (run(cpu::forward, cpu::backward), run(reference::forward, reference::backward));
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let tolerance = INFO.tolerance.unwrap_or(Tolerance::F32);
                assert_close(&format!("{} tensor {i}", case.name), got, want, tolerance);
            }
        }
    }
}
