//! The driver: is it there, is it new enough, and what its refusals mean.

use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{DriverError, result};
use std::fmt;

/// The oldest CUDA version that the driver must support, as 1000·major + 10·minor: tensor maps came with 12.0.
pub const OLDEST_DRIVER: i32 = 12_000;

/// The driver packages that support it.
pub const OLDEST_PACKAGE: &str = "R525";

/// A version as people write it: 12040 is 12.4.
pub(super) fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// A handle of the driver, which may be used from any thread while its context is current.
#[derive(Debug, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub(super) struct Handle<T>(pub *mut T);

// By hand: derived ones would ask the same of T.
impl<T> Clone for Handle<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Handle<T> {}

// SAFETY: the driver's handles are names that any thread may use; all uses here are behind one lock.
#[allow(unsafe_code)]
unsafe impl<T> Send for Handle<T> {}

/// Checks that there is a driver, that it is new enough, and starts it. Gives the version that it supports.
///
/// # Errors
/// Which of these fails and what to do.
pub(super) fn start() -> Result<i32> {
    // SAFETY: the call only tries to open the driver library and has no precondition.
    #[allow(unsafe_code)]
    let present = unsafe { sys::is_culib_present() };
    if !present {
        return Err(Error::failure("cuda", "the NVIDIA driver library was not found")
            .is("no libcuda.so.1 on the library path")
            .must("an installed NVIDIA driver")
            .fix("install the driver (in a container: run it with GPU access), or use --backend cpu"));
    }
    let mut version = 0;
    // SAFETY: the pointer is to a live i32, as the call asks; it may come before any other.
    #[allow(unsafe_code)]
    check(unsafe { sys::cuDriverGetVersion(&mut version) }, "cuda", "cannot ask for the driver's version")?;
    // Before anything else: the bindings have no answer to a function that an old library lacks.
    if version < OLDEST_DRIVER {
        return Err(Error::failure("cuda", "the NVIDIA driver is too old")
            .is(format!("it supports CUDA {}", version_text(version)))
            .must(format!("CUDA {} ({OLDEST_PACKAGE}) or newer", version_text(OLDEST_DRIVER)))
            .fix("update the driver, or use --backend cpu"));
    }
    result::init().map_err(|e| refused(e, "cuda", "the driver does not start"))?;
    Ok(version)
}

/// Turns what the driver answered into an error of `place`.
pub(super) fn check(answer: CUresult, place: impl fmt::Display, doing: impl fmt::Display) -> Result<()> {
    answer.result().map_err(|e| refused(e, place, doing))
}

/// What the driver's refusal means and what to do about it.
pub(super) fn refused(e: DriverError, place: impl fmt::Display, doing: impl fmt::Display) -> Error {
    let name = e.error_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or(format!("{:?}", e.0));
    let text = e.error_string().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let error = Error::failure(place.to_string(), format!("{doing}: {text}")).is(name);
    match e.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => error.fix("check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            error.fix("use a smaller batch, or end other programs that hold memory of this device (nvidia-smi)")
        }
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
        | CUresult::CUDA_ERROR_LAUNCH_FAILED
        | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
        | CUresult::CUDA_ERROR_ASSERT => error.fix(
            "a kernel failed and this process cannot use the device any more; nothing computed since the last \
             synchronisation holds; run it under compute-sanitizer to see which",
        ),
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | CUresult::CUDA_ERROR_SYSTEM_NOT_READY => {
            error.fix("restart the machine after an update of the driver")
        }
        CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE => error.fix("another process holds the device alone (nvidia-smi)"),
        _ => error.fix("run nvidia-smi to see the state of the driver"),
    }
}
