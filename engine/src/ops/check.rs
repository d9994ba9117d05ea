//! Checks of the entry points, and the conformance runner: operator × case × backend.

use crate::backend::{Device, DeviceKind};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use graft_kernels::check::{Comparison, Fill, Tolerance, compare, draw_f32, draw_i32};
use graft_kernels::{OpInfo, Tier};

/// Unifies the dim letters of a contract over the shapes of the arguments.
pub(super) struct DimCheck {
    op: &'static str,
    names: &'static [&'static str],
    values: [Option<usize>; MAX_DIMS],
    bound_by: [&'static str; MAX_DIMS],
}

const MAX_DIMS: usize = 12;

impl DimCheck {
    pub(super) fn new(op: &'static str, names: &'static [&'static str]) -> Self {
        debug_assert!(names.len() <= MAX_DIMS);
        DimCheck { op, names, values: [None; MAX_DIMS], bound_by: [""; MAX_DIMS] }
    }

    fn index(&self, dim: &str) -> Option<usize> {
        self.names.iter().position(|n| *n == dim)
    }

    /// A dim that the caller states.
    pub(super) fn given(&mut self, dim: &'static str, value: usize) -> Result<()> {
        if let Some(i) = self.index(dim) {
            (self.values[i], self.bound_by[i]) = (Some(value), "the caller");
        }
        Ok(())
    }

    /// Binds the bare letters of one argument's shape.
    pub(super) fn bind(&mut self, name: &'static str, t: &Tensor, shape: &[&str]) -> Result<()> {
        let dims = t.shape();
        if dims.dims().len() != shape.len() {
            return Err(Error::failure(format!("{}: {name}", self.op), "wrong rank")
                .is(dims)
                .must(format!("[{}]", shape.join(", "))));
        }
        for (expr, &size) in shape.iter().zip(dims.dims()) {
            if let Some(i) = self.index(expr)
                && self.values[i].is_none()
            {
                (self.values[i], self.bound_by[i]) = (Some(size), name);
            }
        }
        Ok(())
    }

    /// Compares every axis with its expression.
    pub(super) fn match_exprs(&mut self, name: &'static str, t: &Tensor, shape: &[&str]) -> Result<()> {
        for (axis, (expr, &size)) in shape.iter().zip(t.shape().dims()).enumerate() {
            let Some(want) = self.eval(expr) else { continue };
            if want != size {
                let origin = self.index(expr).map_or(String::new(), |i| format!(" as in {}", self.bound_by[i]));
                return Err(Error::failure(format!("{}: {name}", self.op), format!("axis {axis} does not fit"))
                    .is(t.shape())
                    .must(format!("[{}] with {expr} = {want}{origin}", shape.join(", "))));
            }
            if size == 0 {
                return Err(Error::failure(format!("{}: {name}", self.op), "empty tensor")
                    .is(t.shape())
                    .must("every dim at least 1"));
            }
        }
        Ok(())
    }

    /// Products, whole quotients and sums of dims and literals, as contracts write them; `None` where a dim is unbound.
    fn eval(&self, expr: &str) -> Option<usize> {
        let atom = |text: &str| match self.index(text.trim()) {
            Some(i) => self.values[i],
            None => text.trim().parse().ok(),
        };
        expr.split('+').try_fold(0usize, |sum, term| {
            let product = term.split('*').try_fold(1usize, |p, factor| {
                let mut quotient = factor.split('/').map(atom);
                let first = quotient.next()??;
                p.checked_mul(quotient.try_fold(first, |q, by| q.checked_div(by?))?)
            })?;
            sum.checked_add(product)
        })
    }

    /// Value of a dim; 0 where only absent optional arguments carry it.
    pub(super) fn dim(&self, dim: &str) -> Result<usize> {
        Ok(self.index(dim).and_then(|i| self.values[i]).unwrap_or(0))
    }

    /// Every argument on one device.
    pub(super) fn same_device(&self, device: &Device, others: &[(&str, Option<&Tensor>)]) -> Result<()> {
        for (name, t) in others {
            if let Some(t) = t
                && t.device() != device
            {
                return Err(Error::failure(format!("{}: {name}", self.op), "on another device")
                    .is(t.device().kind())
                    .must(device.kind())
                    .fix("copy it to the device of the first argument"));
            }
        }
        Ok(())
    }
}

pub(super) fn want_dtype(op: &str, name: &str, t: &Tensor, allowed: &[DType]) -> Result<()> {
    if allowed.contains(&t.dtype()) {
        return Ok(());
    }
    let names: Vec<String> = allowed.iter().map(DType::to_string).collect();
    Err(Error::failure(format!("{op}: {name}"), "wrong dtype").is(t.dtype()).must(names.join(" or ")))
}

pub(super) fn require(op: &str, holds: bool, that: &str, must: &str, found: impl Fn() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::failure(op, format!("{that} does not hold")).is(found()).must(must)) }
}

