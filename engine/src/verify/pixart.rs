//! Families `pixart_original` and `pixart_diffusers`: forward passes and gradients of the same weights in two layouts.

use super::case::Case;
use super::checks::Checks;
use super::dit::pickles;
use crate::autograd::{Graph, Precision, Var};
use crate::error::Result;
use crate::models::dit::FREQUENCIES;
use crate::models::pixart::{self, Layout, MicroConditions, PixArt, Run, Semantics, Text};
use crate::ops::{contracts, sinusoid};
use crate::sample::cfg;
use crate::tensor::{Device, Tensor};

/// Inputs of a forward pass.
#[derive(Clone)]
pub(super) struct Inputs {
    x: Tensor,
    t: Tensor,
    text: Tensor,
    mask: Option<Vec<i32>>,
    micro: Option<MicroConditions>,
}

impl Inputs {
    /// Those of a case; without a mask every token counts.
    pub(super) fn read(case: &Case, device: &Device) -> Result<Inputs> {
        let mask = match case.has_input("text_mask") {
            true => Some(case.input("text_mask")?.data.iter().map(|m| i32::from(*m != 0.0)).collect()),
            false => None,
        };
        let floats = |name: &str| case.input_f32(device, name);
        // Size and aspect ratio, where the model is told them.
        let size = ["resolution", "img_hw"].into_iter().find(|name| case.has_input(name));
        let micro = match size {
            None => None,
            Some(name) => {
                let aspect = floats("aspect_ratio")?;
                Some(MicroConditions { size: floats(name)?, aspect: aspect.reshape(&[aspect.len()])? })
            }
        };
        Ok(Inputs { x: floats("x")?, t: floats("t")?, text: floats("text")?, mask, micro })
    }
}

/// `pixart_original`: every checkpoint in the model folder gives the same results.
pub fn original(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    let device = case.device.clone();
    for path in pickles(case)? {
        if let Some(name) = path.file_name() {
            checks.label(&name.to_string_lossy());
        }
        results(case, checks, &pixart::load(&path, &device, false)?, Layout::Original)?;
    }
    checks.label("folder");
    results(case, checks, &pixart::load(&case.model(), &device, false)?, Layout::Original)
}

/// `pixart_diffusers`: one folder under both semantics, which agree here.
pub fn diffusers(case: &Case, checks: &mut Checks<'_>) -> Result<()> {
    results(case, checks, &pixart::load(&case.model(), &case.device, false)?, Layout::Diffusers)
}

fn results(case: &Case, checks: &mut Checks<'_>, model: &PixArt, layout: Layout) -> Result<()> {
    let inputs = Inputs::read(case, model.device())?;
    let semantics = if layout == Layout::Diffusers { Semantics::Diffusers } else { Semantics::Original };
    checks.tensor("output", &forward(model, &inputs, semantics, checks.precision("output"))?)?;
    let waves = contracts::sinusoid::Params { denominator: 128.0 };
    checks.tensor("timestep_sinusoid", &sinusoid(&inputs.t, FREQUENCIES, waves)?)?;
    if case.config.get("cfg_scale").is_some() {
        let doubled = {
            let mut x = inputs.x.copy()?;
            cfg::repeat_first_half(&mut x)?;
            Inputs { x, ..inputs.clone() }
        };
        let mut guided = forward(model, &doubled, semantics, checks.precision("output_guided"))?;
        cfg::combine(&mut guided, case.number("cfg_scale")?, model.config.out_channels)?;
        checks.tensor("output_guided", &guided)?;
    }
    if case.has_input("target") {
        gradients(case, checks, model, &inputs, layout)?;
    }
    Ok(())
}

/// The prediction of a model.
pub(super) fn forward(model: &PixArt, inputs: &Inputs, semantics: Semantics, precision: Precision) -> Result<Tensor> {
    let g = Graph::inference(precision);
    let text = Text::new(&g, &Var::constant(inputs.text.clone()), inputs.mask.as_deref())?;
    let keys = model.keys(&g, &text)?;
    let x = Var::constant(inputs.x.clone());
    let run = Run { semantics, checkpoint: false };
    Ok(model.forward(&g, &x, &inputs.t, &keys, inputs.micro.as_ref(), run)?.into_tensor())
}

/// Gradients of mean((output − target)²), with and without keeping the activations.
fn gradients(case: &Case, checks: &mut Checks<'_>, model: &PixArt, inputs: &Inputs, layout: Layout) -> Result<()> {
    let target = case.input_f32(model.device(), "target")?;
    for checkpoint in [false, true] {
        if checkpoint {
            checks.label("checkpointed");
        }
        let g = Graph::training(Precision::F32);
        let (x, features) = (g.leaf(inputs.x.clone()), g.leaf(inputs.text.clone()));
        let keys = model.keys(&g, &Text::new(&g, &features, inputs.mask.as_deref())?)?;
        let run = Run { checkpoint, ..Run::default() };
        let out = model.forward(&g, &x, &inputs.t, &keys, inputs.micro.as_ref(), run)?;
        let rows = [out.dim(0), out.dim(1), out.dim(2) * out.dim(3)];
        let squared = contracts::loss_regression::Params { kind: 1, delta: 1.0 };
        let loss = g.loss_regression(&g.reshape(&out, &rows)?, &Var::constant(target.reshape(&rows)?), squared)?;
        checks.tensor("loss", loss.tensor())?;
        let mut found = g.backward(&loss)?;
        for (name, leaf) in [("grad.x", &x), ("grad.text", &features)] {
            if let Some(grad) = found.take(leaf) {
                checks.tensor(name, &grad)?;
            }
        }
        for (id, param) in model.params.iter() {
            let Some(grad) = found.param(&model.params, id) else { continue };
            let parts = layout.parts(&param.name);
            let mut shape = grad.shape().dims().to_vec();
            shape[0] /= parts.len();
            let values: Vec<f64> = grad.to_vec()?.into_iter().map(f64::from).collect();
            for (name, values) in parts.iter().zip(values.chunks(values.len() / parts.len())) {
                checks.values(&format!("grad.{name}"), &shape, values)?;
            }
        }
    }
    Ok(())
}
