//! One site in stage 1: an operator (or a pair of blocks) that learns to imitate what it replaces.
//!
//! A student has its own parameters and its own optimiser, and sees nothing of the others: what it becomes does not
//! depend on which other sites are grafted.

use super::pair::PairNet;
use super::plan::Assignment;
use super::settings::{DistillConfig, Start};
use crate::autograd::{Graph, ParamStore, Precision, Var};
use crate::error::{Error, Result};
use crate::nn::operators::{self, BlockDims, Operator};
use crate::nn::{Builder, Scheme};
use crate::ops::contracts::loss_regression;
use crate::tensor::{Device, Tensor};
use crate::train::optimizer::AdamW;
use serde::Serialize;

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
    precision: Precision,
}

/// How far an operator is from the one it replaces, over the held-out batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
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
    /// A new operator, its parameters named as in the whole model: with its own default initialisation, and where
    /// the assignment says so with the values of the `teacher` in every parameter of the same name, shape and meaning.
    pub fn new(
        assignment: Assignment,
        dims: BlockDims,
        teacher: &ParamStore,
        device: &Device,
        config: &DistillConfig,
    ) -> Result<Student> {
        let mut params = ParamStore::default();
        let mut builder = Builder::new(&mut params, device, config.seed, Scheme::Torch);
        let operator =
            operators::build(&assignment.spec, assignment.site, dims, &mut builder.below(&assignment.to_string()))?;
        if assignment.start == Start::Teacher {
            copy_teacher(&mut params, operator.as_ref(), &assignment, teacher)?;
        }
        Student::assemble(assignment, params, Net::Operator(operator), config)
    }

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
        Ok(Student { assignment, params, optimiser, net, loss, precision: config.dtype.into() })
    }

    /// The pair of blocks, where that is what trains: it must be shown the condition of every batch.
    pub fn pair(&mut self) -> Option<&mut PairNet> {
        match &mut self.net {
            Net::Pair(pair) => Some(pair),
            Net::Operator(_) => None,
        }
    }

    /// One update towards `target` for `input`, both `[B, N, D]`; returns the loss before it.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, naming the site: nothing is changed then.
    pub fn learn(&mut self, input: &Tensor, target: &Tensor, lr: f64) -> Result<f64> {
        let (value, grads) = {
            let g = Graph::training(self.precision);
            let (loss, _) = self.compare(&g, input, target)?;
            let value = f64::from(loss.tensor().f32s()?[0]);
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
    pub fn measure(&self, input: &Tensor, target: &Tensor, sums: &mut ResidualSums) -> Result<()> {
        let (loss, output) = self.compare(&Graph::inference(self.precision), input, target)?;
        sums.loss += f64::from(loss.tensor().f32s()?[0]);
        sums.batches += 1;
        for (y, t) in output.tensor().f32s()?.iter().zip(target.f32s()?) {
            sums.error += f64::from(y - t).powi(2);
            sums.target += f64::from(*t).powi(2);
        }
        Ok(())
    }

    /// Loss and output.
    fn compare<'m>(&'m self, g: &Graph<'m>, input: &Tensor, target: &Tensor) -> Result<(Var, Var)> {
        let input = Var::constant(input.clone());
        let output = match &self.net {
            Net::Operator(operator) => operator.forward(g, &self.params, &input, None)?,
            Net::Pair(pair) => pair.forward(g, &self.params, &input)?,
        };
        let loss = g.loss_regression(&output, &Var::constant(target.clone()), self.loss)?;
        Ok((loss, output))
    }
}

/// Takes over what the teacher has of an operator's parameters.
///
/// # Errors
/// Where it has none of them: a plan that asks for this start must not get another.
fn copy_teacher(
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

    fn student(device: &Device, kind: &str, lr: f64) -> Student {
        let optimizer = AdamWSettings { lr, ema: 0.0, ..AdamWSettings::default() };
        let config = DistillConfig { optimizer, ..DistillConfig::default() };
        let assignment = Assignment::new(0, Site::Attn, Spec::new(kind));
        Student::new(assignment, DIMS, &ParamStore::default(), device, &config).unwrap()
    }

    const DIMS: BlockDims = BlockDims { width: 8, heads: 2, grid: [2, 2] };

    fn tensor(device: &Device, values: &[f32]) -> Tensor {
        Tensor::from_f32(device, &[1, 4, 8], &values.iter().cycle().take(32).copied().collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn learning_approaches_the_target() {
        let device = Device::cpu();
        let (input, target) = (tensor(&device, &[1.0, -0.5, 0.25]), tensor(&device, &[0.5, 0.0, -1.0, 2.0]));
        for kind in ["hyena_x", "mha"] {
            let mut s = student(&device, kind, 1e-2);
            let residual = |s: &Student| {
                let mut sums = ResidualSums::default();
                s.measure(&input, &target, &mut sums).unwrap();
                sums.residual()
            };
            let before = residual(&s);
            for _ in 0..100 {
                s.learn(&input, &target, 1e-2).unwrap();
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
        let output = s.compare(&Graph::inference(Precision::F32), &input, &input).unwrap().1.tensor().to_vec().unwrap();
        // A target of twice the output: half of the target is missing.
        let twice: Vec<f32> = output.iter().map(|v| 2.0 * v).collect();
        let mut sums = ResidualSums::default();
        s.measure(&input, &tensor(&device, &twice), &mut sums).unwrap();
        let mean = output.iter().map(|v| f64::from(v.abs())).sum::<f64>() / 32.0;
        assert!((sums.residual().relative - 0.5).abs() < 1e-6 && (sums.residual().loss - mean).abs() < 1e-6);
    }

    #[test]
    fn a_loss_that_is_not_finite_names_site_and_step_and_changes_nothing() {
        let device = Device::cpu();
        let mut s = student(&device, "hyena_x", 1e-2);
        let good = tensor(&device, &[1.0]);
        s.learn(&good, &good, 1e-2).unwrap();
        let before: Vec<f32> = s.params.iter().flat_map(|(_, p)| p.value.to_vec().unwrap()).collect();
        let error = s.learn(&tensor(&device, &[f32::NAN]), &good, 1e-2).unwrap_err().to_string();
        assert!(error.starts_with("blocks.0.attn: step 1: the loss is not finite"), "{error}");
        let after: Vec<f32> = s.params.iter().flat_map(|(_, p)| p.value.to_vec().unwrap()).collect();
        assert_eq!((before, s.optimiser.step), (after, 1));
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
            Student::new(assignment, DIMS, &teacher(&device, site), &device, &DistillConfig::default())
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
        let refused = Student::new(assignment, DIMS, &attn, &device, &DistillConfig::default()).map(|_| ());
        let message = refused.unwrap_err().to_string();
        assert!(message.starts_with("blocks.3.attn: the teacher has none of the parameters"), "{message}");
    }

    #[test]
    fn a_graft_may_have_a_loss_of_its_own() {
        let device = Device::cpu();
        let kind = |loss| {
            let assignment = Assignment { loss, ..Assignment::new(0, Site::Attn, Spec::new("mha")) };
            let config = DistillConfig::default();
            Student::new(assignment, DIMS, &ParamStore::default(), &device, &config).unwrap().loss.kind
        };
        assert_eq!([None, Some(Loss::L1), Some(Loss::L2), Some(Loss::Huber)].map(kind), [0, 0, 1, 2]);
    }
}
