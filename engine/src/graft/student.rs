//! One site in stage 1: an operator (or a pair of blocks) that learns to imitate what it replaces.
//!
//! A student has its own parameters and its own optimiser, and sees nothing of the others: what it becomes does not
//! depend on which other sites are grafted.

use super::pair::PairNet;
use super::plan::Assignment;
use super::settings::{DistillConfig, Start};
use crate::autograd::{Graph, ParamStore, Precision, Var};
use crate::error::{Error, Result};
use crate::models::sites::Seen;
use crate::nn::operators::{self, BlockDims, Operator};
use crate::nn::{Builder, Scheme};
use crate::ops::contracts::{gate_residual, loss_regression};
use crate::tensor::{Device, Tensor};
use crate::train::optimizer::AdamW;
use serde::{Deserialize, Serialize};

/// What a student runs.
pub(super) enum Net {
    /// An operator of a block.
    Operator(Box<dyn Operator>),
    /// Two blocks in parallel.
    Pair(Box<PairNet>),
}

/// An operator or a pair of blocks in training.
pub(super) struct Student {
    pub assignment: Assignment,
    pub params: ParamStore,
    pub optimiser: AdamW,
    net: Net,
    loss: loss_regression::Params,
    gate_scaled: bool,
    precision: Precision,
}

/// What a student learns from: a batch of what the operator saw that it replaces, and of what that gave.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lesson<'l> {
    /// `[B, N, D]`.
    pub input: &'l Tensor,
    /// `[B, N, D]`, before the gate.
    pub target: &'l Tensor,
    /// `[B, C, D]` and its row that is the gate of this site; a pair of blocks has none.
    pub gate: Option<(&'l Tensor, usize)>,
    /// `[B, 1, D]` what blocks are modulated by; only a pair of blocks needs it.
    pub condition: Option<&'l Tensor>,
}

impl<'l> From<&Seen<'l>> for Lesson<'l> {
    fn from(seen: &Seen<'l>) -> Self {
        let gate = seen.gate.map(|(table, row)| (table.tensor(), row));
        let condition = seen.condition.map(|condition| condition.tensor());
        Lesson { input: seen.input.tensor(), target: seen.output.tensor(), gate, condition }
    }
}

/// How far an operator is from the one it replaces, over the held-out batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Residual {
    /// Mean loss of the kind that is trained.
    pub loss: f64,
    /// ‖ŷ − y‖₂ / ‖y‖₂ over all elements of all batches; an operator that gives zeros has 1.
    pub relative: f64,
}

/// Sums from which a [`Residual`] is made.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ResidualSums {
    loss: f64,
    batches: u32,
    error: f64,
    target: f64,
}

impl ResidualSums {
    pub fn residual(&self) -> Residual {
        Residual { loss: self.loss / f64::from(self.batches.max(1)), relative: (self.error / self.target).sqrt() }
    }
}

