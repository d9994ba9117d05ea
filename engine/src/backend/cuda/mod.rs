//! CUDA: a run-time fact, never a build feature.
//!
//! | module | for |
//! |---|---|
//! | `driver` | is there one, is it new enough, what its refusals mean |
//! | `arena`, `memory` | blocks in segments of device memory; the error when there is no more |
//! | `staging` | transfers through page-locked memory |
//! | `modules`, `nvrtc` | kernels from the archive, the disk cache or the run-time compiler |
//! | `launch` | one launch: shape, arguments, tensor maps |
//! | [`graphs`], `steps` | captured work, replayed; work timed |
//! | [`notices`] | what a user should know although nothing failed |
//!
//! Every call is put on one stream and runs in the order of the calls. One lock is held during a call; a thread that
//! captures a graph keeps the others waiting until it is done.

mod arena;
mod driver;
pub mod graphs;
mod launch;
mod memory;
mod modules;
pub mod notices;
mod nvrtc;
mod staging;
mod steps;
mod survey;

pub use arena::ArenaStats;
pub use driver::{OLDEST_DRIVER, OLDEST_PACKAGE};
pub use graphs::{GraphKey, Step};
pub use modules::{ARCHIVE, Origins, compile};
pub use survey::{Found, Survey, survey};

use crate::error::{Error, Result};
use crate::tensor::MemoryPlan;
use crate::tensor::{DType, Device, DeviceKind, Gpu};
use cudarc::driver::{result, sys};
use driver::{Handle, check, refused};
use graft_kernels::launch::{Launch, Properties};
use graphs::{Capture, Graphs};
use memory::Memory;
use modules::{Modules, Target};
use staging::Staging;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Oldest compute capability that the kernels are for.
const OLDEST_ARCH: u32 = 80;

/// What the driver says of itself.
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
/// Says which is missing or too old and what to do.
pub fn probe() -> Result<Probe> {
    let driver_version = driver::start()?;
    let devices = result::device::get_count().map_err(|e| refused(e, "cuda", "cannot count the devices"))?;
    if devices == 0 {
        return Err(Error::failure("cuda", "no device")
            .is("0 devices")
            .must("at least 1")
            .fix("check nvidia-smi and CUDA_VISIBLE_DEVICES"));
    }
    Ok(Probe { driver_version, devices })
}

/// Opens device `index` for tensors; it computes in `element`.
///
/// # Errors
/// Those of [`Cuda::open`].
pub fn open(element: DType, index: usize) -> Result<Device> {
    Ok(Device::gpu(DeviceKind::Cuda, Arc::new(Cuda::open(index)?), element))
}

/// A device of the driver. Its numbers are those that `CUDA_VISIBLE_DEVICES` leaves.
pub struct Cuda {
    label: String,
    properties: Properties,
    device: sys::CUdevice,
    state: Mutex<State>,
    turn: Condvar,
}

/// What the lock protects.
struct State {
    context: Handle<sys::CUctx_st>,
    stream: Handle<sys::CUstream_st>,
    memory: Memory,
    staging: Staging,
    modules: Modules,
    graphs: Graphs,
    capture: Option<Capture>,
    arguments: launch::Arguments,
}

impl Cuda {
    /// Opens device `index`.
    ///
    /// # Errors
    /// Those of [`probe`], a number that is too large, a device that is too old, or what the driver refuses.
    pub fn open(index: usize) -> Result<Cuda> {
        let probe = probe()?;
        if index >= probe.devices as usize {
            return Err(Error::usage("--backend cuda", "no such device")
                .is(format!("device {index} of {}", probe.devices))
                .must(format!("0 to {}", probe.devices - 1))
                .fix("devices are counted after CUDA_VISIBLE_DEVICES"));
        }
        let (device, properties) = survey::describe(index)?;
        let label = format!("cuda:{index} ({})", properties.name);
        if properties.arch < OLDEST_ARCH {
            return Err(Error::failure(label, "the device is too old")
                .is(format!("compute capability {}.{}", properties.arch / 10, properties.arch % 10))
                .must("8.0 (A100) or newer")
                .fix("choose another with CUDA_VISIBLE_DEVICES, or use --backend cpu"));
        }
        // SAFETY: the device is one that the driver counted; released in `drop`.
        #[allow(unsafe_code)]
        let context =
            unsafe { result::primary_ctx::retain(device) }.map_err(|e| refused(e, &label, "cannot be opened"))?;
        let made = Cuda::in_context(label, properties, device, Handle(context), probe.driver_version);
        if made.is_err() {
            // SAFETY: retained above, and nothing uses it.
            #[allow(unsafe_code)]
            let _ = unsafe { result::primary_ctx::release(device) };
        }
        made
    }

