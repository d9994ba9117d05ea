//! A DiT: forward passes and training steps.

use super::{ModelCase, Subject, Work, write_inputs};
use graft_engine::autograd::{Graph, Precision, Var};
use graft_engine::backend::Device;
use graft_engine::error::Result;
use graft_engine::models::dit::{self, Dit, DitConfig, Run, SaveAs};
use graft_engine::ops::contracts::loss_regression;
use graft_engine::tensor::Tensor;
use graft_engine::train::optimizer::{AdamW, AdamWSettings};
use graft_kernels::check::{Fill, draw_f32, draw_i32};
use std::collections::BTreeMap;
use std::path::Path;

/// A DiT with its inputs.
pub struct Case {
    case: ModelCase,
    precision: Precision,
    model: Dit,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    target: Tensor,
    optimiser: Option<AdamW>,
}

impl Case {
    /// Draws the weights and inputs of a case: the same on every machine.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn new(case: ModelCase, size: &str, precision: Precision) -> Result<Case> {
        let device = Device::cpu();
        let mut model = Dit::new(DitConfig::named(size)?, &device, 0)?;
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
            Work::Forward | Work::Decode => None,
            Work::TrainingStep => Some(AdamW::new(AdamWSettings::PLAIN, &model.params)?),
        };
        let (t, y) = (Tensor::from_f32(&device, &[b], &t)?, Tensor::from_i32(&device, &[b], &y)?);
        Ok(Case { case, precision, model, x, t, y, target, optimiser })
    }
}

impl Subject for Case {
    fn run(&mut self) -> Result<Vec<f32>> {
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

    fn export(&self, folder: &Path) -> Result<()> {
        dit::save(&self.model, &folder.join("model"), SaveAs::F32, &BTreeMap::new())?;
        let y: Vec<f32> = self.y.i32s()?.iter().map(|&y| y as f32).collect();
        let y = Tensor::from_f32(self.y.device(), &[self.case.batch], &y)?;
        write_inputs(folder, &[("x", &self.x), ("t", &self.t), ("y", &y), ("target", &self.target)])
    }

    fn tokens(&self) -> usize {
        self.model.config.tokens()
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
