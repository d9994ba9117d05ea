//! The cases of the contracts: inputs are drawn, both passes are called, outputs are named.
//!
//! The generated function of an operator walks its cases and tells a [`Conform`] what to call; what is done with the
//! calls (compared, timed, only planned) is decided there.

use crate::backend::Device;
use crate::error::Result;
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
pub(super) struct Named {
    pub name: String,
    pub dtype: DType,
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
}

/// Runs a case once and gives its outputs.
pub(super) fn collect(device: &Device, element: DType, values: Values, body: CaseBody<'_>) -> Result<Vec<Named>> {
    let mut io = Io::new(device, element, values);
    body(&mut io)?;
    Ok(io.results)
}

impl<'a> Io<'a, '_> {
    fn new(device: &'a Device, element: DType, values: Values) -> Self {
        Io { device, element, values, results: Vec::new(), observe: None }
    }

    pub(super) fn device(&self) -> &Device {
        self.device
    }

    /// A tensor of the working type: on the host f32 with the numbers that the type can hold.
    pub(super) fn draw(&self, case: &str, name: &str, shape: &[usize], fill: Fill) -> Result<Tensor> {
        if self.values == Values::Unset {
            return self.device.empty_of(shape, self.element);
        }
        let mut values = draw_f32(case, name, shape.iter().product(), fill);
        if self.element == DType::BF16 && !self.device.is_gpu() {
            values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
            return Tensor::from_f32(self.device, shape, &values);
        }
        Tensor::from_f32_as(self.device, shape, &values, self.element)
    }

    /// A tensor that is f32 whatever the working type.
    pub(super) fn draw_f32(&self, case: &str, name: &str, shape: &[usize], fill: Fill) -> Result<Tensor> {
        if self.values == Values::Unset {
            return self.device.empty(shape);
        }
        Tensor::from_f32(self.device, shape, &draw_f32(case, name, shape.iter().product(), fill))
    }

    pub(super) fn draw_i32(&self, case: &str, name: &str, shape: &[usize], fill: Fill) -> Result<Tensor> {
        if self.values == Values::Unset {
            return self.device.empty_i32(shape);
        }
        Tensor::from_i32(self.device, shape, &draw_i32(case, name, shape.iter().product(), fill))
    }

    /// A weight as the case stores it.
    pub(super) fn stored(&self, t: Tensor, bf16: bool) -> Result<Tensor> {
        if bf16 && self.values == Values::Drawn { t.to_bf16() } else { Ok(t) }
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
}