/// Every element of an index tensor lies in `0..end`.
pub(super) fn check_index(op: &str, name: &str, t: &Tensor, end: usize) -> Result<()> {
    match t.i32s()?.iter().position(|&i| i < 0 || i as usize >= end) {
        None => Ok(()),
        Some(at) => Err(Error::failure(format!("{op}: {name}"), format!("element {at} is out of range"))
            .is(t.i32s()?[at])
            .must(format!("0 to {}", end.saturating_sub(1)))),
    }
}

pub(super) fn no_path(op: &str, kind: DeviceKind) -> Error {
    Error::failure(op, format!("no {kind} path for this operator")).fix("use --backend cpu")
}

/// Verdict of one row of the conformance table.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// Every output within its bounds and bit-equal on a second run; the worst comparison.
    Ok(Comparison),
    /// The output that failed, and how.
    Fail(String),
    /// Not run, and why.
    Skip(String),
}

/// One row of the conformance table.
#[derive(Clone, Debug)]
pub struct Row {
    /// Operator.
    pub op: &'static str,
    /// Case.
    pub case: &'static str,
    /// Backend under test.
    pub backend: DeviceKind,
    /// Verdict.
    pub verdict: Verdict,
}

type CaseBody<'b> = &'b mut dyn FnMut(&mut Io<'_, '_>) -> Result<()>;

/// What is known of a case before it runs.
#[derive(Clone, Copy, Debug)]
pub struct CaseRow {
    /// Its operator.
    pub info: &'static OpInfo,
    /// Its name.
    pub name: &'static str,
    /// Its size class.
    pub tier: Tier,
    /// Whether a weight is stored in bf16.
    pub bf16: bool,
    /// Floating-point operations of one forward call.
    pub flops: usize,
    /// Bytes that one forward call must move at the least.
    pub bytes: usize,
}

/// Told of every call of a case: its pass (`forward` or `backward`), and the call itself, to be made at will.
pub type Timer<'t> = dyn FnMut(&CaseRow, &'static str, &mut dyn FnMut() -> Result<()>) -> Result<()> + 't;

/// What is done with the cases of an operator.
pub(super) enum Conform<'a> {
    /// The tiny ones are compared with the oracle.
    Compare { subject: &'a Device, oracle: &'a Device, rows: &'a mut Vec<Row> },
    /// The real ones that `choose` takes are shown to a timer.
    Time { device: &'a Device, choose: &'a dyn Fn(&CaseRow) -> bool, timer: &'a mut Timer<'a> },
}

