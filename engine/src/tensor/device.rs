//! Devices and their memory pools.
//!
//! A device hands out buffers and takes them back: after the first step of a loop every request is met by a buffer
//! of the same size that an earlier step returned, so the loop allocates nothing. Counters tell live and peak bytes.

use super::gpu::{Gpu, Kernels, Memory};
use super::pages::{LARGE, Pages};
use super::{DType, Shape, Tensor};
use crate::error::{Error, Result};
use bytemuck::{Pod, Zeroable};
use graft_kernels::launch::Properties;
use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// What runs the operators.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// The fast CPU path.
    Cpu,
    /// The oracles: slow, exact, for comparison.
    Oracle,
    /// The CUDA kernels on an emulated GPU.
    Emu,
    /// The CUDA kernels on a GPU.
    Cuda,
    /// Nothing: tensors are counted and operators return at once, so that memory can be planned before it is used.
    Dry,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Oracle => "oracle",
            DeviceKind::Emu => "emu",
            DeviceKind::Cuda => "cuda",
            DeviceKind::Dry => "dry",
        })
    }
}

/// One cache line: buffers are sequences of lines, so every tensor starts on a 64-byte boundary.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

// SAFETY: sixteen f32 in 64 bytes aligned to 64: no padding, and every bit pattern is a valid value.
#[allow(unsafe_code)]
unsafe impl Zeroable for Line {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Pod for Line {}

/// Storage of a tensor.
pub(crate) struct Buffer {
    storage: Storage,
    device: Device,
}

enum Storage {
    Lines(Vec<Line>),
    /// At least [`LARGE`] bytes.
    Pages(Pages),
    /// Of a dry device: its length, and zeros where someone asks for values all the same.
    Dry(usize, OnceLock<Vec<f32>>),
    /// Of a device with its own memory.
    Gpu(Memory),
}

impl Buffer {
    /// The values in host memory; none on a device with its own.
    pub(crate) fn floats(&self) -> Option<&[f32]> {
        match &self.storage {
            Storage::Lines(lines) => Some(bytemuck::cast_slice(lines)),
            Storage::Pages(pages) => Some(pages.floats()),
            Storage::Dry(len, values) => Some(values.get_or_init(|| vec![0.0; *len])),
            Storage::Gpu(_) => None,
        }
    }

    /// As [`Buffer::floats`].
    pub(crate) fn floats_mut(&mut self) -> Option<&mut [f32]> {
        match &mut self.storage {
            Storage::Lines(lines) => Some(bytemuck::cast_slice_mut(lines)),
            Storage::Pages(pages) => Some(pages.floats_mut()),
            Storage::Dry(len, values) => {
                values.get_or_init(|| vec![0.0; *len]);
                values.get_mut().map(|values| &mut values[..])
            }
            Storage::Gpu(_) => None,
        }
    }

    /// The memory of a device with its own.
    pub(crate) fn memory(&self) -> Option<&Memory> {
        match &self.storage {
            Storage::Gpu(memory) => Some(memory),
            _ => None,
        }
    }

