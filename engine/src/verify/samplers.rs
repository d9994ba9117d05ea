//! Family `samplers`: trajectories with a closed-form model, respacing tables, terms of the training loss.

use super::case::{Case, Values};
use super::checks::{Checks, unknown};
use crate::error::{Error, Result};
use crate::ops::{add_noise, contracts, loss_diffusion, loss_diffusion_backward, solver_step};
use crate::sample::config::SolverConfig;
use crate::sample::dpm::DpmEndPoint;
use crate::sample::respacing::Respacing;
use crate::sample::schedule::Schedule;
use crate::sample::solver::{Plan, Prediction, Sampler, Variance};
use crate::sample::vlb::LossCoefs;
use crate::tensor::{Device, Tensor};
use serde_json::Value;

const KINDS: [&str; 5] = ["dpm_solver_pp", "ddim", "ddpm", "respacing_tables", "training_loss"];

/// Runs the part that the case's name begins with.
pub fn run(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    match KINDS.iter().find(|kind| case.name.starts_with(**kind)) {
        Some(&"respacing_tables") => tables(case, checks),
        Some(&"training_loss") => training_loss(case, checks),
        Some(kind) => trajectory(case, checks, &plan(case, kind)?),
        None => Err(unknown("sampler", &case.name, &KINDS)),
    }
}

fn plan(case: &Case, kind: &str) -> Result<Plan> {
    let schedule = Schedule::default();
    let steps = case.whole("steps")?;
    let spacing = |default: Respacing| case.text("respacing").map_or(Ok(default), str::parse);
    match kind {
        "ddpm" => Plan::ddpm(&schedule, &spacing(Respacing::Sections(vec![steps]))?, Variance::Learned),
        "ddim" => {
            let eta = if case.config.get("eta").is_some() { case.number("eta")? } else { 0.0 };
            Plan::ddim(&schedule, &spacing(Respacing::Stride(steps))?, eta)
        }
        _ => {
            // The released configuration decides, where the case has one; the original code has none and ends elsewhere.
            let file = "model/scheduler/scheduler_config.json";
            let original = case.name.contains("official") || case.text("variant") == Some("official");
            let end = if original { DpmEndPoint::Official } else { DpmEndPoint::Zero };
            let config = match case.folder.join(file).exists() {
                true if !original => SolverConfig::from_scheduler_json(&case.json(file)?)?,
                _ => SolverConfig { sampler: Sampler::DpmPlusPlus { end }, schedule, prediction: Prediction::Noise },
            };
            config.sampler.plan(&config.schedule, steps, Variance::Learned)
        }
    }
}

/// Walks the plan with eps(x, t) = tanh(a·x + b·t/1000), v(x, t) = tanh(c·x + d·t/1000).
fn trajectory(case: &Case, checks: &mut Checks<'_>, plan: &Plan) -> Result<()> {
    let device = Device::cpu();
    let model = case.config.get("model").cloned().unwrap_or(Value::Null);
    let parameter = |name: &str| {
        let missing = || Error::failure(format!("config.model.{name}"), "missing field").must("a number");
        model.get(name).and_then(Value::as_f64).ok_or_else(missing)
    };
    let (a, b, c, d) = (parameter("a")?, parameter("b")?, parameter("c")?, parameter("d")?);
    let start = case.input("x")?;
    let &[batch, channels, ..] = start.shape.as_slice() else {
        return Err(Error::failure("x", "wrong rank").is(format!("{:?}", start.shape)).must("[B, C, H, W]"));
    };
    let pixels = start.data.len() / (batch * channels).max(1);
    let shape = [batch, channels, pixels];
    let noise = if plan.needs_noise() { Some(case.input("noise")?.f32s()) } else { None };
    let mut x = Tensor::from_f32(&device, &shape, &start.f32s())?;
    let mut x0: Option<Tensor> = None;
    let (mut latents, mut estimates) = (start.data.clone(), Vec::new());
    for (i, step) in plan.steps.iter().enumerate() {
        let mut output = device.empty(&[batch, 2 * channels, pixels])?;
        let wave = |x: f32, scale: f64, shift: f64| (scale as f32 * x + (shift * step.timestep / 1000.0) as f32).tanh();
        let half = channels * pixels;
        for (out, x) in output.f32s_mut()?.chunks_mut(2 * half).zip(x.f32s()?.chunks(half)) {
            let (eps, v) = out.split_at_mut(half);
            eps.iter_mut().zip(x).for_each(|(o, &x)| *o = wave(x, a, b));
            v.iter_mut().zip(x).for_each(|(o, &x)| *o = wave(x, c, d));
        }
        let z = match &noise {
            Some(noise) => Some(Tensor::from_f32(&device, &shape, slice(noise, i, x.len())?)?),
            None => None,
        };
        let next = solver_step(&x, &output, None, z.as_ref(), x0.as_ref(), step.coefs.params(1.0, 0))?;
        latents.extend(next.x_next.f32s()?.iter().map(|&v| f64::from(v)));
        estimates.extend(next.x0.f32s()?.iter().map(|&v| f64::from(v)));
        (x, x0) = (next.x_next, Some(next.x0));
    }
    let steps = plan.steps.len();
    let stacked = |n: usize| [&[n], start.shape.as_slice()].concat();
    checks.values("timesteps", &[steps], &plan.steps.iter().map(|s| s.timestep).collect::<Vec<_>>())?;
    checks.values("latents", &stacked(steps + 1), &latents)?;
    checks.values("latents_diffusers", &stacked(steps + 1), &latents)?;
    checks.values("x0_predictions", &stacked(steps), &estimates)?;
    checks.values("final", &start.shape, &latents[steps * x.len()..])
}

