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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{ParamStore, Precision};
    use crate::backend::emu::Recorder;
    use crate::ops::contracts::{gemm, ln_modulate, loss_regression, philox as noise};
    use crate::ops::{act, philox};
    use crate::tensor::Device;

    const PLAIN: gemm::Params = gemm::Params { act: act::NONE, gate_row: 0, bf16: false };

    /// A device that computes in bf16, or would: a recorder takes one working type at a time.
    fn narrow_device() -> Device {
        Recorder::open(DType::BF16, false).1.dry_twin()
    }

    fn parts(device: &Device) -> (ParamStore, Tensor, Tensor) {
        let mut params = ParamStore::default();
        params.add("w", Tensor::zeros(device, &[8, 8]).unwrap(), true);
        (params, Tensor::zeros(device, &[1, 3, 8]).unwrap(), Tensor::zeros(device, &[1, 2, 8]).unwrap())
    }

    #[test]
    fn a_graph_meets_the_working_type_of_its_device() {
        let device = narrow_device();
        let (params, x, modulation) = parts(&device);
        let w = params.find("w").unwrap();
        let g = Graph::training(Precision::Bf16);
        let settings = ln_modulate::Params { shift: 0, scale: 1, eps: 1e-6 };
        let h = g.ln_modulate(&Var::constant(x.clone()), &Var::constant(modulation), settings).unwrap();
        assert_eq!(h.tensor().dtype(), DType::BF16);
        let y = g.gemm(&h, &g.param(&params, w), None, None, None, None, PLAIN).unwrap();
        assert_eq!(y.tensor().dtype(), DType::BF16);
        // A loss exists in f32 alone.
        let squared = loss_regression::Params { kind: 1, delta: 1.0 };
        let loss = g.loss_regression(&y, &Var::constant(x), squared).unwrap();
        assert_eq!(loss.tensor().dtype(), DType::F32);
        assert_eq!(g.tape(), ["cast", "gemm", "cast", "loss_regression"]);
        let grads = g.backward(&loss).unwrap();
        assert_eq!(grads.param(&params, w).unwrap().dtype(), DType::F32);
    }

    #[test]
    fn what_must_be_exact_stays_f32() {
        let device = narrow_device();
        let (params, x, _) = parts(&device);
        let (g, w, x) = (Graph::inference(Precision::Bf16), params.find("w").unwrap(), Var::constant(x));
        let product = || g.gemm(&x, &g.param(&params, w), None, None, None, None, PLAIN);
        assert_eq!(g.in_f32(product).unwrap().tensor().dtype(), DType::F32);
        let narrow = product().unwrap();
        assert_eq!(narrow.tensor().dtype(), DType::BF16);
        assert_eq!(g.to_f32(&narrow).unwrap().tensor().dtype(), DType::F32);
        // Nothing that is read says that noise is f32.
        let z = philox(&device, 2, 5, noise::Params { seed: 1, stream: 0, offset: 0 }).unwrap();
        assert_eq!(z.dtype(), DType::F32);
    }

    #[test]
    fn on_the_host_nothing_is_cast() {
        let device = Device::cpu();
        let (params, x, _) = parts(&device);
        let (g, w) = (Graph::training(Precision::Bf16), params.find("w").unwrap());
        let stored = Var::constant(params.get(w).value.to_bf16().unwrap());
        let y = g.gemm(&Var::constant(x), &g.param(&params, w), None, None, None, None, PLAIN).unwrap();
        let y = g.to_f32(&g.gemm(&y, &stored, None, None, None, None, PLAIN).unwrap()).unwrap();
        assert_eq!((g.tape(), y.tensor().dtype()), (vec!["gemm", "gemm"], DType::F32));
    }
}
