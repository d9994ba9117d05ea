//! CUDA: a run-time fact, never a build feature.
//!
//! The driver library is looked for before any call, because the bindings panic without it.

use crate::error::{Error, Result};
use cudarc::driver::{result, sys};

/// What the driver says of itself and the first device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Version of the CUDA API that the driver supports, as 1000·major + 10·minor.
    pub driver_version: i32,
    /// Number of devices.
    pub devices: i32,
}

/// Checks that a driver and a device are there.
///
/// # Errors
/// Says which is missing and what to do.
pub fn probe() -> Result<Probe> {
    // SAFETY: the call only tries to open the driver library and has no precondition.
    #[allow(unsafe_code)]
    let present = unsafe { sys::is_culib_present() };
    if !present {
        return Err(Error::failure("cuda", "the NVIDIA driver library was not found")
            .is("no libcuda.so.1 on the library path")
            .must("an installed NVIDIA driver")
            .fix("install the driver (in a container: run it with GPU access), or use --backend cpu"));
    }
    let driver = |e: result::DriverError| {
        Error::failure("cuda", format!("the driver refused: {e}")).fix("run nvidia-smi to see why")
    };
    result::init().map_err(driver)?;
    let mut driver_version = 0;
    // SAFETY: the pointer is to a live i32, as the call asks.
    #[allow(unsafe_code)]
    unsafe { sys::cuDriverGetVersion(&mut driver_version) }.result().map_err(driver)?;
    let devices = result::device::get_count().map_err(driver)?;
    if devices == 0 {
        return Err(Error::failure("cuda", "no device")
            .is("0 devices")
            .must("at least 1")
            .fix("check nvidia-smi and CUDA_VISIBLE_DEVICES"));
    }
    Ok(Probe { driver_version, devices })
}
