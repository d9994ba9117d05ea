//! Reference of the solver update: the formula of [`crate::sample::solver`] on plain slices, element by element.

use crate::error::{Error, Result};
use crate::sample::real::Real;
use crate::sample::solver::{Coefs, NoiseScale};

/// Applies one step.
///
/// `x`, `eps`, `out`, `x0_out` and every given optional input have the same length and layout. `v` holds the variance
/// channels, `x0_prev` the clean estimate of the step before, `noise` standard normal numbers; each is needed only
/// where the coefficients use it. `out` receives the next latent, `x0_out` the clean estimate of this step.
///
/// # Errors
/// A failure when a needed input is missing or a length differs; nothing is written then.
pub fn apply<R: Real>(
    coefs: &Coefs,
    x: &[R],
    eps: &[R],
    v: Option<&[R]>,
    x0_prev: Option<&[R]>,
    noise: Option<&[R]>,
    out: &mut [R],
    x0_out: &mut [R],
) -> Result<()> {
    let n = x.len();
    let same_length = |name: &str, len: usize| match len == n {
        true => Ok(()),
        false => Err(Error::failure("solver step", format!("length of {name} differs from x")).is(len).must(n)),
    };
    let needed = |name: &str, input: Option<&[R]>, used: bool| match input {
        None if used => Err(Error::failure("solver step", format!("{name} is missing")).must("given for this step")),
        Some(slice) => same_length(name, slice.len()),
        None => Ok(()),
    };
    same_length("eps", eps.len())?;
    same_length("out", out.len())?;
    same_length("x0_out", x0_out.len())?;
    needed("v", v, matches!(coefs.noise, NoiseScale::Learned { .. }))?;
    needed("x0_prev", x0_prev, coefs.c1 != 0.0)?;
    needed("noise", noise, coefs.noise != NoiseScale::None)?;

    let real = R::from_f64;
    let (inv_alpha, sigma) = (real(coefs.inv_alpha), real(coefs.sigma));
    let (cx, ce, c0, c1) = (real(coefs.cx), real(coefs.ce), real(coefs.c0), real(coefs.c1));
    for i in 0..n {
        let x0 = inv_alpha * (x[i] - sigma * eps[i]);
        let mut next = cx * x[i] + ce * eps[i] + c0 * x0;
        if let (Some(previous), true) = (x0_prev, coefs.c1 != 0.0) {
            next = next + c1 * previous[i];
        }
        if let Some(noise) = noise {
            let scale = match (coefs.noise, v) {
                (NoiseScale::Fixed(scale), _) => real(scale),
                (NoiseScale::Learned { log_lo, log_hi }, Some(v)) => learned_scale(log_lo, log_hi, v[i]),
                _ => real(0.0),
            };
            next = next + scale * noise[i];
        }
        out[i] = next;
        x0_out[i] = x0;
    }
    Ok(())
}