fn slice(values: &[f32], index: usize, len: usize) -> Result<&[f32]> {
    values.get(index * len..(index + 1) * len).ok_or_else(|| {
        Error::failure("noise", "too short").is(format!("{} values", values.len())).must(format!("{len} for each step"))
    })
}

/// Kept timesteps and the schedule that joins them, for every respacing string.
fn tables(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    let file = case.json("tables.json")?;
    let tables = file.as_object().filter(|t| !t.is_empty());
    let tables = tables.ok_or_else(|| Error::failure("tables.json", "no tables").must("one per respacing string"))?;
    for (spec, table) in tables {
        checks.label(spec);
        let respaced = Schedule::default().respace(&spec.parse()?)?;
        let steps = respaced.schedule.len();
        let each = |value: &dyn Fn(usize) -> f64| (0..steps).map(value).collect::<Vec<f64>>();
        let computed = [
            ("timestep_map", respaced.timesteps.iter().map(|&t| t as f64).collect()),
            ("beta", each(&|k| respaced.schedule.beta(k))),
            ("alpha_bar", each(&|k| respaced.schedule.alpha_bar(k))),
            ("log_posterior_variance_clipped", each(&|k| respaced.schedule.log_posterior_variance_clipped(k))),
        ];
        for (name, want) in table.as_object().into_iter().flatten() {
            let want: Option<Vec<f64>> = want.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
            match (want, computed.iter().find(|(n, _)| n == name)) {
                (Some(want), Some((_, got))) if name == "timestep_map" => {
                    checks.verdict(name, (*got != want).then(|| "other timesteps are kept".to_string()));
                }
                (Some(want), Some((_, got))) => checks.list(name, got, &want),
                _ => checks.verdict(name, Some("expected, but nothing computes it".into())),
            }
        }
    }
    Ok(())
}

/// Loss terms of given predictions, and the gradient of their mean.
fn training_loss(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    let device = Device::cpu();
    let schedule = Schedule::default();
    let x0 = case.input("x0")?;
    let &[b, c, ..] = x0.shape.as_slice() else {
        return Err(Error::failure("x0", "wrong rank").is(format!("{:?}", x0.shape)).must("[B, C, H, W]"));
    };
    let pixels = x0.data.len() / (b * c).max(1);
    let flat = |values: &Values, channels: usize| Tensor::from_f32(&device, &[b, channels, pixels], &values.f32s());
    let (noise, output) = (case.input("noise")?, case.input("model_output")?);
    let (mut weights, mut rows) = (Vec::new(), Vec::new());
    for t in case.input("t")?.data {
        let row = LossCoefs::new(&schedule, t as usize)?;
        weights.extend(row.noise_row());
        rows.extend(row.row());
    }
    let coefs = Tensor::from_f32(&device, &[b, rows.len() / b.max(1)], &rows)?;
    let weights = Tensor::from_f32(&device, &[b, 2], &weights)?;
    let (clean, z, prediction) = (flat(&x0, c)?, flat(&noise, c)?, flat(&output, 2 * c)?);
    let wide = [b, c * pixels];
    let x_t = add_noise(&clean.reshape(&wide)?, &z.reshape(&wide)?, &weights, contracts::add_noise::Params {})?;
    checks.tensor("x_t", &x_t.reshape(&x0.shape)?)?;
    let settings = contracts::loss_diffusion::Params { vlb_weight: 1.0 };
    let terms = loss_diffusion(&prediction, &clean, &z, &coefs, settings)?;
    checks.tensor("mse", &terms.mse)?;
    checks.tensor("vb", &terms.vb)?;
    let sums: Vec<f64> = terms.mse.f32s()?.iter().zip(terms.vb.f32s()?).map(|(m, v)| f64::from(m + v)).collect();
    checks.values("loss", &[b], &sums)?;
    let one = Tensor::from_f32(&device, &[1], &[1.0])?;
    if let Some(grad) = loss_diffusion_backward(&one, &prediction, &clean, &z, &coefs, true, settings)? {
        checks.tensor("grad.model_output", &grad.reshape(&output.shape)?)?;
    }
    Ok(())
}
