//! What a device with memory of its own must do: hold bytes, move them, and run kernels in order.
//!
//! `backend::emu` and `backend::cuda` are such devices. Everything is put in one queue and runs in the order of the
//! calls; [`Gpu::download`] and [`Gpu::synchronize`] wait for what was put in before.

use super::{DType, Device, Tensor};
use crate::error::{Error, Result};
use graft_kernels::launch::{Element, ElementType, Kernel, Launch, Out, Properties, Queue};
use std::sync::Arc;

/// A device with memory of its own and a queue of kernels.
pub trait Gpu: Send + Sync {
    /// What it is.
    fn properties(&self) -> &Properties;

    /// Whether freed buffers may serve again for other tensors of their size; `false` where every tensor is to be an
    /// allocation of its own, so that a step outside is found.
    fn recycles(&self) -> bool {
        true
    }

    /// Memory, aligned to 256 bytes; its values are unspecified.
    ///
    /// # Errors
    /// When there is not enough: says how much was asked for, what is free and what to change.
    fn allocate(&self, bytes: usize) -> Result<u64>;

    /// Gives back what [`Gpu::allocate`] gave, with the size asked for then.
    fn free(&self, address: u64, bytes: usize);

    /// Copies host bytes to the device; the host's may change when it returns.
    ///
    /// # Errors
    /// Those of the device.
    fn upload(&self, to: u64, bytes: &[u8]) -> Result<()>;

    /// Copies device bytes to the host, after all that was put in the queue before.
    ///
    /// # Errors
    /// Those of the device, and of the kernels before.
    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()>;

    /// Copies between places of the device.
    ///
    /// # Errors
    /// Those of the device.
    fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()>;

    /// Sets bytes.
    ///
    /// # Errors
    /// Those of the device.
    fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<()>;

    /// Puts a kernel in the queue.
    ///
    /// # Errors
    /// When the kernel cannot be had for this device, or its shape is refused.
    fn launch(&self, launch: &Launch<'_>) -> Result<()>;

    /// Milliseconds of one call of `work`, `samples` times, by the device's own clock and without the time that the
    /// host takes to launch. The launches of `work` must be the same every time.
    ///
    /// # Errors
    /// A device without a clock, and those of the work.
    fn time(&self, samples: usize, work: &mut dyn FnMut() -> Result<()>) -> Result<Vec<f64>> {
        let _ = (samples, work);
        Err(Error::failure(&self.properties().name, "has no clock"))
    }

    /// The same where every call finds caches that hold none of its data.
    ///
    /// # Errors
    /// As [`Gpu::time`].
    fn time_cold(&self, samples: usize, work: &mut dyn FnMut() -> Result<()>) -> Result<Vec<f64>> {
        let _ = (samples, work);
        Err(Error::failure(&self.properties().name, "has no clock"))
    }

    /// Waits for everything in the queue.
    ///
    /// # Errors
    /// Those of the kernels in it.
    fn synchronize(&self) -> Result<()>;
}

/// Memory of a device, given back when dropped.
pub(crate) struct Memory {
    gpu: Arc<dyn Gpu>,
    address: u64,
    bytes: usize,
}

impl Memory {
    /// Asks the device for `bytes`.
    pub(crate) fn new(gpu: Arc<dyn Gpu>, bytes: usize) -> Result<Memory> {
        let address = gpu.allocate(bytes)?;
        Ok(Memory { gpu, address, bytes })
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn gpu(&self) -> &dyn Gpu {
        self.gpu.as_ref()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.gpu.free(self.address, self.bytes);
    }
}

/// The queue of one operator call: launches go to the device, scratch memory lives until the call ends. (The queue is
/// in order, so the next call may have the same memory.)
pub(crate) struct Kernels<'d> {
    device: &'d Device,
    gpu: &'d dyn Gpu,
    scratch: Vec<Tensor>,
}

impl<'d> Kernels<'d> {
    pub(crate) fn new(device: &'d Device, gpu: &'d dyn Gpu) -> Self {
        Kernels { device, gpu, scratch: Vec::new() }
    }
}

impl Queue for Kernels<'_> {
    type Error = Error;

    fn properties(&self) -> &Properties {
        self.gpu.properties()
    }

    fn scratch<T: Element>(&mut self, elements: usize) -> Result<Out<T>> {
        let mut memory = self.device.empty_of(&[elements.max(1)], DType::from(T::TYPE))?;
        let address = memory.output()?;
        self.scratch.push(memory);
        Ok(address)
    }

    fn zero<T: Element>(&mut self, at: Out<T>, elements: usize) -> Result<()> {
        self.gpu.fill(at.address(), 0, elements * size_of::<T>())
    }

    fn launch(&mut self, launch: &Launch<'_>) -> Result<()> {
        let [x, y, z] = launch.shape.grid;
        if x == 0 || y == 0 || z == 0 || x > i32::MAX as usize || y > 65535 || z > 65535 {
            return Err(Error::failure(format!("{}: {}", launch.kernel.op, launch.kernel.name), "impossible grid")
                .is(format!("{x} × {y} × {z} blocks"))
                .must("at least 1, at most 2^31 - 1 × 65535 × 65535"));
        }
        self.gpu.launch(launch)
    }

    fn refuse(&self, kernel: &'static Kernel, argument: &'static str, value: usize) -> Error {
        Error::failure(format!("{}: {}", kernel.op, kernel.name), format!("{argument} is too large for a kernel"))
            .is(value)
            .must("below 2^31")
    }
}

impl From<ElementType> for DType {
    fn from(element: ElementType) -> DType {
        match element {
            ElementType::F32 => DType::F32,
            ElementType::Bf16 => DType::BF16,
        }
    }
}
