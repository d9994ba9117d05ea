//! The cases of the contracts: inputs are drawn, both passes are called, outputs are named.
//!
//! The generated function of an operator walks its cases and tells a [`Conform`] what to call; what is done with the
//! calls (compared, timed, only planned) is decided there.

use crate::backend::Device;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use graft_kernels::check::{Fill, draw_f32, draw_i32};
use graft_kernels::{OpInfo, Tier};
use half::bf16;

/// What is known of a case before it runs.
#[derive(Clone, Copy, Debug)]
pub struct CaseRow {
    /// Its operator.
    pub info: &'static OpInfo,
    /// Its name.
    pub name: &'static str,
    /// Its size class.
    pub tier: Tier,
    /// Its dims: `B=2 N=256`.
    pub shape: &'static str,
    /// Whether a weight is stored in bf16 on the CPU.
    pub bf16: bool,
    /// Floating-point operations of one forward call.
    pub flops: usize,
    /// Bytes that one forward call must move at the least.
    pub bytes: usize,
    /// Exponentials of one forward call, where they are counted.
    pub exps: usize,
}

/// What a case computes with: enough for another program to repeat it.
#[derive(Debug, Default)]
pub struct Sample {
    /// Scalar parameters by name; truth values are 0 and 1.
    pub params: Vec<(&'static str, f64)>,
    /// Inputs in the order of the contract, those of in-place operators as they were before the call; the gradient of
    /// the first output comes last, where there is a backward pass.
    pub inputs: Vec<Given>,
    /// Outputs of both passes; the gradient of input `x` is called `dx`.
    pub results: Vec<Named>,
}

/// An input of a case.
#[derive(Clone, Debug)]
pub struct Given {
    /// Name in the contract.
    pub name: String,
    /// How the CPU stores it.
    pub dtype: DType,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values in f32, which holds every index of a case exactly.
    pub values: Vec<f32>,
}

pub(super) type CaseBody<'b> = &'b mut dyn FnMut(&mut Io<'_, '_>) -> Result<()>;

/// Told of every call of a case: its pass (`forward` or `backward`), and the call itself, to be made at will.
pub type Timer<'t> = dyn FnMut(&CaseRow, &'static str, &mut dyn FnMut() -> Result<()>) -> Result<()> + 't;

/// What is done with the cases of an operator.
pub(super) enum Conform<'a> {
    /// Each is shown to the runner of [`super::check`].
    Judge(&'a mut dyn FnMut(&CaseRow, CaseBody<'_>) -> Result<()>),
    /// Those that `choose` takes are shown to a timer.
    Time { device: &'a Device, choose: &'a dyn Fn(&CaseRow) -> bool, timer: &'a mut Timer<'a> },
}

impl Conform<'_> {
    /// One case.
    pub(super) fn case(&mut self, row: &CaseRow, body: CaseBody<'_>) -> Result<()> {
        match self {
            Conform::Judge(judge) => judge(row, body),
            Conform::Time { device, choose, timer } if choose(row) => {
                let mut observe = |pass: &'static str, call: &mut dyn FnMut() -> Result<()>| timer(row, pass, call);
                let values = if device.is_gpu() { Values::Working } else { Values::Drawn };
                let mut io = Io::new(device, device.element(), values);
                io.observe = Some(&mut observe);
                body(&mut io)
            }
            Conform::Time { .. } => Ok(()),
        }
    }
}

/// Shows every call of the cases of a size class that `choose` takes to `timer`, on `device`, in contract order.
///
/// # Errors
/// Those of the calls and of the timer.
pub fn time_cases(device: &Device, tier: Tier, choose: &dyn Fn(&CaseRow) -> bool, timer: &mut Timer<'_>) -> Result<()> {
    let choose = &|row: &CaseRow| row.tier == tier && choose(row);
    for (_, run) in super::generated::CONFORMANCE {
        run(&mut Conform::Time { device, choose, timer: &mut *timer })?;
    }
    Ok(())
}

/// Runs the case `case` of operator `op` once on `device` and gives what went in and what came out.
///
/// # Errors
/// No such case, and those of the calls.
pub fn sample_case(device: &Device, op: &str, case: &str) -> Result<Sample> {
    let mut found = None;
    for (_, run) in super::generated::CONFORMANCE.iter().filter(|(name, _)| *name == op) {
        run(&mut Conform::Judge(&mut |row, body| {
            if row.name == case {
                let mut io = Io::new(device, device.element(), Values::Drawn);
                io.sample = Some(Sample::default());
                body(&mut io)?;
                let results = std::mem::take(&mut io.results);
                found = io.sample.take().map(|sample| Sample { results, ..sample });
            }
            Ok(())
        }))?;
    }
    found.ok_or_else(|| Error::usage(format!("{op}/{case}"), "no such case").fix("graft op list names the operators"))
}

/// What inputs hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Values {
    /// The numbers of the case; weights stored in bf16 where the case says so, as the CPU takes them.
    Drawn,
    /// The numbers of the case, every tensor of the working type in that type.
    Working,
    /// Nothing: only shapes matter.
    Unset,
}

/// An output of a case.
#[derive(Clone, Debug)]
pub struct Named {
    /// Name in the contract, or that of an input with `d` before it.
    pub name: String,
    /// Its type on the device.
    pub dtype: DType,
    /// Its values.
    pub values: Vec<f32>,
}

type Observe<'o> = dyn FnMut(&'static str, &mut dyn FnMut() -> Result<()>) -> Result<()> + 'o;

/// Inputs, calls and outputs of one run of a case.
pub(super) struct Io<'a, 'o> {
    device: &'a Device,
    element: DType,
    values: Values,
    results: Vec<Named>,
    observe: Option<&'a mut Observe<'o>>,
    sample: Option<Sample>,
}

