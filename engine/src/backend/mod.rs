//! Backends: what runs the operators, and what this machine offers.
//!
//! A [`Device`] names its backend; the generated entry points of `ops` pick the path. `cpu` is the fast path of
//! `graft_kernels::<op>::cpu`, `oracle` the plain loops. `cuda` (driver, streams, graphs) and `emu` (the CUDA
//! sources on an emulated GPU) have their rooms here.

pub(crate) mod apart;
pub mod cpu;
pub mod cuda;
pub mod emu;
pub mod replay;

pub use crate::tensor::{Device, DeviceKind};

use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use graft_kernels::axpy;
use graft_kernels::generated::axpy::{Dims, Forward, GpuForward, Params};
use graft_kernels::launch::Element;
use half::bf16;
use std::marker::PhantomData;

/// The device that a `--backend` flag names, in its default working type.
///
/// # Errors
/// An unknown name, or a backend that this machine cannot run.
pub fn open(name: &str) -> Result<Device> {
    open_as(name, DType::F32)
}

/// The device that a `--backend` flag names; a GPU computes in `element`.
///
/// # Errors
/// As [`open`].
pub fn open_as(name: &str, element: DType) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::cpu()),
        "oracle" => Ok(Device::oracle()),
        "cuda" => cuda::open(element, 0),
        "emu" => emu::open(element, 0),
        other => {
            Err(Error::usage("--backend", "unknown backend").is(format!("{other:?}")).must("cpu, oracle, emu or cuda"))
        }
    }
}

/// The working type that an `--element` flag names.
///
/// # Errors
/// An unknown name.
pub fn element(name: &str) -> Result<DType> {
    match name {
        "f32" => Ok(DType::F32),
        "bf16" => Ok(DType::BF16),
        other => Err(Error::usage("--element", "unknown type").is(format!("{other:?}")).must("f32 or bf16")),
    }
}

/// `target += addend`, in place where `target` is not shared: how gradients are summed.
///
/// # Errors
/// When the shapes differ, or the device has no path.
pub fn add_into(target: &mut Tensor, addend: &Tensor) -> Result<()> {
    add_scaled(target, addend, 1.0)
}

/// `target += alpha · addend`, in place where `target` is not shared.
///
/// # Errors
/// As [`add_into`].
pub fn add_scaled(target: &mut Tensor, addend: &Tensor, alpha: f32) -> Result<()> {
    if target.shape() != addend.shape() {
        return Err(Error::failure("add", "shapes differ").is(addend.shape()).must(target.shape()));
    }
    if !target.is_unique() {
        *target = target.copy()?;
    }
    let kind = target.device().kind();
    if kind == DeviceKind::Dry {
        return Ok(());
    }
    let dims = Dims { l: target.len() };
    let params = Params { alpha };
    if target.device().is_gpu() {
        return match (target.dtype(), addend.dtype()) {
            (DType::F32, DType::F32) => add_into_gpu::<f32>(target, addend, dims, params),
            (DType::BF16, DType::BF16) => add_into_gpu::<bf16>(target, addend, dims, params),
            (to, from) => Err(Error::failure("add", "types differ").is(from).must(to)),
        };
    }
    let args = Forward { dims, params, x: addend.f32s()?, y: target.f32s_mut()? };
    match kind {
        DeviceKind::Cpu => axpy::cpu::forward(args),
        DeviceKind::Oracle => axpy::reference::forward(args),
        other => return Err(Error::failure("add", format!("no {other} path"))),
    }
    Ok(())
}

/// [`add_into`] by the kernel for elements of type `T`, that of both tensors.
fn add_into_gpu<T: Element>(target: &mut Tensor, addend: &Tensor, dims: Dims, params: Params) -> Result<()> {
    let device = target.device().clone();
    let args = GpuForward::<T> { dims, params, x: addend.input()?, y: target.output()?, element: PhantomData };
    axpy::launch::forward(&mut device.queue()?, args)
}
