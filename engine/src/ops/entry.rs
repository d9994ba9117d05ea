//! Checks of the entry points: nothing runs before every argument fits.

use crate::backend::{Device, DeviceKind, apart};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use graft_kernels::launch::ElementType;
use std::time::Instant;

/// Unifies the dim letters of a contract over the shapes of the arguments.
pub(super) struct DimCheck {
    op: &'static str,
    names: &'static [&'static str],
    values: [Option<usize>; MAX_DIMS],
    bound_by: [&'static str; MAX_DIMS],
    /// The working type of the call, and the argument that set it.
    element: Option<(DType, &'static str)>,
    /// When the call began, where somebody watches: it ends with this value.
    begun: Option<Instant>,
}

impl Drop for DimCheck {
    fn drop(&mut self) {
        if let Some(begun) = self.begun {
            let dims = self.names.iter().zip(self.values).map(|(name, value)| (*name, value.unwrap_or(0)));
            super::watch::end(begun, self.op, dims);
        }
    }
}

const MAX_DIMS: usize = 12;

impl DimCheck {
    pub(super) fn new(op: &'static str, names: &'static [&'static str]) -> Self {
        debug_assert!(names.len() <= MAX_DIMS);
        apart::keep();
        DimCheck {
            op,
            names,
            values: [None; MAX_DIMS],
            bound_by: [""; MAX_DIMS],
            element: None,
            begun: super::watch::begin(),
        }
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
            if t.device().is_gpu() && i32::try_from(size).is_err() {
                return Err(Error::failure(
                    format!("{}: {name}", self.op),
                    format!("axis {axis} is too long for a kernel"),
                )
                .is(t.shape())
                .must("every dim below 2^31"));
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

    /// A tensor of the working type: f32 on the host; elsewhere the first one decides and the others follow.
    pub(super) fn float(&mut self, name: &'static str, t: &Tensor) -> Result<()> {
        if t.device().is_host() {
            return want_dtype(self.op, name, t, &[DType::F32]);
        }
        match self.element {
            None => {
                want_dtype(self.op, name, t, &[DType::F32, DType::BF16])?;
                self.element = Some((t.dtype(), name));
                Ok(())
            }
            Some((element, _)) if element == t.dtype() => Ok(()),
            Some((element, first)) => Err(Error::failure(format!("{}: {name}", self.op), "wrong dtype")
                .is(t.dtype())
                .must(format!("{element} as {first}"))),
        }
    }

    /// A weight: of the working type on a GPU, f32 or bf16 elsewhere.
    pub(super) fn weight(&mut self, name: &'static str, t: &Tensor) -> Result<()> {
        if t.device().is_gpu() { self.float(name, t) } else { want_dtype(self.op, name, t, &[DType::F32, DType::BF16]) }
    }

    /// A tensor that is f32 whatever the working type.
    pub(super) fn f32(&mut self, name: &'static str, t: &Tensor) -> Result<()> {
        want_dtype(self.op, name, t, &[DType::F32])
    }

    /// A tensor of indices.
    pub(super) fn i32(&mut self, name: &'static str, t: &Tensor) -> Result<()> {
        want_dtype(self.op, name, t, &[DType::I32])
    }

    /// The working type of the call, one that the operator has kernels for.
    pub(super) fn element(&self, device: &Device, kernels: &[ElementType]) -> Result<DType> {
        if device.is_host() {
            return Ok(DType::F32);
        }
        let element = match (self.element, kernels) {
            (Some((element, _)), _) => element,
            // Where nothing that is read says it, what computes in one type alone computes in that.
            (None, [only]) => DType::from(*only),
            (None, _) => device.element(),
        };
        if !device.is_gpu() || kernels.iter().any(|k| DType::from(*k) == element) {
            return Ok(element);
        }
        Err(if kernels.is_empty() { no_path(self.op, device.kind()) } else { no_element(self.op, element) })
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

fn want_dtype(op: &str, name: &str, t: &Tensor, allowed: &[DType]) -> Result<()> {
    if allowed.contains(&t.dtype()) {
        return Ok(());
    }
    let names: Vec<String> = allowed.iter().map(DType::to_string).collect();
    Err(Error::failure(format!("{op}: {name}"), "wrong dtype").is(t.dtype()).must(names.join(" or ")))
}

pub(super) fn require(op: &str, holds: bool, that: &str, must: &str, found: impl Fn() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::failure(op, format!("{that} does not hold")).is(found()).must(must)) }
}

/// Every element of an index tensor lies in `0..end`. On a GPU the kernels see to it: looking would wait for the queue.
pub(super) fn check_index(op: &str, name: &str, t: &Tensor, end: usize) -> Result<()> {
    if !t.device().is_host() {
        return Ok(());
    }
    match t.i32s()?.iter().position(|&i| i < 0 || i as usize >= end) {
        None => Ok(()),
        Some(at) => Err(Error::failure(format!("{op}: {name}"), format!("element {at} is out of range"))
            .is(t.i32s()?[at])
            .must(format!("0 to {}", end.saturating_sub(1)))),
    }
}

pub(super) fn no_element(op: &str, element: DType) -> Error {
    Error::failure(op, format!("no kernel for {element}")).is(element).fix("use the other --dtype, or --backend cpu")
}

pub(super) fn no_path(op: &str, kind: DeviceKind) -> Error {
    Error::failure(op, format!("no {kind} path for this operator")).fix("use --backend cpu")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::emu::Recorder;
    use crate::ops::{adamw, contracts, contracts::ln_modulate::Params, ln_modulate};

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
    fn nothing_is_launched_on_a_gpu_before_every_argument_fits() {
        let (recorder, device) = Recorder::open(DType::BF16, false);
        let of = |shape: &[usize], dtype| device.empty_of(shape, dtype).unwrap();
        let (x, m) = (of(&[2, 3, 8], DType::BF16), of(&[2, 6, 8], DType::BF16));
        let refused = |x: &Tensor, m: &Tensor| ln_modulate(x, m, params()).err().unwrap().to_string();
        assert_eq!(
            refused(&x, &of(&[2, 6, 8], DType::F32)),
            "ln_modulate: modulation: wrong dtype; is f32; must be bf16 as x"
        );
        assert!(refused(&of(&[2, 3, 8], DType::I32), &m).contains("x: wrong dtype; is i32; must be f32 or bf16"));
        assert!(refused(&x, &of(&[2, 6, 9], DType::BF16)).contains("D = 8 as in x"));
        assert!(refused(&x, &Tensor::zeros(&Device::cpu(), &[2, 6, 8]).unwrap()).contains("another device"));
        assert!(refused(&of(&[0, 3, 8], DType::BF16), &of(&[0, 6, 8], DType::BF16)).contains("empty tensor"));
        let long = of(&[1, 1, 1 << 31], DType::BF16);
        assert!(refused(&long, &of(&[1, 6, 1 << 31], DType::BF16)).contains("axis 2 is too long for a kernel"));
        // An operator that computes in f32 alone.
        let [a, mut p, mut b, mut v] = [(); 4].map(|()| of(&[4], DType::BF16));
        let step = contracts::adamw::Params {
            lr: 1e-3,
            rate1: 0.1,
            rate2: 0.1,
            eps: 1e-8,
            weight_decay: 0.0,
            bias1: 1.0,
            bias2: 1.0,
            grad_scale: 1.0,
            ema_rate: 0.0,
        };
        let message = adamw(&a, &mut p, &mut b, &mut v, None, step).err().unwrap().to_string();
        assert!(message.contains("adamw: no kernel for bf16"), "{message}");
        assert!(recorder.finish().is_none(), "something was launched");
        ln_modulate(&x, &m, params()).unwrap();
        assert_eq!(recorder.finish().map(|r| r.launches), Some(1));
    }
}