/// Runs a case once and gives its outputs.
pub(super) fn collect(device: &Device, element: DType, values: Values, body: CaseBody<'_>) -> Result<Vec<Named>> {
    let mut io = Io::new(device, element, values);
    body(&mut io)?;
    Ok(io.results)
}

impl<'a> Io<'a, '_> {
    fn new(device: &'a Device, element: DType, values: Values) -> Self {
        Io { device, element, values, results: Vec::new(), observe: None, sample: None }
    }

    pub(super) fn device(&self) -> &Device {
        self.device
    }

    /// The scalar parameters of the case.
    pub(super) fn params(&mut self, params: &[(&'static str, f64)]) {
        if let Some(sample) = &mut self.sample {
            sample.params = params.to_vec();
        }
    }

    /// Keeps an input for those who ask for it.
    fn given(&mut self, name: &str, t: Tensor) -> Result<Tensor> {
        if let Some(sample) = &mut self.sample {
            let values = match t.dtype() {
                DType::I32 => t.i32s()?.iter().map(|&i| i as f32).collect(),
                _ => t.to_vec()?,
            };
            let shape = t.shape().dims().to_vec();
            sample.inputs.push(Given { name: name.to_string(), dtype: t.dtype(), shape, values });
        }
        Ok(t)
    }

    /// A tensor of the working type: on the host f32 with the numbers that the type can hold.
    pub(super) fn draw(&mut self, case: &str, name: &str, shape: &[usize], fill: Fill) -> Result<Tensor> {
        if self.values == Values::Unset {
            return self.device.empty_of(shape, self.element);
        }
        let mut values = draw_f32(case, name, shape.iter().product(), fill);
        if self.element == DType::BF16 && !self.device.is_gpu() {
            values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
            return Tensor::from_f32(self.device, shape, &values);
        }
        let t = Tensor::from_f32_as(self.device, shape, &values, self.element)?;
        self.given(name, t)
    }

    /// A tensor that is f32 whatever the working type.
    pub(super) fn draw_f32(&mut self, case: &str, name: &str, shape: &[usize], fill: Fill) -> Result<Tensor> {
        if self.values == Values::Unset {
            return self.device.empty(shape);
        }
        let t = Tensor::from_f32(self.device, shape, &draw_f32(case, name, shape.iter().product(), fill))?;
        self.given(name, t)
    }

    pub(super) fn draw_i32(&mut self, case: &str, name: &str, shape: &[usize], fill: Fill) -> Result<Tensor> {
        if self.values == Values::Unset {
            return self.device.empty_i32(shape);
        }
        let t = Tensor::from_i32(self.device, shape, &draw_i32(case, name, shape.iter().product(), fill))?;
        self.given(name, t)
    }

    /// A weight as the case stores it.
    pub(super) fn stored(&mut self, t: Tensor, bf16: bool) -> Result<Tensor> {
        if !(bf16 && self.values == Values::Drawn) {
            return Ok(t);
        }
        let t = t.to_bf16()?;
        if let Some(held) = self.sample.as_mut().and_then(|sample| sample.inputs.last_mut()) {
            (held.dtype, held.values) = (t.dtype(), t.to_vec()?);
        }
        Ok(t)
    }

    /// Makes a call, after the observer has made it as often as it likes.
    pub(super) fn call<R>(&mut self, pass: &'static str, mut call: impl FnMut() -> Result<R>) -> Result<R> {
        if let Some(observe) = &mut self.observe {
            observe(pass, &mut || call().map(drop))?;
        }
        call()
    }

    pub(super) fn result(&mut self, name: &str, t: &Tensor) -> Result<()> {
        let values = if self.values == Values::Unset { Vec::new() } else { t.to_vec()? };
        self.results.push(Named { name: name.to_string(), dtype: t.dtype(), values });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timer_sees_both_passes_of_the_chosen_cases() {
        let mut seen = Vec::new();
        let choose = |row: &CaseRow| row.info.name == "gate_residual";
        time_cases(&Device::cpu(), Tier::Real, &choose, &mut |row, pass, call| {
            seen.push((row.info.name, pass));
            call()
        })
        .unwrap();
        assert_eq!(seen, [("gate_residual", "forward"), ("gate_residual", "backward")]);
    }

    #[test]
    fn a_sample_holds_what_went_in_and_what_came_out() {
        let sample = sample_case(&Device::cpu(), "embed", "fashion").unwrap();
        let inputs: Vec<_> = sample.inputs.iter().map(|t| (t.name.as_str(), t.dtype)).collect();
        let (f32, i32) = (DType::F32, DType::I32);
        assert_eq!(inputs, [("table", f32), ("index", i32), ("addend", f32), ("dy", f32)]);
        assert_eq!(sample.params, [("act", 2.0)]);
        assert!(sample.inputs[1].values.iter().all(|&i| (0.0..11.0).contains(&i) && i.fract() == 0.0));
        let results: Vec<_> = sample.results.iter().map(|t| t.name.as_str()).collect();
        assert_eq!(results, ["y", "pre", "dtable", "daddend"]);
        assert!(sample_case(&Device::cpu(), "embed", "nothing").is_err());
    }

    #[test]
    fn in_place_operators_and_stored_weights_are_kept_as_the_call_found_them() {
        let sample = sample_case(&Device::cpu(), "adamw", "fashion").unwrap();
        let param = sample.inputs.iter().find(|t| t.name == "param").unwrap();
        assert_eq!(param.values, draw_f32("fashion", "param", param.values.len(), Fill::Normal));
        assert_ne!(param.values, sample.results[0].values);
        let sample = sample_case(&Device::cpu(), "gemm", "dit_xl_conditioning").unwrap();
        assert_eq!(sample.inputs[1].dtype, DType::BF16);
    }
}
