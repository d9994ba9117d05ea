//! Whole models as bench cases: the same work for us and for a peer, with weights and inputs that both can load.

use graft_engine::autograd::{Graph, Precision, Var};
use graft_engine::backend::Device;
use graft_engine::error::{Error, Result};
use graft_engine::io::safetensors::{self, TensorRecord};
use graft_engine::models::dit::{self, Dit, DitConfig, Run, SaveAs};
use graft_engine::ops::contracts::loss_regression;
use graft_engine::tensor::Tensor;
use graft_engine::train::optimizer::{AdamW, AdamWSettings};
use graft_kernels::check::{Fill, draw_f32, draw_i32};
use std::collections::BTreeMap;
use std::path::Path;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// One forward pass, nothing recorded.
    Forward,
    /// Forward, backward and one AdamW update.
    TrainingStep,
}

/// One model at one batch size.
#[derive(Clone, Copy, Debug)]
pub struct ModelCase {
    /// Name of the row.
    pub name: &'static str,
    /// Published size.
    pub size: &'static str,
    /// Batch B.
    pub batch: usize,
    /// What is measured.
    pub work: Work,
    /// The peer's time over ours that the project wants at the least; the small case has no target.
    pub target: Option<f64>,
}

/// Cases in the order in which they run; the last is small, so that it shows in seconds whether a set-up works.
pub const CASES: [ModelCase; 3] = [
    ModelCase { name: "dit_xl_2_256_forward", size: "DiT-XL/2", batch: 1, work: Work::Forward, target: Some(0.9) },
    ModelCase {
        name: "dit_s_2_256_training_step",
        size: "DiT-S/2",
        batch: 8,
        work: Work::TrainingStep,
        target: Some(0.8),
    },
    ModelCase { name: "dit_s_8_256_training_step", size: "DiT-S/8", batch: 2, work: Work::TrainingStep, target: None },
];

/// The case with a name.
///
/// # Errors
/// When there is none.
pub fn case(name: &str) -> Result<ModelCase> {
    let names = CASES.map(|c| c.name).join(", ");
    CASES.into_iter().find(|c| c.name == name).ok_or_else(|| Error::usage("case", "unknown case").is(name).must(names))
}

/// A model with its inputs, ready to be run again and again.
pub struct Prepared {
    case: ModelCase,
    precision: Precision,
    model: Dit,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    target: Tensor,
    optimiser: Option<AdamW>,
}

impl Prepared {
    /// Draws the weights and inputs of a case: the same on every machine.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(case: ModelCase, precision: Precision) -> Result<Prepared> {
        let device = Device::cpu();
        let mut model = Dit::new(DitConfig::named(case.size)?, &device, 0)?;
        randomise(&mut model)?;
        if case.work == Work::Forward && precision == Precision::Bf16 {
            dit::to_bf16(&mut model)?;
        }
        let c = &model.config;
        let (b, side) = (case.batch, c.input_size);
        let values = |name: &str, channels: usize| {
            let len = b * channels * side * side;
            Tensor::from_f32(&device, &[b, channels, side, side], &draw_f32(case.name, name, len, Fill::Normal))
        };
        let (x, target) = (values("x", c.in_channels)?, values("target", c.out_channels())?);
        let t: Vec<f32> = draw_i32(case.name, "t", b, Fill::Index(1000)).into_iter().map(|t| t as f32).collect();
        let y = draw_i32(case.name, "y", b, Fill::Index(c.classes));
        let optimiser = match case.work {
            Work::Forward => None,
            Work::TrainingStep => Some(AdamW::new(AdamWSettings::PLAIN, &model.params)?),
        };
        let (t, y) = (Tensor::from_f32(&device, &[b], &t)?, Tensor::from_i32(&device, &[b], &y)?);
        Ok(Prepared { case, precision, model, x, t, y, target, optimiser })
    }

    /// One measured unit of work. Returns the output of a forward pass, or the loss of a training step.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn run(&mut self) -> Result<Vec<f32>> {
        let x = Var::constant(self.x.clone());
        let Some(optimiser) = &mut self.optimiser else {
            let g = Graph::inference(self.precision);
            return self.model.forward(&g, &x, &self.t, &self.y, Run::default())?.into_tensor().to_vec();
        };
        let (loss, grads) = {
            let g = Graph::training(self.precision);
            let out = self.model.forward(&g, &x, &self.t, &self.y, Run::default())?;
            let flat = [self.case.batch, self.model.config.out_channels(), self.x.dim(2) * self.x.dim(3)];
            let (out, target) = (g.reshape(&out, &flat)?, Var::constant(self.target.reshape(&flat)?));
            let loss = g.loss_regression(&out, &target, loss_regression::Params { kind: 1, delta: 1.0 })?;
            (loss.tensor().to_vec()?, g.backward(&loss)?)
        };
        optimiser.update(&mut self.model.params, &grads, AdamWSettings::PLAIN.lr)?;
        Ok(loss)
    }

    /// Tokens N of a sample.
    pub fn tokens(&self) -> usize {
        self.model.config.tokens()
    }

    /// Writes weights (diffusers layout, f32) and inputs below `folder`, for a peer to load.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn export(&self, folder: &Path) -> Result<()> {
        dit::save(&self.model, &folder.join("model"), SaveAs::F32, &BTreeMap::new())?;
        let y: Vec<f32> = self.y.i32s()?.iter().map(|&y| y as f32).collect();
        let y = Tensor::from_f32(self.y.device(), &[self.case.batch], &y)?;
        write_tensors(
            &folder.join("inputs.safetensors"),
            &[("x", &self.x), ("t", &self.t), ("y", &y), ("target", &self.target)],
        )
    }
}

/// Gives every parameter small random values: a fresh DiT starts as the identity and would compare nothing.
///
/// # Errors
/// When memory runs out.
pub fn randomise(model: &mut Dit) -> Result<()> {
    let trainable: Vec<_> =
        model.params.iter().filter(|(_, p)| p.trainable).map(|(id, p)| (id, p.name.clone())).collect();
    for (id, name) in trainable {
        let param = &model.params.get(id).value;
        let (device, shape) = (param.device().clone(), param.shape());
        let values = draw_f32("weights", &name, shape.len(), Fill::Uniform(-0.03, 0.03));
        model.params.set(id, Tensor::from_f32(&device, shape.dims(), &values)?)?;
    }
    Ok(())
}

fn write_tensors(path: &Path, tensors: &[(&str, &Tensor)]) -> Result<()> {
    let values = tensors.iter().map(|(_, t)| t.to_vec()).collect::<Result<Vec<_>>>()?;
    let records = tensors.iter().zip(&values).map(|((name, t), v)| TensorRecord::f32(*name, t.shape().dims(), v));
    safetensors::write(path, records, &BTreeMap::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_training_step_lowers_its_own_loss_and_a_case_is_the_same_each_time() {
        let case = case("dit_s_8_256_training_step").unwrap();
        let mut one = Prepared::new(case, Precision::F32).unwrap();
        let mut two = Prepared::new(case, Precision::F32).unwrap();
        let first = one.run().unwrap();
        assert_eq!(first, two.run().unwrap());
        assert!(one.run().unwrap() < first);
    }
}
