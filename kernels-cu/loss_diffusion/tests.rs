//! Against the golden case of the official objective, finite differences in v, and the oracle.

use super::{COEFS, Coefs, cpu, reference};
use crate::Tier;
use crate::check::{Fill, Tolerance, assert_close, directional, draw_f32, draw_f64, golden};
use crate::generated::loss_diffusion::{Backward, CASES, Dims, Forward, Params};

/// The row of the linear schedule with 1000 steps from 1e-4 to 0.02.
fn linear_schedule_row(t: usize) -> [f64; COEFS] {
    let beta = |i: usize| 1e-4 + (0.02 - 1e-4) * i as f64 / 999.0;
    let alpha_bar = |steps: usize| (0..steps).map(|i| 1.0 - beta(i)).product::<f64>();
    let bar = alpha_bar(t + 1);
    // The posterior variance is zero at t = 0; its logarithm takes the value of t = 1.
    let clipped = t.max(1);
    let posterior = beta(clipped) * (1.0 - alpha_bar(clipped)) / (1.0 - alpha_bar(clipped + 1));
    let sigma = (1.0 - bar).sqrt();
    let gap = beta(t) / ((1.0 - beta(t)).sqrt() * sigma);
    [gap, posterior.ln(), beta(t).ln() - posterior.ln(), if t == 0 { 1.0 } else { 0.0 }]
}

#[test]
fn golden_terms_and_gradient() {
    let case = "samplers/training_loss";
    let inputs = |name| golden(case, "inputs", name);
    let expected = |name| golden(case, "expected", name);
    let (x0, noise, model_output) = (inputs("x0"), inputs("noise"), inputs("model_output"));
    let coefs: Vec<f32> = [0, 1, 500, 999].into_iter().flat_map(linear_schedule_row).map(|c| c as f32).collect();
    let (dims, params) = (Dims { b: 4, c: 4, s: 36 }, Params { vlb_weight: 1.0 });
    type Pair = (fn(Forward<'_, f32>), fn(Backward<'_, f32>));
    let paths: [Pair; 2] = [(cpu::forward, cpu::backward), (reference::forward, reference::backward)];
    for (forward, backward) in paths {
        let (mut loss, mut mse, mut vb, mut grad) = ([0.0], [0.0; 4], [0.0; 4], [0.0; 4 * 8 * 36]);
        let (model_output, x0, noise, coefs) = (&model_output[..], &x0[..], &noise[..], &coefs[..]);
        forward(Forward { dims, params, model_output, x0, noise, coefs, loss: &mut loss, mse: &mut mse, vb: &mut vb });
        assert_close("mse", &mse, &expected("mse"), Tolerance { atol: 5e-7, rtol: 0.0, rms: 2.5e-6 });
        assert_close("vb", &vb, &expected("vb"), Tolerance { atol: 6.3e-6, rtol: 0.0, rms: 4.9e-6 });
        let mean = expected("loss").iter().sum::<f32>() / 4.0;
        assert_close("loss", &loss, &[mean], Tolerance { atol: 2e-6, rtol: 0.0, rms: 5e-6 });
        backward(Backward {
            dims,
            params,
            dloss: &[1.0],
            model_output,
            x0,
            noise,
            coefs,
            dmodel_output: Some(&mut grad),
        });
        let want = expected("grad.model_output");
        assert_close("grad.model_output", &grad, &want, Tolerance { atol: 2e-7, rtol: 1e-5, rms: 5e-6 });
        // The gradient in v falls with the range of log variances, to 1e-6 at t = 999: each sample by its own size.
        for (sample, t) in [0, 1, 500, 999].into_iter().enumerate() {
            let in_v = (sample * 2 + 1) * 144..(sample * 2 + 2) * 144;
            let tolerance = Tolerance { atol: 0.0, rtol: 1e-4, rms: 3e-6 };
            assert_close(&format!("gradient in v, t = {t}"), &grad[in_v.clone()], &want[in_v], tolerance);
        }
    }
}