    /// Length in cache lines.
    fn lines(&self) -> usize {
        match &self.storage {
            Storage::Lines(lines) => lines.len(),
            Storage::Pages(pages) => pages.floats().len() / 16,
            Storage::Dry(len, _) => len / 16,
            Storage::Gpu(memory) => memory.bytes().div_ceil(64),
        }
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Gives the buffer back to its pool if this was the last reference; the `Arc` itself is kept for reuse.
    pub(crate) fn release(mut buffer: Arc<Buffer>) {
        if Arc::get_mut(&mut buffer).is_some() {
            let pool = Arc::clone(&buffer.device.0);
            pool.live.fetch_sub(buffer.lines() * 64, Ordering::Relaxed);
            if pool.gpu.as_ref().is_some_and(|gpu| !gpu.recycles()) {
                return;
            }
            let mut free = pool.lock();
            pool.waiting.fetch_add(1, Ordering::Relaxed);
            free.entry(buffer.lines()).or_default().push(Recycled(buffer));
            drop(free);
            pool.abandon(1);
        }
    }
}

/// A buffer waiting in the pool. Its device handle points back at the pool, which is broken up by `Device::trim`
/// or when the last outside handle goes ([`Pool::abandon`]).
struct Recycled(Arc<Buffer>);

struct Pool {
    kind: DeviceKind,
    /// The device behind the kinds with memory of their own.
    gpu: Option<Arc<dyn Gpu>>,
    /// The type in which it computes where a call does not say.
    element: DType,
    free: Mutex<HashMap<usize, Vec<Recycled>>>,
    /// Buffers in `free`.
    waiting: AtomicUsize,
    live: AtomicUsize,
    peak: AtomicUsize,
    poison: AtomicBool,
}

impl Pool {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<usize, Vec<Recycled>>> {
        // The map is whole between operations, so a panic elsewhere while it was held leaves it usable.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frees the waiting buffers.
    fn empty(&self) {
        let mut free = self.lock();
        self.waiting.store(0, Ordering::Relaxed);
        let pooled = std::mem::take(&mut *free);
        // Their handles come back here as they go.
        drop(free);
        drop(pooled);
    }

    /// Frees the waiting buffers where nobody but them, and the caller with `own` handles, has a handle on the pool:
    /// they would keep each other. Where others come and go meanwhile it may free once too often, which only costs time.
    fn abandon(self: &Arc<Self>, own: usize) {
        let waiting = self.waiting.load(Ordering::Relaxed);
        if waiting > 0 && Arc::strong_count(self) == waiting + own {
            self.empty();
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.0.abandon(1);
    }
}

/// Bytes held by tensors of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryStats {
    /// Bytes of tensors alive now.
    pub live: usize,
    /// Largest value of `live` since the last [`Device::reset_peak`].
    pub peak: usize,
    /// Bytes waiting in the pool.
    pub pooled: usize,
}

/// A handle on a device; clones share its memory pool.
#[derive(Clone)]
pub struct Device(Arc<Pool>);

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.0.kind)
    }
}

impl Device {
    fn host(kind: DeviceKind) -> Device {
        Device::new(kind, None, DType::F32)
    }

    /// A new pool on a device with its own memory, which computes in `element`.
    pub fn gpu(kind: DeviceKind, gpu: Arc<dyn Gpu>, element: DType) -> Device {
        Device::new(kind, Some(gpu), element)
    }

    fn new(kind: DeviceKind, gpu: Option<Arc<dyn Gpu>>, element: DType) -> Device {
        Device(Arc::new(Pool {
            kind,
            gpu,
            element,
            free: Mutex::new(HashMap::new()),
            waiting: AtomicUsize::new(0),
            live: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
            poison: AtomicBool::new(false),
        }))
    }

    /// A new pool on the fast CPU path.
    pub fn cpu() -> Device {
        Device::host(DeviceKind::Cpu)
    }

    /// A new pool on the oracles.
    pub fn oracle() -> Device {
        Device::host(DeviceKind::Oracle)
    }

    /// A new pool whose tensors are only counted and operators do nothing. A tensor takes no memory until someone
    /// looks at its values, which are unspecified.
    pub fn dry() -> Device {
        Device::host(DeviceKind::Dry)
    }

    /// [`Device::dry`] in the working type of this device, so that what is counted on it is what this one would hold.
    pub fn dry_twin(&self) -> Device {
        Device::new(DeviceKind::Dry, None, self.element())
    }

    /// Whether tensors of this device have no values worth writing: what fills them need not run.
    pub fn is_dry(&self) -> bool {
        self.0.kind == DeviceKind::Dry
    }