impl Conform<'_> {
    /// One case: oracle, subject, subject again; or its calls under the timer.
    pub(super) fn case(&mut self, row: &CaseRow, body: CaseBody<'_>) -> Result<()> {
        match self {
            Conform::Compare { subject, oracle, rows } if row.tier == Tier::Tiny => {
                let want = collect(oracle, body)?;
                let first = collect(subject, body)?;
                let second = collect(subject, body)?;
                let tolerance = row.info.tolerance.unwrap_or(if row.bf16 { Tolerance::BF16 } else { Tolerance::F32 });
                let verdict = judge(&want, &first, &second, tolerance);
                rows.push(Row { op: row.info.name, case: row.name, backend: subject.kind(), verdict });
                Ok(())
            }
            Conform::Time { device, choose, timer } if row.tier == Tier::Real && choose(row) => {
                let mut observe = |pass: &'static str, call: &mut dyn FnMut() -> Result<()>| timer(row, pass, call);
                body(&mut Io { device, results: Vec::new(), observe: Some(&mut observe) })
            }
            _ => Ok(()),
        }
    }
}

fn judge(want: &[Named], first: &[Named], second: &[Named], tolerance: Tolerance) -> Verdict {
    let mut worst: Option<Comparison> = None;
    for ((w, f), s) in want.iter().zip(first).zip(second) {
        let result = compare(&f.values, &w.values, tolerance);
        if !result.pass {
            return Verdict::Fail(format!(
                "{}: worst {:.2} of its bound at element {}, rel rms {:.2e} (bound {:.0e})",
                w.name, result.worst, result.worst_index, result.rel_rms, tolerance.rms
            ));
        }
        if f.values.iter().zip(&s.values).any(|(a, b)| a.to_bits() != b.to_bits()) {
            return Verdict::Fail(format!("{}: a second run gave other bits", w.name));
        }
        if worst.is_none_or(|held| result.worst > held.worst) {
            worst = Some(result);
        }
    }
    match worst {
        Some(result) if want.len() == first.len() => Verdict::Ok(result),
        _ => Verdict::Fail("outputs differ in number".into()),
    }
}

struct Named {
    name: String,
    values: Vec<f32>,
}

fn collect(device: &Device, body: CaseBody<'_>) -> Result<Vec<Named>> {
    let mut io = Io { device, results: Vec::new(), observe: None };
    body(&mut io)?;
    Ok(io.results)
}

type Observe<'o> = dyn FnMut(&'static str, &mut dyn FnMut() -> Result<()>) -> Result<()> + 'o;

/// Inputs, calls and outputs of one run of a case.
pub(super) struct Io<'a, 'o> {
    device: &'a Device,
    results: Vec<Named>,
    observe: Option<&'a mut Observe<'o>>,
}

impl Io<'_, '_> {
    pub(super) fn device(&self) -> &Device {
        self.device
    }

    pub(super) fn draw(&self, case: &str, name: &str, shape: &[usize], fill: Fill) -> Result<Tensor> {
        let len = shape.iter().product();
        Tensor::from_f32(self.device, shape, &draw_f32(case, name, len, fill))
    }

    pub(super) fn draw_i32(&self, case: &str, name: &str, shape: &[usize], fill: Fill) -> Result<Tensor> {
        let len = shape.iter().product();
        Tensor::from_i32(self.device, shape, &draw_i32(case, name, len, fill))
    }

    pub(super) fn stored(&self, t: Tensor, bf16: bool) -> Result<Tensor> {
        if bf16 { t.to_bf16() } else { Ok(t) }
    }

    /// Makes a call, after the observer has made it as often as it likes.
    pub(super) fn call<R>(&mut self, pass: &'static str, mut call: impl FnMut() -> Result<R>) -> Result<R> {
        if let Some(observe) = &mut self.observe {
            observe(pass, &mut || call().map(drop))?;
        }
        call()
    }

    pub(super) fn result(&mut self, name: &str, t: &Tensor) -> Result<()> {
        self.results.push(Named { name: name.to_string(), values: t.to_vec()? });
        Ok(())
    }
}

