//! CPU path: the fused strips of `gated_conv` over a grid.

use crate::gated_conv::strips::{Call, Gradients};
use crate::gated_conv::window::Window;
use crate::generated::gated_conv_2d::{Backward, Dims, Forward};

fn call<'w>(Dims { gh, gw, c, k, .. }: Dims, short: [Option<&'w [f32]>; 2], inner: [Option<&'w [f32]>; 2]) -> Call<'w> {
    let window = Window { grid: [gh, gw], size: [k, k], lead: [k / 2, k / 2] };
    Call { channels: c, reversed: 0, window, short, inner }
}

/// Forward pass.
pub fn forward(a: Forward<'_, f32>) {
    let (short, inner) = ([a.short_weight, a.short_bias], [a.inner_weight, a.inner_bias]);
    call(a.dims, short, inner).forward(a.p, a.y);
}

/// Backward pass.
pub fn backward(a: Backward<'_, f32>) {
    let (short, inner) = ([a.short_weight, a.short_bias], [a.inner_weight, a.inner_bias]);
    let out = Gradients { dp: a.dp, short: [a.dshort_weight, a.dshort_bias], inner: [a.dinner_weight, a.dinner_bias] };
    call(a.dims, short, inner).backward(a.p, a.dy, out);
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::*;
    use crate::Tier;
    use crate::check::{Fill, Tolerance, compare, draw_f32};
    use crate::generated::gated_conv_2d::{CASES, INFO, Params};

    #[test]
    fn agrees_with_the_oracle() {
        let tolerance = INFO.tolerance.unwrap_or(Tolerance::F32);
        for case in CASES.iter().filter(|case| case.tier == Tier::Tiny) {
            let dims @ Dims { b, gh, gw, c, k } = case.dims;
            let draw = |name: &str, len: usize| draw_f32(case.name, name, len, Fill::Normal);
            let optional = |name: &str, len: usize| {
                (!case.absent.contains(&name)).then(|| draw_f32(case.name, name, len, Fill::Uniform(-0.3, 0.3)))
            };
            let (p, dy) = (draw("p", b * gh * gw * 3 * c), draw("dy", b * gh * gw * c));
            let short = [optional("short_weight", 3 * c * k * k), optional("short_bias", 3 * c)];
            let inner = [optional("inner_weight", c * k * k), optional("inner_bias", c)];
            let run = |forward: fn(Forward<'_, f32>), backward: fn(Backward<'_, f32>)| {
                let [short_weight, short_bias] = short.each_ref().map(|t| t.as_deref());
                let [inner_weight, inner_bias] = inner.each_ref().map(|t| t.as_deref());
                // NaN marks what a path forgets to write.
                let (mut y, mut dp) = (vec![f32::NAN; dy.len()], vec![f32::NAN; p.len()]);
                let nan = |like: &Option<Vec<f32>>| like.as_ref().map(|x| vec![f32::NAN; x.len()]);
                let [mut ds, mut dsb, mut di, mut dib] = [&short[0], &short[1], &inner[0], &inner[1]].map(nan);
                let params = Params {};
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
                [Some(y), Some(dp), ds, dsb, di, dib]
            };
            let (got, want) = (run(forward, backward), run(reference::forward, reference::backward));
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let (Some(got), Some(want)) = (got, want) else { continue };
                let result = compare(got, want, tolerance);
                assert!(result.pass, "{} tensor {i}: {result:?}", case.name);
            }
        }
    }
}