#[test]
fn gradient_in_v_matches_finite_differences() {
    let len = 600;
    for first in [0.0, 1.0] {
        // Wide enough that no probability comes near the clamp, where the likelihood has a kink.
        let coefs = Coefs::row(&[0.6, -0.5, 1.0, first]);
        let draw = |name, bound: f64| draw_f64("bound", name, len, Fill::Uniform(-bound, bound));
        let (x0, noise, eps, v) = (draw("x0", 1.2), draw("noise", 0.5), draw("eps", 0.5), draw("v", 1.0));
        assert!(x0.iter().any(|x| *x < -0.999) && x0.iter().any(|x| *x > 0.999));
        let gradient: Vec<f64> = (0..len).map(|i| coefs.bound(x0[i], noise[i], eps[i], v[i]).1).collect();
        let total = |v: &[f64]| (0..len).map(|i| coefs.bound(x0[i], noise[i], eps[i], v[i]).0).sum();
        let row = directional("v", "bound", &v, &gradient, total);
        assert!(row.error < 1e-6, "first {first}: {row:?}");
    }
}

#[test]
fn gradient_in_v_holds_on_the_schedule() {
    // Interior, both edges, and values so far off that the probability is clamped.
    let cases = [(0.2, 0.1, 0.12), (-1.5, 0.3, 0.9), (1.5, -0.2, -0.5), (0.1, 0.0, 3.0), (-2.0, 0.0, -4.0)];
    for t in [0, 1, 400] {
        let coefs = Coefs::row(&linear_schedule_row(t));
        for (x0, noise, eps) in cases {
            for v in [-0.8, 0.1, 1.3] {
                let value = |v: f64| coefs.bound(x0, noise, eps, v).0;
                let (slope, got) = ((value(v + 1e-5) - value(v - 1e-5)) / 2e-5, coefs.bound(x0, noise, eps, v).1);
                assert!((got - slope).abs() < 1e-6 * slope.abs().max(1e-2), "{t} {x0} {v}: {got} {slope}");
            }
        }
    }
}

#[test]
fn equal_gaussians_cost_nothing() {
    // v = -1 chooses the posterior variance; eps that repeats the noise chooses its mean.
    let coefs = Coefs::row(&[0.5, -2.0, 1.0, 0.0]);
    assert_eq!(coefs.bound(1.0, 0.7, 0.7, -1.0), (0.0, 0.0));
    // One unit of mean against unit variance: 1/2 nat.
    let coefs = Coefs::row(&[2.0, 0.0, 0.0, 0.0]);
    assert_eq!(coefs.bound(1.0, 0.25, 0.75, 0.3).0, 0.5);
}

#[test]
fn an_impossible_pixel_costs_the_clamp() {
    let coefs = Coefs::row(&[1.0, -14.0, 0.0, 1.0]);
    assert_eq!(coefs.bound(0.9, 0.0, 1.8, 0.0), (-(1e-12f64.ln()), 0.0));
}

#[test]
fn cpu_agrees_with_the_oracle() {
    for case in CASES.iter().filter(|c| c.tier == Tier::Tiny) {
        let (dims, params) = (case.dims, case.params);
        let Dims { b, c, s } = dims;
        let draw = |name, len| draw_f32(case.name, name, len, Fill::Normal);
        let (x0, noise) = (draw("x0", b * c * s), draw("noise", b * c * s));
        let (model_output, dloss) = (draw("model_output", 2 * b * c * s), draw("dloss", 1));
        let coefs = draw_f32(case.name, "coefs", b * COEFS, Fill::Uniform(0.1, 0.9));
        let (model_output, x0, noise, coefs) = (&model_output[..], &x0[..], &noise[..], &coefs[..]);
        let run = |forward: fn(Forward<'_, f32>), backward: fn(Backward<'_, f32>)| {
            let (mut loss, mut mse, mut vb, mut grad) =
                (vec![0.0], vec![0.0; b], vec![0.0; b], vec![9.0; 2 * b * c * s]);
            forward(Forward {
                dims,
                params,
                model_output,
                x0,
                noise,
                coefs,
                loss: &mut loss,
                mse: &mut mse,
                vb: &mut vb,
            });
            let dmodel_output = Some(&mut grad[..]);
            backward(Backward { dims, params, dloss: &dloss, model_output, x0, noise, coefs, dmodel_output });
            [loss, mse, vb, grad]
        };
        let (got, want) = (run(cpu::forward, cpu::backward), run(reference::forward, reference::backward));
        for (name, (got, want)) in ["loss", "mse", "vb", "dmodel_output"].iter().zip(got.iter().zip(&want)) {
            assert_close(&format!("{}: {name}", case.name), got, want, Tolerance::F32);
        }
    }
}