    fn in_context(
        label: String,
        properties: Properties,
        device: sys::CUdevice,
        context: Handle<sys::CUctx_st>,
        driver: i32,
    ) -> Result<Cuda> {
        make_current(context, &label)?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(|e| refused(e, &label, "cannot make a stream"))?;
        let stream = Handle(stream);
        let target = Target { label: label.clone(), arch: properties.arch, driver };
        let state = State {
            context,
            stream,
            memory: Memory::new(&label, properties.memory),
            staging: Staging::new(&label, stream),
            modules: Modules::new(target),
            graphs: Graphs::new(&label),
            capture: None,
            arguments: launch::Arguments::default(),
        };
        Ok(Cuda { label, properties, device, state: Mutex::new(state), turn: Condvar::new() })
    }

    /// Its number and name, as errors give them.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// Takes the lock, with the device's context current; waits while another thread captures.
    fn enter(&self) -> Result<MutexGuard<'_, State>> {
        let me = std::thread::current().id();
        // The state is whole between the driver's calls, so a panic elsewhere leaves it usable.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.capture.as_ref().is_some_and(|c| c.thread != me) {
            state = self.turn.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        make_current(state.context, &self.label)?;
        Ok(state)
    }

    /// As [`Cuda::enter`], for what a capture cannot hold.
    fn enter_outside(&self, tried: &str) -> Result<MutexGuard<'_, State>> {
        let mut state = self.enter()?;
        match &mut state.capture {
            Some(capture) => Err(capture.refuse(&self.label, tried)),
            None => Ok(state),
        }
    }

    /// Takes the memory of a plan at once, so that work fails before it starts or not at all.
    ///
    /// # Errors
    /// When the device has not so much.
    pub fn reserve(&self, plan: &MemoryPlan) -> Result<()> {
        self.enter_outside("memory is reserved")?.memory.reserve(plan)
    }

    /// Names what is being done, for errors.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn set_phase(&self, phase: &str) -> Result<()> {
        self.enter()?.memory.phase = phase.to_string();
        Ok(())
    }

    /// Counts of its memory.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn memory(&self) -> Result<ArenaStats> {
        Ok(self.enter()?.memory.stats())
    }

    /// Where the kernels that it uses came from.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn origins(&self) -> Result<Origins> {
        Ok(self.enter()?.modules.origins)
    }
}

fn make_current(context: Handle<sys::CUctx_st>, label: &str) -> Result<()> {
    // SAFETY: the context is retained as long as the device is open.
    #[allow(unsafe_code)]
    unsafe { result::ctx::set_current(context.0) }.map_err(|e| refused(e, label, "cannot be used from this thread"))
}

/// Shortest piece of work that is measured, in milliseconds: calls are repeated until they take so long.
const MEASURED: f32 = 2.0;

/// Most repetitions of a call in a measurement.
const REPEATED: f32 = 64.0;

/// How long work runs before it is measured: clocks settle under the very load.
const SETTLE: Duration = Duration::from_millis(300);

/// Bytes that are written before a cold call, at most an eighth of the memory: more than any L2 cache, and so long to
/// write that the host has launched the call before it begins.
const FLUSH: usize = 512 << 20;

impl Gpu for Cuda {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn time(&self, samples: usize, work: &mut dyn FnMut() -> Result<()>) -> Result<Vec<f64>> {
        work()?;
        let once = self.timed(work)?;
        let calls = (MEASURED / once.max(1e-3)).ceil().clamp(1.0, REPEATED) as usize;
        let key = GraphKey { work: "a measurement".to_string(), shape: vec![calls], addresses: Vec::new() };
        let mut repeated = || (0..calls).try_for_each(|_| work());
        // The first time it runs plainly, the second time it is captured.
        self.graph(&key, &mut repeated)?;
        self.graph(&key, &mut repeated)?;
        let begun = Instant::now();
        while begun.elapsed() < SETTLE {
            self.timed(&mut || self.graph(&key, &mut repeated).map(drop))?;
        }
        let mut times = Vec::with_capacity(samples);
        for _ in 0..samples.max(1) {
            let all = self.timed(&mut || self.graph(&key, &mut repeated).map(drop))?;
            times.push(f64::from(all) / calls as f64);
        }
        self.forget_graphs()?;
        Ok(times)
    }