    /// Whether operators work on host memory: the CPU path and the oracles.
    pub fn is_host(&self) -> bool {
        matches!(self.0.kind, DeviceKind::Cpu | DeviceKind::Oracle)
    }

    /// Whether it has memory of its own, and operators are kernels.
    pub fn is_gpu(&self) -> bool {
        self.0.gpu.is_some()
    }

    /// The working type of new tensors that stand for activations and weights; f32 on the host.
    pub fn element(&self) -> DType {
        self.0.element
    }

    /// The device behind a kind with memory of its own.
    pub(crate) fn driver(&self) -> Option<&Arc<dyn Gpu>> {
        self.0.gpu.as_ref()
    }

    /// A queue for the kernels of one operator call.
    ///
    /// # Errors
    /// When the device works on host memory.
    pub(crate) fn queue(&self) -> Result<Kernels<'_>> {
        match &self.0.gpu {
            Some(gpu) => Ok(Kernels::new(self, gpu.as_ref())),
            None => Err(Error::failure(format!("{} device", self.0.kind), "has no queue of kernels")),
        }
    }

    /// Waits until everything that was asked of the device is done; nothing to wait for on the host.
    ///
    /// # Errors
    /// Those of the kernels.
    pub fn synchronize(&self) -> Result<()> {
        self.0.gpu.as_ref().map_or(Ok(()), |gpu| gpu.synchronize())
    }

    /// What the GPU is; none where the device works on host memory.
    pub fn properties(&self) -> Option<&Properties> {
        self.0.gpu.as_ref().map(|gpu| gpu.properties())
    }

    /// Name of the processor that runs the operators.
    pub fn describe(&self) -> String {
        self.0.gpu.as_ref().map_or(self.0.kind.to_string(), |gpu| gpu.properties().name.clone())
    }

    /// Milliseconds of one call of `work`, after one to warm up: `samples` times, on the host no longer than
    /// `patience`.
    ///
    /// # Errors
    /// Those of the work; a device without a clock.
    pub fn time(&self, samples: usize, patience: Duration, work: &mut dyn FnMut() -> Result<()>) -> Result<Vec<f64>> {
        if let Some(gpu) = &self.0.gpu {
            return gpu.time(samples, work);
        }
        work()?;
        let begun = Instant::now();
        let mut times = Vec::new();
        while times.len() < samples.max(1) && (times.is_empty() || begun.elapsed() < patience) {
            let start = Instant::now();
            work()?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        Ok(times)
    }

    /// The same on a GPU whose caches hold nothing of the work when a call begins; none on the host.
    ///
    /// # Errors
    /// As [`Device::time`].
    pub fn time_cold(&self, samples: usize, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<Vec<f64>>> {
        self.0.gpu.as_ref().map(|gpu| gpu.time_cold(samples, work)).transpose()
    }

    /// What runs the operators of this device.
    pub fn kind(&self) -> DeviceKind {
        self.0.kind
    }

    /// Fills fresh f32 buffers with NaN, so that a value that is read before it is written shows. For tests.
    pub fn set_poison(&self, on: bool) {
        self.0.poison.store(on, Ordering::Relaxed);
    }

    /// An f32 tensor with unspecified values.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn empty(&self, shape: &[usize]) -> Result<Tensor> {
        self.tensor(shape, DType::F32)
    }

    /// An i32 tensor with unspecified values.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn empty_i32(&self, shape: &[usize]) -> Result<Tensor> {
        self.tensor(shape, DType::I32)
    }

    /// A tensor of a given dtype with unspecified values.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn empty_of(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.tensor(shape, dtype)
    }

    fn tensor(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let shape = Shape::new(shape)?;
        Ok(Tensor::new(shape, dtype, self.buffer(shape, dtype)?))
    }

    pub(crate) fn buffer(&self, shape: Shape, dtype: DType) -> Result<Arc<Buffer>> {
        let bytes = shape.len() * dtype.size();
        let lines = bytes.div_ceil(64);
        let mut free = self.0.lock();
        let recycled = free.get_mut(&lines).and_then(Vec::pop);
        if recycled.is_some() {
            self.0.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        drop(free);
        let mut buffer = match recycled {
            Some(Recycled(buffer)) => buffer,
            None => self.allocate(lines, bytes)?,
        };
        if self.0.poison.load(Ordering::Relaxed)
            && let Some(buffer) = Arc::get_mut(&mut buffer)
        {
            match (&buffer.storage, &self.0.gpu) {
                // All bits set is a NaN in every float type.
                (Storage::Gpu(memory), Some(gpu)) => gpu.fill(memory.address(), 0xff, memory.bytes())?,
                _ => buffer.floats_mut().unwrap_or_default().fill(f32::NAN),
            }
        }
        let live = self.0.live.fetch_add(lines * 64, Ordering::Relaxed) + lines * 64;
        self.0.peak.fetch_max(live, Ordering::Relaxed);
        Ok(buffer)
    }

    fn allocate(&self, lines: usize, bytes: usize) -> Result<Arc<Buffer>> {
        if self.is_dry() {
            let storage = Storage::Dry(lines * 16, OnceLock::new());
            return Ok(Arc::new(Buffer { storage, device: self.clone() }));
        }
        if let Some(gpu) = &self.0.gpu {
            // Where buffers are reused, they are as long as their class; else exact, so that a step outside shows.
            let bytes = if gpu.recycles() { lines * 64 } else { bytes };
            let storage = Storage::Gpu(Memory::new(Arc::clone(gpu), bytes)?);
            return Ok(Arc::new(Buffer { storage, device: self.clone() }));
        }
        let held = if lines * 64 < LARGE {
            bytemuck::allocation::try_zeroed_vec(lines).map(Storage::Lines)
        } else {
            Pages::zeroed(lines * 64).map(Storage::Pages).map_err(drop)
        };
        let storage = held.map_err(|()| {
            Error::failure(format!("{} memory", self.0.kind), "out of memory")
                .is(format!("{} bytes requested, {} in use", lines * 64, self.memory().live))
                .must("free memory")
                .fix("use a smaller batch, --dtype bf16, or activation checkpointing")
        })?;
        Ok(Arc::new(Buffer { storage, device: self.clone() }))
    }

    /// Bytes that the device holds now: tensors alive and buffers in the pool.
    pub fn held(&self) -> usize {
        let memory = self.memory();
        memory.live + memory.pooled
    }

    /// Live, peak and pooled bytes.
    pub fn memory(&self) -> MemoryStats {
        let pooled = self.0.lock().iter().map(|(lines, list)| lines * 64 * list.len()).sum();
        MemoryStats { live: self.0.live.load(Ordering::Relaxed), peak: self.0.peak.load(Ordering::Relaxed), pooled }
    }

    /// Starts a new peak measurement at the current live bytes.
    pub fn reset_peak(&self) {
        self.0.peak.store(self.0.live.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Frees the pooled buffers.
    pub fn trim(&self) {
        self.0.empty();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever goes last, the device or a tensor, the pool goes too.
    #[test]
    fn a_pool_without_handles_is_freed() {
        for device_first in [true, false] {
            let device = Device::cpu();
            let pool = Arc::downgrade(&device.0);
            drop((device.empty(&[100]).unwrap(), device.empty(&[5000]).unwrap()));
            let (kept, clone) = (device.empty(&[100]).unwrap(), device.clone());
            assert!(device.memory().pooled >= 20_000 && pool.strong_count() > 0);
            drop(clone);
            assert!(device.memory().pooled >= 20_000, "a handle of several emptied the pool");
            if device_first {
                drop(device);
                drop(kept);
            } else {
                drop(kept);
                drop(device);
            }
            assert_eq!(pool.strong_count(), 0, "device first: {device_first}");
        }
    }
}
