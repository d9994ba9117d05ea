//! Families `dit_original` and `dit_diffusers`: forward passes, guidance, gradients, checkpoints.

use super::case::Case;
use super::checks::Checks;
use super::refusals;
use crate::autograd::{Graph, Precision, Var};
use crate::error::Result;
use crate::io::files;
use crate::models::dit::{self, Dit, FREQUENCIES, Run, Semantics};
use crate::ops::{contracts, sinusoid};
use crate::sample::cfg;
use crate::tensor::{Device, Tensor};
use std::path::PathBuf;

/// Output channels that the original guides.
const GUIDED: usize = 3;

/// Inputs of a forward pass.
struct Inputs {
    x: Tensor,
    t: Tensor,
    y: Tensor,
}

impl Inputs {
    fn read(case: &Case, device: &Device) -> Result<Inputs> {
        Ok(Inputs { x: case.input_f32(device, "x")?, t: case.input_f32(device, "t")?, y: case.input_i32(device, "y")? })
    }
}

/// `dit_original`: every checkpoint in the model folder gives the same results.
pub fn original(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    let checkpoints = pickles(case)?;
    if case.text("verdict") == Some("refuse") {
        let paths = if checkpoints.is_empty() { vec![case.model()] } else { checkpoints };
        for path in paths {
            refusals::refused(case, checks, || dit::load(&path, &Device::cpu()).map(|_| ()));
        }
        return Ok(());
    }
    if checkpoints.is_empty() {
        return results(case, checks, &dit::load(&case.model(), &case.device)?);
    }
    for path in checkpoints {
        if let Some(name) = path.file_name() {
            checks.label(&name.to_string_lossy());
        }
        results(case, checks, &dit::load(&path, &case.device)?)?;
    }
    Ok(())
}

/// `torch.save` files of the model folder.
pub(super) fn pickles(case: &Case) -> Result<Vec<PathBuf>> {
    let is_pickle = |p: &PathBuf| p.extension().is_some_and(|e| e == "pt" || e == "pth" || e == "bin");
    Ok(files::list(&case.model())?.into_iter().filter(is_pickle).collect())
}

fn results(case: &Case, checks: &mut Checks<'_>, model: &Dit) -> Result<()> {
    let inputs = Inputs::read(case, model.device())?;
    let output = forward(model, &inputs, Semantics::ORIGINAL, checks.precision("output"))?;
    checks.tensor("output", &output)?;
    checks.differs("output_raw", "output", &output)?;
    let waves = contracts::sinusoid::Params { denominator: Semantics::ORIGINAL.frequency_denominator };
    checks.tensor("timestep_sinusoid", &sinusoid(&inputs.t, FREQUENCIES, waves)?)?;
    if case.config.get("cfg_scale").is_some() {
        let scale = case.number("cfg_scale")?;
        let g = Graph::inference(checks.precision("output_guided"));
        let guided = GUIDED.min(model.config.in_channels);
        checks.tensor(
            "output_guided",
            &cfg::forward(model, &g, &inputs.x, &inputs.t, &inputs.y, Run::default(), scale, guided)?,
        )?;
    }
    if case.has_input("target") {
        gradients(case, checks, model, &inputs)?;
    }
    Ok(())
}

fn forward(model: &Dit, inputs: &Inputs, semantics: Semantics, precision: Precision) -> Result<Tensor> {
    let g = Graph::inference(precision);
    let run = Run { semantics, checkpoint: false };
    Ok(model.forward(&g, &Var::constant(inputs.x.clone()), &inputs.t, &inputs.y, run)?.into_tensor())
}

/// Gradients of mean((output − target)²), with and without keeping the activations.
fn gradients(case: &Case, checks: &mut Checks<'_>, model: &Dit, inputs: &Inputs) -> Result<()> {
    let target = case.input_f32(model.device(), "target")?;
    for checkpoint in [false, true] {
        if checkpoint {
            checks.label("checkpointed");
        }
        let g = Graph::training(Precision::F32);
        let x = g.leaf(inputs.x.clone());
        let out = model.forward(&g, &x, &inputs.t, &inputs.y, Run { checkpoint, ..Run::default() })?;
        let rows = [out.dim(0), out.dim(1), out.dim(2) * out.dim(3)];
        let squared = contracts::loss_regression::Params { kind: 1, delta: 1.0 };
        let loss = g.loss_regression(&g.reshape(&out, &rows)?, &Var::constant(target.reshape(&rows)?), squared)?;
        checks.tensor("loss", loss.tensor())?;
        let mut found = g.backward(&loss)?;
        if let Some(grad) = found.take(&x) {
            checks.tensor("grad.x", &grad)?;
        }
        for (id, param) in model.params.iter() {
            if let Some(grad) = found.param(&model.params, id) {
                checks.tensor(&format!("grad.{}", param.name), grad)?;
            }
        }
    }
    Ok(())
}

/// `dit_diffusers`: one folder under both semantics.
pub fn diffusers(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    folder(case, checks, &dit::load(&case.model(), &case.device)?)
}

/// Outputs of a folder in original and in diffusers' semantics.
pub(super) fn folder(case: &Case, checks: &mut Checks<'_>, model: &Dit) -> Result<()> {
    let inputs = Inputs::read(case, model.device())?;
    let semantics =
        [("output_original", Semantics::ORIGINAL), ("output_diffusers", Semantics::diffusers(model.config.norm_eps))];
    for (name, semantics) in semantics {
        checks.tensor(name, &forward(model, &inputs, semantics, checks.precision(name))?)?;
    }
    Ok(())
}
