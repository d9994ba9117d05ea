//! CPU path: the fused strips over a sequence.

use super::strips::{Call, Gradients};
use super::window::Window;
use crate::generated::gated_conv::{Backward, Dims, Forward, Params};

fn call<'w>(
    Dims { n, c, k, .. }: Dims,
    Params { lead, reversed }: Params,
    short: [Option<&'w [f32]>; 2],
    inner: [Option<&'w [f32]>; 2],
) -> Call<'w> {
    Call { channels: c, reversed, window: Window::line(n, k, lead), short, inner }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let (short, inner) = ([a.short_weight, a.short_bias], [a.inner_weight, a.inner_bias]);
    call(a.dims, a.params, short, inner).forward(a.p, a.y);
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let (short, inner) = ([a.short_weight, a.short_bias], [a.inner_weight, a.inner_bias]);
    let out = Gradients { dp: a.dp, short: [a.dshort_weight, a.dshort_bias], inner: [a.dinner_weight, a.dinner_bias] };
    call(a.dims, a.params, short, inner).backward(a.p, a.dy, out);
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::Tier;
    use crate::check::{Fill, Tolerance, compare, draw_f32};
    use crate::generated::gated_conv::{CASES, INFO};

    #[test]
    fn agrees_with_the_oracle() {
        let tolerance = INFO.tolerance.unwrap_or(Tolerance::F32);
        for case in CASES.iter().filter(|case| case.tier == Tier::Tiny) {
            let (dims @ Dims { b, n, c, k }, params) = (case.dims, case.params);
            let draw = |name: &str, len: usize| draw_f32(case.name, name, len, Fill::Normal);
            let uniform = |name: &str, len: usize| draw_f32(case.name, name, len, Fill::Uniform(-0.3, 0.3));
            let optional = |name: &str, len: usize| (!case.absent.contains(&name)).then(|| uniform(name, len));
            let (p, dy) = (draw("p", b * n * 3 * c), draw("dy", b * n * c));
            let (short, short_bias) = (optional("short_weight", 3 * c * k), optional("short_bias", 3 * c));
            let (inner, inner_bias) = (optional("inner_weight", c * k), optional("inner_bias", c));
            let run = |forward: fn(Forward<'_, f32>), backward: fn(Backward<'_, f32>)| {
                let mut y = vec![f32::NAN; b * n * c];
                let nan = |like: &Option<Vec<f32>>| like.as_ref().map(|x| vec![f32::NAN; x.len()]);
                let mut dp = vec![f32::NAN; p.len()];
                let [mut ds, mut dsb, mut di, mut dib] = [&short, &short_bias, &inner, &inner_bias].map(nan);
                let (short_weight, short_bias) = (short.as_deref(), short_bias.as_deref());
                let (inner_weight, inner_bias) = (inner.as_deref(), inner_bias.as_deref());
                forward(Forward { dims, params, p: &p, short_weight, short_bias, inner_weight, inner_bias, y: &mut y });
                backward(Backward {
                    dims,
                    params,
                    dy: &dy,
                    p: &p,
                    short_weight,
                    short_bias,
                    inner_weight,
                    inner_bias,
                    dp: Some(&mut dp),
                    dshort_weight: ds.as_deref_mut(),
                    dshort_bias: dsb.as_deref_mut(),
                    dinner_weight: di.as_deref_mut(),
                    dinner_bias: dib.as_deref_mut(),
                });
                [
                    ("y", Some(y)),
                    ("dp", Some(dp)),
                    ("dshort", ds),
                    ("dshort_bias", dsb),
                    ("dinner", di),
                    ("dinner_bias", dib),
                ]
            };
            let (got, want) = (run(forward, backward), run(reference::forward, reference::backward));
            for ((name, got), (_, want)) in got.iter().zip(&want) {
                let (Some(got), Some(want)) = (got, want) else { continue };
                let result = compare(got, want, tolerance);
                assert!(result.pass, "{} {name}: {result:?}", case.name);
            }
        }
    }
}