/// Standard deviation of a learned-range variance: exp(½(f·log_hi + (1-f)·log_lo)), f = (v+1)/2.
fn learned_scale<R: Real>(log_lo: f64, log_hi: f64, v: R) -> R {
    let half = R::from_f64(0.5);
    let f = half * (v + R::from_f64(1.0));
    (half * (f * R::from_f64(log_hi) + (R::from_f64(1.0) - f) * R::from_f64(log_lo))).exp()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::sample::golden::{Case, assert_close};
    use crate::sample::solver::Plan;

    /// Runs the closed-form model of a golden case through a plan; returns the latents (start included), x0s, times.
    fn trajectory<R: Real>(case: &Case, plan: &Plan) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let config = case.json("case.json")["config"]["model"].clone();
        let parameter = |name: &str| config[name].as_f64().unwrap();
        let (a, b, c, d) = (parameter("a"), parameter("b"), parameter("c"), parameter("d"));
        let real = |values: Vec<f64>| values.into_iter().map(R::from_f64).collect::<Vec<R>>();
        let mut x = real(case.input("x"));
        let n = x.len();
        let noise = plan.needs_noise().then(|| real(case.input("noise")));
        let wide = |values: &[R]| values.iter().map(|x| x.to_f64()).collect::<Vec<f64>>();
        let (mut latents, mut x0s, mut times) = (wide(&x), vec![], vec![]);
        let mut x0_prev: Option<Vec<R>> = None;
        for (i, step) in plan.steps.iter().enumerate() {
            let model = |scale: f64, shift: f64| -> Vec<R> {
                let offset = R::from_f64(shift * step.timestep / 1000.0);
                x.iter().map(|&x| (R::from_f64(scale) * x + offset).tanh()).collect()
            };
            let (eps, v) = (model(a, b), model(c, d));
            let (mut next, mut x0) = (vec![R::from_f64(f64::NAN); n], vec![R::from_f64(f64::NAN); n]);
            let z = noise.as_ref().map(|z| &z[i * n..(i + 1) * n]);
            apply(&step.coefs, &x, &eps, Some(&v), x0_prev.as_deref(), z, &mut next, &mut x0).unwrap();
            latents.extend(wide(&next));
            x0s.extend(wide(&x0));
            times.push(step.timestep);
            (x, x0_prev) = (next, Some(x0));
        }
        (latents, x0s, times)
    }

    /// In f64 every latent must agree with the stored f32 values up to their rounding.
    pub fn check_f64(path: &str, plan: &Plan) {
        let case = Case::open(path);
        let (latents, x0s, times) = trajectory::<f64>(&case, plan);
        assert_eq!(times, case.expected("timesteps"), "{path}");
        let exact = |values: &[f64]| (values.iter().fold(0.0f64, |m, x| m.max(x.abs())) * 6e-8 + 1e-9, 6e-8);
        let want = case.expected("latents");
        assert_close(path, &latents, &want, exact(&want));
        let last = case.expected("final");
        assert_close(path, &latents[latents.len() - last.len()..], &last, exact(&last));
        if plan.needs_x0() {
            let want = case.expected("x0_predictions");
            assert_close(path, &x0s, &want, exact(&want));
        }
    }

    /// In f32 the latents must meet the tolerance of the case, named `latents (f32)` or `final (f32)`.
    pub fn check_f32(path: &str, plan: &Plan, entry: &str) {
        let case = Case::open(path);
        let (latents, _, _) = trajectory::<f32>(&case, plan);
        let want = case.expected(entry.split(' ').next().unwrap());
        assert_close(path, &latents[latents.len() - want.len()..], &want, case.tolerance(entry));
    }

    const COEFS: Coefs =
        Coefs { inv_alpha: 2.0, sigma: 0.5, cx: 1.0, ce: 10.0, c0: 100.0, c1: 1000.0, noise: NoiseScale::None };

    #[test]
    fn every_term_counts() {
        let run = |noise: NoiseScale, v: f64| {
            let (mut out, mut x0) = ([0.0], [0.0]);
            let coefs = Coefs { noise, ..COEFS };
            apply(&coefs, &[3.0], &[2.0], Some(&[v]), Some(&[7.0]), Some(&[5.0]), &mut out, &mut x0).unwrap();
            (out[0], x0[0])
        };
        // x0 = 2·(3 - 0.5·2) = 4; 3 + 20 + 400 + 7000.
        assert_eq!(run(NoiseScale::None, 0.0), (7423.0, 4.0));
        assert_eq!(run(NoiseScale::Fixed(4.0), 0.0), (7443.0, 4.0));
        let learned = NoiseScale::Learned { log_lo: 0.0, log_hi: 4f64.ln() };
        assert_eq!(run(learned, -1.0).0, 7428.0);
        assert!((run(learned, 1.0).0 - 7433.0).abs() < 1e-12);
        assert!((run(learned, 0.0).0 - (7423.0 + 5.0 * 2f64.sqrt())).abs() < 1e-12);
    }

    #[test]
    fn missing_and_misshapen_inputs_are_named() {
        let run = |coefs: &Coefs, eps: &[f32], v: Option<&[f32]>, prev: Option<&[f32]>, noise: Option<&[f32]>| {
            apply(coefs, &[0.0; 2], eps, v, prev, noise, &mut [0.0; 2], &mut [0.0; 2]).unwrap_err().to_string()
        };
        let two = Some(&[0.0f32; 2][..]);
        let learned = Coefs { noise: NoiseScale::Learned { log_lo: 0.0, log_hi: 1.0 }, ..COEFS };
        assert!(run(&COEFS, &[0.0; 3], None, two, None).contains("length of eps differs from x; is 3; must be 2"));
        assert!(run(&COEFS, &[0.0; 2], None, None, None).contains("x0_prev is missing"));
        assert!(run(&learned, &[0.0; 2], None, two, two).contains("v is missing"));
        assert!(run(&learned, &[0.0; 2], two, two, None).contains("noise is missing"));
        assert!(run(&learned, &[0.0; 2], two, two, Some(&[0.0; 4])).contains("length of noise"));
    }
}