/// Runs every tiny case of the operators whose name contains `filter` on `subject`, in contract order.
///
/// Fresh buffers are poisoned with NaN, so an output that is not written completely fails.
///
/// # Errors
/// When an entry point refuses a case: the contract and its cases disagree.
pub fn conformance(subject: &Device, filter: &str) -> Result<Vec<Row>> {
    let oracle = Device::oracle();
    oracle.set_poison(true);
    subject.set_poison(true);
    let mut rows = Vec::new();
    for (op, run) in super::generated::CONFORMANCE {
        if op.contains(filter) {
            run(&mut Conform::Compare { subject, oracle: &oracle, rows: &mut rows })?;
        }
    }
    subject.set_poison(false);
    Ok(rows)
}

/// Shows every call of the real cases that `choose` takes to `timer`, on `device`, in contract order.
///
/// # Errors
/// Those of the calls and of the timer.
pub fn time_cases(device: &Device, choose: &dyn Fn(&CaseRow) -> bool, timer: &mut Timer<'_>) -> Result<()> {
    for (_, run) in super::generated::CONFORMANCE {
        run(&mut Conform::Time { device, choose, timer: &mut *timer })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{contracts::ln_modulate::Params, ln_modulate};

    fn params() -> Params {
        Params { shift: 0, scale: 1, eps: 1e-6 }
    }

    #[test]
    fn errors_name_the_argument() {
        let device = Device::cpu();
        let x = Tensor::zeros(&device, &[2, 3, 4]).unwrap();
        let m = Tensor::zeros(&device, &[4, 6, 4]).unwrap();
        let message = ln_modulate(&x, &m, params()).err().unwrap().to_string();
        assert_eq!(
            message,
            "ln_modulate: modulation: axis 0 does not fit; is [4, 6, 4]; must be [B, C, D] with B = 2 as in x"
        );
        let m = Tensor::zeros(&device, &[2, 6]).unwrap();
        assert!(ln_modulate(&x, &m, params()).err().unwrap().to_string().contains("modulation: wrong rank"));
        let m = Tensor::from_i32(&device, &[2, 6, 4], &[0; 48]).unwrap();
        assert!(ln_modulate(&x, &m, params()).err().unwrap().to_string().contains("wrong dtype; is i32; must be f32"));
        let other = Tensor::zeros(&Device::cpu(), &[2, 6, 4]).unwrap();
        assert!(ln_modulate(&x, &other, params()).err().unwrap().to_string().contains("another device"));
        let empty = Tensor::zeros(&device, &[0, 3, 4]).unwrap();
        let m = Tensor::zeros(&device, &[0, 6, 4]).unwrap();
        assert!(ln_modulate(&empty, &m, params()).err().unwrap().to_string().contains("empty tensor"));
        let m = Tensor::zeros(&device, &[2, 1, 4]).unwrap();
        assert!(ln_modulate(&x, &m, params()).err().unwrap().to_string().contains("two different rows"));
    }

    #[test]
    fn the_timer_sees_both_passes_of_the_chosen_cases() {
        let mut seen = Vec::new();
        let choose = |row: &CaseRow| row.info.name == "gate_residual";
        time_cases(&Device::cpu(), &choose, &mut |row, pass, call| {
            seen.push((row.info.name, pass));
            call()
        })
        .unwrap();
        assert_eq!(seen, [("gate_residual", "forward"), ("gate_residual", "backward")]);
    }

    #[test]
    fn a_wrong_output_is_a_failed_row() {
        let want = [Named { name: "y".into(), values: vec![1.0, 2.0] }];
        let wrong = [Named { name: "y".into(), values: vec![1.0, 2.1] }];
        let nan = [Named { name: "y".into(), values: vec![1.0, f32::NAN] }];
        assert!(matches!(judge(&want, &wrong, &wrong, Tolerance::F32), Verdict::Fail(_)));
        assert!(matches!(judge(&want, &nan, &nan, Tolerance::F32), Verdict::Fail(_)));
        assert!(matches!(judge(&want, &want, &wrong, Tolerance::F32), Verdict::Fail(_)));
        assert!(matches!(judge(&want, &want, &want, Tolerance::F32), Verdict::Ok(_)));
    }
}
