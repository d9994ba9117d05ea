//! Decay of implicit filters with their lag: see `op.toml` for the formula.

pub mod cpu;
pub mod launch;

use crate::generated::filter_window::Params;

/// Decay per lag of a channel.
fn rate(params: Params, channel: usize) -> f64 {
    let Params { period, slow, fast, .. } = params;
    let (slow, fast) = (f64::from(slow), f64::from(fast));
    slow + (fast - slow) * (channel % period) as f64 / (period - 1).max(1) as f64
}

/// The oracle.
pub mod reference {
    use super::rate;
    use crate::Real;
    use crate::generated::filter_window::{Backward, Dims, Forward, Params};

    fn window(params: Params, lag: usize, channel: usize) -> f64 {
        (-rate(params, channel) * lag.abs_diff(params.centre) as f64).exp()
    }

    /// Forward pass.
    pub fn forward<T: Real>(a: Forward<'_, T>) {
        let Dims { l, c } = a.dims;
        for (ch, lag) in (0..c).flat_map(|ch| (0..l).map(move |lag| (ch, lag))) {
            a.y[ch * l + lag] = T::from_f64(a.x[lag * c + ch].f64() * window(a.params, lag, ch));
        }
    }

    /// Backward pass: the same factors, turned back.
    pub fn backward<T: Real>(a: Backward<'_, T>) {
        let (Dims { l, c }, Some(dx)) = (a.dims, a.dx) else { return };
        for (ch, lag) in (0..c).flat_map(|ch| (0..l).map(move |lag| (ch, lag))) {
            dx[lag * c + ch] = T::from_f64(a.dy[ch * l + lag].f64() * window(a.params, lag, ch));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{cpu, reference};
    use crate::Tier;
    use crate::check::{Fill, Tolerance, assert_close, draw_f32};
    use crate::generated::filter_window::{Backward, CASES, Dims, Forward, Params};

    #[test]
    fn two_channels_by_hand() {
        // Channel 0 does not decay; channel 1 loses a factor e^-ln2 = 1/2 per lag from the middle.
        let mut y = [0.0f64; 6];
        let params = Params { centre: 1, period: 2, slow: 0.0, fast: std::f32::consts::LN_2 };
        let x = [1.0, 10.0, 2.0, 20.0, 3.0, 30.0];
        reference::forward(Forward { dims: Dims { l: 3, c: 2 }, params, x: &x, y: &mut y });
        for (y, want) in y.iter().zip([1.0, 2.0, 3.0, 5.0, 20.0, 15.0]) {
            assert!((y - want).abs() < 1e-6, "{y} {want}");
        }
    }

    #[test]
    fn cpu_agrees_with_the_oracle() {
        for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
            let (dims, params, len) = (case.dims, case.params, case.dims.l * case.dims.c);
            let draw = |name| draw_f32(case.name, name, len, Fill::Normal);
            let (x, dy) = (draw("x"), draw("dy"));
            let run = |forward: fn(Forward<'_, f32>), backward: fn(Backward<'_, f32>)| {
                let (mut y, mut dx) = (vec![f32::NAN; len], vec![f32::NAN; len]);
                forward(Forward { dims, params, x: &x, y: &mut y });
                backward(Backward { dims, params, dy: &dy, dx: Some(&mut dx) });
                [y, dx].concat()
            };
            let (got, want) = (run(cpu::forward, cpu::backward), run(reference::forward, reference::backward));
            assert_close(case.name, &got, &want, Tolerance::F32);
        }
    }
}
