//! Where f32 meets the working type of a device.
//!
//! A device computes in one working type ([`Device::element`](crate::tensor::Device::element)): f32 on the host, f32 or
//! bf16 on a GPU. A graph gives every operator its tensors in that type: what comes in f32 (latents, features of
//! timesteps, parameters in training) is rounded on the way in, recorded like any operator, so that its gradient is f32
//! again and sums in f32. Operators that exist in f32 alone, losses among them, are given f32. Where both types are the
//! same nothing happens at all.

use super::{cast, cast_backward};
use crate::autograd::{Graph, Var};
use crate::error::Result;
use crate::tensor::{DType, Tensor};
use graft_kernels::generated::cast::Params;
use graft_kernels::launch::ElementType;

/// `x` in the working type of its device; `x` itself where it is of that type, or where that is f32.
///
/// # Errors
/// When memory runs out.
pub fn to_working(x: &Tensor) -> Result<Tensor> {
    match (x.dtype(), x.device().element()) {
        (DType::F32, DType::BF16) => cast(&x.reshape(&[x.len()])?, Params {})?.into_shape(x.shape().dims()),
        _ => Ok(x.clone()),
    }
}

/// `x` in f32; `x` itself where it is.
///
/// # Errors
/// When memory runs out.
pub fn to_f32(x: &Tensor) -> Result<Tensor> {
    let (device, dims) = (x.device(), x.shape());
    if x.dtype() != DType::BF16 {
        return Ok(x.clone());
    }
    if device.is_host() {
        return Tensor::from_f32(device, dims.dims(), &x.to_vec()?);
    }
    // The gradient of rounding is taken as if nothing were lost: the same numbers in the wider type.
    let wide = cast_backward(&x.reshape(&[x.len()])?, true, Params {})?;
    wide.map_or_else(|| Ok(x.clone()), |wide| wide.into_shape(dims.dims()))
}

impl Graph<'_> {
    /// `x` in f32, recorded.
    ///
    /// # Errors
    /// As [`to_f32`].
    pub fn to_f32(&self, x: &Var) -> Result<Var> {
        match x.tensor().dtype() {
            DType::BF16 => self.converted(x, to_f32, to_working),
            _ => Ok(x.clone()),
        }
    }

    /// `x` in the type in which an operator with kernels for `kernels` takes it: the working type of the device where it
    /// has that, else f32.
    pub(super) fn fitted(&self, x: &Var, kernels: &[ElementType]) -> Result<Var> {
        let device = x.tensor().device();
        // The CPU reads weights as they are stored.
        if !device.is_gpu() && device.element() == DType::F32 {
            return Ok(x.clone());
        }
        let knows = |element| kernels.iter().any(|k| DType::from(*k) == element);
        let element = if self.is_exact() || !knows(device.element()) { DType::F32 } else { device.element() };
        match (x.tensor().dtype(), element) {
            (DType::F32, DType::BF16) => self.converted(x, to_working, to_f32),
            (DType::BF16, DType::F32) if knows(DType::F32) => self.to_f32(x),
            _ => Ok(x.clone()),
        }
    }

    fn converted(
        &self,
        x: &Var,
        forward: fn(&Tensor) -> Result<Tensor>,
        backward: fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Var> {
        let out = forward(x.tensor())?;
        let Some(source) = self.source(x) else { return Ok(Var::constant(out)) };
        Ok(self.record("cast", out, 0, move |dy, grads| grads.add(Some(source), Some(backward(dy)?))))
    }
}
