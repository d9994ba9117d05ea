//! What this machine has for the backend: devices, and where kernels would come from. For `graft doctor`.

use super::driver::{Handle, refused, version_text};
use super::modules::{ARCHIVE, open_archive};
use super::nvrtc::Nvrtc;
use super::{Probe, make_current, memory, probe};
use crate::error::Result;
use crate::io::cache::Cache;
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdevice_attribute};
use graft_kernels::launch::Properties;

/// One thing that is there or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Whether it can be used.
    pub good: bool,
    /// What it is, or why not.
    pub text: String,
}

/// Everything.
#[derive(Clone, Debug)]
pub struct Survey {
    /// The driver.
    pub probe: Probe,
    /// One line a device.
    pub devices: Vec<Found>,
    /// The archive of compiled kernels.
    pub archive: Found,
    /// The run-time compiler.
    pub compiler: Found,
    /// The disk cache.
    pub cache: Found,
}

/// Looks around.
///
/// # Errors
/// Those of [`probe`].
pub fn survey() -> Result<Survey> {
    let probe = probe()?;
    let devices = (0..probe.devices as usize)
        .map(|index| match device(index) {
            Ok(text) => Found { good: true, text },
            Err(e) => Found { good: false, text: e.to_string() },
        })
        .collect();
    let archive = match open_archive(probe.driver_version) {
        Some((place, archive)) => {
            let toolkit = version_text(archive.toolkit as i32);
            let text = format!("{ARCHIVE} ({place}): {} entries, made with CUDA {toolkit}", archive.entries.len());
            Found { good: true, text }
        }
        None => Found { good: false, text: format!("no {ARCHIVE} that can be used") },
    };
    let compiler = match Nvrtc::load() {
        Ok(nvrtc) => {
            let good = nvrtc.version / 1000 <= probe.driver_version / 1000;
            let newer = if good { "" } else { ", newer than the driver" };
            Found { good, text: format!("NVRTC {} ({}){newer}", version_text(nvrtc.version), nvrtc.name) }
        }
        Err(e) => Found { good: false, text: format!("NVRTC: {e}") },
    };
    let cache = match Cache::of_user("kernels") {
        Some(cache) => {
            Found { good: true, text: format!("{}: {} kernel sources", cache.folder().display(), cache.len()) }
        }
        None => Found { good: false, text: "no folder: HOME is not set".to_string() },
    };
    Ok(Survey { probe, devices, archive, compiler, cache })
}

/// A device's handle and what those who choose kernels ask of it.
///
/// # Errors
/// What the driver refuses.
pub(super) fn describe(index: usize) -> Result<(sys::CUdevice, Properties)> {
    let place = format!("cuda:{index}");
    let failed = |e| refused(e, &place, "cannot be described");
    let device = result::device::get(index as i32).map_err(failed)?;
    let ask = |attribute: CUdevice_attribute| {
        // SAFETY: the device is one that the driver gave.
        #[allow(unsafe_code)]
        unsafe { result::device::get_attribute(device, attribute) }.map_err(failed)
    };
    let major = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let multiprocessors = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let shared = ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    // SAFETY: as above.
    #[allow(unsafe_code)]
    let memory = unsafe { result::device::total_mem(device) }.map_err(failed)?;
    let name = result::device::get_name(device).map_err(failed)?;
    let properties = Properties {
        name,
        arch: (10 * major + minor) as u32,
        multiprocessors: multiprocessors as usize,
        shared_per_block: shared as usize,
        memory: memory as u64,
    };
    Ok((device, properties))
}

fn device(index: usize) -> Result<String> {
    let (device, p) = describe(index)?;
    let place = format!("cuda:{index}");
    // SAFETY: the device is one that the driver gave; released below.
    #[allow(unsafe_code)]
    let context = unsafe { result::primary_ctx::retain(device) }.map_err(|e| refused(e, &place, "cannot be opened"))?;
    let free = make_current(Handle(context), &place).and_then(|()| memory::free_and_total(&place));
    // SAFETY: retained above, and nothing uses it.
    #[allow(unsafe_code)]
    let _ = unsafe { result::primary_ctx::release(device) };
    let gib = |bytes: f64| bytes / f64::from(1 << 30);
    let free = gib(free?.0 as f64);
    let memory = gib(p.memory as f64);
    Ok(format!(
        "{place}: {}, compute capability {}.{}, {} multiprocessors, {free:.1} GiB free of {memory:.1}",
        p.name,
        p.arch / 10,
        p.arch % 10,
        p.multiprocessors
    ))
}