impl Student {
    /// A student of parameters that are already there.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn assemble(assignment: Assignment, params: ParamStore, net: Net, config: &DistillConfig) -> Result<Student> {
        let optimiser = AdamW::new(config.optimizer, &params)?;
        let loss = match assignment.loss {
            Some(own) => config.loss.params_of(own),
            None => config.loss.params(assignment.site),
        };
        let (gate_scaled, precision) = (config.gate_scaled, config.dtype.into());
        Ok(Student { assignment, params, optimiser, net, loss, gate_scaled, precision })
    }

    /// One update; returns the loss before it.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, naming site and step: nothing is changed then.
    pub fn learn(&mut self, lesson: &Lesson<'_>, lr: f64) -> Result<f64> {
        let (value, grads) = {
            let g = Graph::training(self.precision);
            let (loss, _) = self.compare(&g, lesson)?;
            let value = f64::from(loss.tensor().values()?[0]);
            if !value.is_finite() {
                return Err(Error::failure(
                    format!("{}: step {}", self.assignment, self.optimiser.step),
                    "the loss is not finite",
                )
                .is(value)
                .must("a finite number")
                .fix("lower the learning rate of stage 1, or use f32 products; the last checkpoint is good"));
            }
            (value, g.backward(&loss)?)
        };
        self.optimiser.update(&mut self.params, &grads, lr).map_err(|e| e.context(&self.assignment))?;
        Ok(value)
    }

    /// Adds one held-out batch to `sums`.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn measure(&self, lesson: &Lesson<'_>, sums: &mut ResidualSums) -> Result<()> {
        let (loss, output) = self.compare(&Graph::inference(self.precision), lesson)?;
        if lesson.target.device().is_dry() {
            return Ok(());
        }
        sums.loss += f64::from(loss.tensor().values()?[0]);
        sums.batches += 1;
        let (outputs, targets) = (output.tensor().values()?, lesson.target.values()?);
        for (y, t) in outputs.iter().zip(targets.iter()) {
            sums.error += f64::from(y - t).powi(2);
            sums.target += f64::from(*t).powi(2);
        }
        Ok(())
    }

    /// Loss and output.
    fn compare<'m>(&'m self, g: &Graph<'m>, lesson: &Lesson<'_>) -> Result<(Var, Var)> {
        let input = Var::constant(lesson.input.clone());
        let output = match &self.net {
            Net::Operator(operator) => operator.forward(g, &self.params, &input, None)?,
            Net::Pair(pair) => pair.forward(g, &self.params, &input, lesson.condition)?,
        };
        let target = Var::constant(lesson.target.clone());
        // A pair of blocks has no gate: it is compared as it is.
        let Some((gates, gate_row)) = lesson.gate.filter(|_| self.gate_scaled) else {
            return Ok((g.loss_regression(&output, &target, self.loss)?, output));
        };
        // Both as the residual stream would receive them: times the gate, on top of nothing.
        let nothing = Var::constant(Tensor::zeros(lesson.target.device(), lesson.target.shape().dims())?);
        let gates = Var::constant(gates.clone());
        let gated = |x: &Var| g.gate_residual(&nothing, &gates, x, gate_residual::Params { gate_row });
        Ok((g.loss_regression(&gated(&output)?, &gated(&target)?, self.loss)?, output))
    }
}

/// A new operator, its parameters named as in the whole model: with its own default initialisation, and where the
/// assignment says so with the values of the `teacher` in every parameter of the same name, shape and meaning.
pub(super) fn initial(
    assignment: &Assignment,
    dims: BlockDims,
    teacher: &ParamStore,
    device: &Device,
    config: &DistillConfig,
) -> Result<(ParamStore, Net)> {
    let mut params = ParamStore::default();
    let mut builder = Builder::new(&mut params, device, config.seed, Scheme::Torch);
    let operator =
        operators::build(&assignment.spec, assignment.site, dims, &mut builder.below(&assignment.to_string()))?;
    if assignment.start == Start::Teacher {
        copy_teacher(&mut params, operator.as_ref(), assignment, teacher)?;
    }
    Ok((params, Net::Operator(operator)))
}