    fn time_cold(&self, samples: usize, work: &mut dyn FnMut() -> Result<()>) -> Result<Vec<f64>> {
        let key = GraphKey { work: "a cold measurement".to_string(), shape: Vec::new(), addresses: Vec::new() };
        self.graph(&key, work)?;
        self.graph(&key, work)?;
        let bytes = FLUSH.min(self.properties.memory as usize / 8);
        let flush = self.allocate(bytes)?;
        let mut sample = || {
            self.fill(flush, 0, bytes)?;
            self.timed(&mut || self.graph(&key, work).map(drop)).map(f64::from)
        };
        let times = (0..samples.max(1)).map(|_| sample()).collect();
        self.free(flush, bytes);
        self.forget_graphs()?;
        times
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.enter_outside("memory is allocated")?.memory.allocate(bytes)
    }

    fn free(&self, address: u64, _bytes: usize) {
        let Ok(mut guard) = self.enter() else { return };
        let state = &mut *guard;
        // Everything runs in the order of the calls, so a block may serve the next owner at once; a graph's may not.
        match &mut state.capture {
            Some(capture) => capture.held.push(address),
            None if state.memory.free(address) => {}
            None => notices::leave(format!("{}: memory at {address:#x} was freed twice: please report it", self.label)),
        }
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        let mut state = self.enter_outside("bytes are uploaded")?;
        state.memory.inside(to, bytes.len(), "upload")?;
        state.staging.upload(to, bytes)
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        let mut state = self.enter_outside("bytes are downloaded")?;
        state.memory.inside(from, bytes.len(), "download")?;
        state.staging.download(from, bytes)
    }

    fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        let state = self.enter()?;
        state.memory.inside(to, bytes, "copy")?;
        state.memory.inside(from, bytes, "copy")?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: both ranges lie inside blocks that are in use; the stream is alive.
        #[allow(unsafe_code)]
        unsafe { result::memcpy_dtod_async(to, from, bytes, state.stream.0) }
            .map_err(|e| refused(e, &self.label, "cannot copy on the device"))
    }

    fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<()> {
        let state = self.enter()?;
        state.memory.inside(to, bytes, "fill")?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the range lies inside a block that is in use; the stream is alive.
        #[allow(unsafe_code)]
        unsafe { result::memset_d8_async(to, byte, bytes, state.stream.0) }
            .map_err(|e| refused(e, &self.label, "cannot set memory"))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        launch::check_shape(launch, &self.properties)?;
        let mut guard = self.enter()?;
        let state = &mut *guard;
        if state.modules.loaded(launch.kernel, launch.element).is_none() {
            if let Some(capture) = &mut state.capture {
                return Err(capture.refuse(&self.label, &format!("kernel {} is loaded", launch.kernel.name)));
            }
            state.modules.load(launch.kernel, launch.element)?;
        }
        let Some(function) = state.modules.loaded(launch.kernel, launch.element) else {
            return Err(Error::failure(&self.label, format!("kernel {} is not loaded", launch.kernel.name)));
        };
        launch::prepare(launch, function, &self.label, state.capture.is_some())?;
        launch::start(launch, self.properties.arch, function, state.stream, &mut state.arguments)
    }

    fn synchronize(&self) -> Result<()> {
        let state = self.enter_outside("the queue is waited for")?;
        // SAFETY: the stream is alive.
        #[allow(unsafe_code)]
        check(unsafe { sys::cuStreamSynchronize(state.stream.0) }, &self.label, "work on the device failed")
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        let Ok(mut state) = self.enter() else { return };
        let stream = state.stream;
        // SAFETY: the stream is alive. Best effort from here on: after a failed kernel the driver refuses everything.
        #[allow(unsafe_code)]
        let _ = unsafe { result::stream::synchronize(stream.0) };
        state.graphs.clear();
        state.modules.release();
        state.staging.release();
        state.memory.release();
        // SAFETY: nothing uses the stream any more, nor the context, which `open` retained.
        #[allow(unsafe_code)]
        unsafe {
            let _ = result::stream::destroy(stream.0);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