/// Takes over what the teacher has of an operator's parameters.
///
/// # Errors
/// Where it has none of them: a plan that asks for this start must not get another.
pub(super) fn copy_teacher(
    params: &mut ParamStore,
    operator: &dyn Operator,
    assignment: &Assignment,
    teacher: &ParamStore,
) -> Result<()> {
    let mut copied = 0;
    for (own, theirs) in operator.teacher_names() {
        let found = params.find(&format!("{assignment}.{own}")).zip(teacher.find(&format!("{assignment}.{theirs}")));
        if let Some((to, from)) = found
            && params.get(to).value.shape() == teacher.get(from).value.shape()
        {
            params.set(to, teacher.get(from).value.copy()?)?;
            copied += 1;
        }
    }
    if copied > 0 {
        return Ok(());
    }
    Err(Error::usage(assignment.to_string(), "the teacher has none of the parameters of the new operator")
        .is(&assignment.spec)
        .must("a parameter of the same name, shape and meaning")
        .fix("take out start = \"teacher\" for this layer"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graft::settings::Loss;
    use crate::nn::operators::{Site, Spec};
    use crate::train::optimizer::AdamWSettings;

    fn begin(
        assignment: Assignment,
        dims: BlockDims,
        teacher: &ParamStore,
        device: &Device,
        config: &DistillConfig,
    ) -> Result<Student> {
        let (params, net) = initial(&assignment, dims, teacher, device, config)?;
        Student::assemble(assignment, params, net, config)
    }

    fn student(device: &Device, kind: &str, lr: f64) -> Student {
        let optimizer = AdamWSettings { lr, ema: 0.0, ..AdamWSettings::default() };
        let config = DistillConfig { optimizer, ..DistillConfig::default() };
        let assignment = Assignment::new(0, Site::Attn, Spec::new(kind));
        begin(assignment, DIMS, &ParamStore::default(), device, &config).unwrap()
    }

    const DIMS: BlockDims = BlockDims { width: 8, heads: 2, grid: [2, 2] };

    fn tensor(device: &Device, values: &[f32]) -> Tensor {
        Tensor::from_f32(device, &[1, 4, 8], &values.iter().cycle().take(32).copied().collect::<Vec<_>>()).unwrap()
    }

    /// A lesson whose gate is one.
    fn lesson<'l>(input: &'l Tensor, target: &'l Tensor, gates: &'l Tensor) -> Lesson<'l> {
        Lesson { input, target, gate: Some((gates, 0)), condition: None }
    }

    fn ones(device: &Device) -> Tensor {
        Tensor::from_f32(device, &[1, 1, 8], &[1.0; 8]).unwrap()
    }

    #[test]
    fn learning_approaches_the_target() {
        let device = Device::cpu();
        let (input, target) = (tensor(&device, &[1.0, -0.5, 0.25]), tensor(&device, &[0.5, 0.0, -1.0, 2.0]));
        let gates = ones(&device);
        let lesson = lesson(&input, &target, &gates);
        for kind in ["hyena_x", "mha"] {
            let mut s = student(&device, kind, 1e-2);
            let residual = |s: &Student| {
                let mut sums = ResidualSums::default();
                s.measure(&lesson, &mut sums).unwrap();
                sums.residual()
            };
            let before = residual(&s);
            for _ in 0..100 {
                s.learn(&lesson, 1e-2).unwrap();
            }
            let after = residual(&s);
            assert!(
                after.relative < 0.5 * before.relative && after.loss < 0.5 * before.loss,
                "{kind}: {before:?} {after:?}"
            );
        }
    }

    #[test]
    fn residual_by_hand() {
        let device = Device::cpu();
        let s = student(&device, "hyena_x", 1e-2);
        let input = tensor(&device, &[0.0]);
        let gates = ones(&device);
        let given = lesson(&input, &input, &gates);
        let output = s.compare(&Graph::inference(Precision::F32), &given).unwrap().1.tensor().to_vec().unwrap();
        // A target of twice the output: half of the target is missing.
        let twice: Vec<f32> = output.iter().map(|v| 2.0 * v).collect();
        let mut sums = ResidualSums::default();
        let target = tensor(&device, &twice);
        s.measure(&lesson(&input, &target, &gates), &mut sums).unwrap();
        let mean = output.iter().map(|v| f64::from(v.abs())).sum::<f64>() / 32.0;
        assert!((sums.residual().relative - 0.5).abs() < 1e-6 && (sums.residual().loss - mean).abs() < 1e-6);
    }

    #[test]
    fn a_loss_that_is_not_finite_names_site_and_step_and_changes_nothing() {
        let device = Device::cpu();
        let mut s = student(&device, "hyena_x", 1e-2);
        let good = tensor(&device, &[1.0]);
        let gates = ones(&device);
        s.learn(&lesson(&good, &good, &gates), 1e-2).unwrap();
        let before: Vec<f32> = s.params.iter().flat_map(|(_, p)| p.value.to_vec().unwrap()).collect();
        let bad = tensor(&device, &[f32::NAN]);
        let error = s.learn(&lesson(&bad, &good, &gates), 1e-2).unwrap_err().to_string();
        assert!(error.starts_with("blocks.0.attn: step 1: the loss is not finite"), "{error}");
        let after: Vec<f32> = s.params.iter().flat_map(|(_, p)| p.value.to_vec().unwrap()).collect();
        assert_eq!((before, s.optimiser.step), (after, 1));
    }

    #[test]
    fn the_gate_scales_prediction_and_target() {
        let device = Device::cpu();
        let (input, target) = (tensor(&device, &[1.0, -0.5, 0.25]), tensor(&device, &[0.5, 0.0, -1.0, 2.0]));
        let gate = [0.5f32, -2.0, 0.0, 1.0, 3.0, -0.25, 0.0, 1.5];
        let table: Vec<f32> = [[9.0; 8], gate, [7.0; 8]].concat();
        let gates = Tensor::from_f32(&device, &[1, 3, 8], &table).unwrap();
        let given = Lesson { input: &input, target: &target, gate: Some((&gates, 1)), condition: None };
        let mut s = student(&device, "hyena_x", 1e-2);
        s.gate_scaled = true;
        let (loss, output) = s.compare(&Graph::inference(Precision::F32), &given).unwrap();
        let (output, target) = (output.tensor().to_vec().unwrap(), target.to_vec().unwrap());
        let scaled = |i: usize| f64::from(gate[i % 8]) * f64::from(output[i] - target[i]);
        let by_hand = (0..32).map(|i| scaled(i).abs()).sum::<f64>() / 32.0;
        let loss = f64::from(loss.tensor().f32s().unwrap()[0]);
        assert!((loss - by_hand).abs() < 1e-6 * by_hand, "{loss} {by_hand}");
        // Channels behind a closed gate are not learnt: the bias of the last layer gets no gradient there.
        let g = Graph::training(Precision::F32);
        let (loss, _) = s.compare(&g, &given).unwrap();
        let grads = g.backward(&loss).unwrap();
        let bias = s.params.find("blocks.0.attn.out_proj.bias").unwrap();
        let grad = grads.param(&s.params, bias).unwrap().to_vec().unwrap();
        for (i, value) in grad.iter().enumerate() {
            let sum: f64 = (0..4).map(|n| f64::from(gate[i]) * scaled(8 * n + i).signum()).sum::<f64>() / 32.0;
            assert!((f64::from(*value) - sum).abs() < 1e-6, "channel {i}: {value} {sum}");
        }
    }

    /// A teacher's site: attention or a perceptron of ratio 4, with values of its own.
    fn teacher(device: &Device, site: Site) -> ParamStore {
        let mut params = ParamStore::default();
        let mut builder = Builder::new(&mut params, device, 77, Scheme::Torch);
        let kind = if site == Site::Attn { "mha" } else { "mlp" };
        operators::build(&Spec::new(kind), site, DIMS, &mut builder.below(&format!("blocks.0.{site}"))).unwrap();
        params
    }

    #[test]
    fn a_teacher_start_takes_what_has_the_same_shape_and_nothing_else() {
        let device = Device::cpu();
        let start = |site, spec: Spec, start| {
            let assignment = Assignment { start, ..Assignment::new(0, site, spec) };
            begin(assignment, DIMS, &teacher(&device, site), &device, &DistillConfig::default())
        };
        let values = |s: &ParamStore, name: &str| s.get(s.find(name).unwrap()).value.to_vec().unwrap();
        let (attn, mlp) = (teacher(&device, Site::Attn), teacher(&device, Site::Mlp));
        let warm = start(Site::Attn, Spec::new("hyena_x"), Start::Teacher).unwrap().params;
        let cold = start(Site::Attn, Spec::new("hyena_x"), Start::Random).unwrap().params;
        for (own, theirs) in [("in_proj.weight", "qkv.weight"), ("out_proj.bias", "proj.bias")] {
            let (own, theirs) = (format!("blocks.0.attn.{own}"), format!("blocks.0.attn.{theirs}"));
            assert_eq!(values(&warm, &own), values(&attn, &theirs), "{own}");
            assert_ne!(values(&cold, &own), values(&attn, &theirs), "{own}");
        }
        let filter = "blocks.0.attn.short_filter.weight";
        assert_eq!(values(&warm, filter), values(&cold, filter));
        // Of a narrower perceptron only the output's bias has the teacher's shape.
        let narrow = start(Site::Mlp, Spec::new("mlp").with("ratio", 3.0), Start::Teacher).unwrap().params;
        let fresh = start(Site::Mlp, Spec::new("mlp").with("ratio", 3.0), Start::Random).unwrap().params;
        assert_eq!(values(&narrow, "blocks.0.mlp.fc2.bias"), values(&mlp, "blocks.0.mlp.fc2.bias"));
        assert_eq!(values(&narrow, "blocks.0.mlp.fc1.weight"), values(&fresh, "blocks.0.mlp.fc1.weight"));
        // A teacher without such parameters.
        let assignment = Assignment { start: Start::Teacher, ..Assignment::new(3, Site::Attn, Spec::new("hyena_x")) };
        let refused = begin(assignment, DIMS, &attn, &device, &DistillConfig::default()).map(|_| ());
        let message = refused.unwrap_err().to_string();
        assert!(message.starts_with("blocks.3.attn: the teacher has none of the parameters"), "{message}");
    }

    #[test]
    fn a_graft_may_have_a_loss_of_its_own() {
        let device = Device::cpu();
        let kind = |loss| {
            let assignment = Assignment { loss, ..Assignment::new(0, Site::Attn, Spec::new("mha")) };
            let config = DistillConfig::default();
            begin(assignment, DIMS, &ParamStore::default(), &device, &config).unwrap().loss.kind
        };
        assert_eq!([None, Some(Loss::L1), Some(Loss::L2), Some(Loss::Huber)].map(kind), [0, 0, 1, 2]);
    }
}
