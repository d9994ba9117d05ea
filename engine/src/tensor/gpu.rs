//! What a device with memory of its own must do: hold bytes, move them, and run kernels in order.
//!
//! `backend::emu` and `backend::cuda` are such devices. Everything is put in one queue and runs in the order of the
//! calls; [`Gpu::download`] and [`Gpu::synchronize`] wait for what was put in before.

use crate::error::Result;
use graft_kernels::launch::{Launch, Properties};

/// A device with memory of its own and a queue of kernels.
pub trait Gpu: Send + Sync {
    /// What it is.
    fn properties(&self) -> &Properties;

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

    /// Waits for everything in the queue.
    ///
    /// # Errors
    /// Those of the kernels in it.
    fn synchronize(&self) -> Result<()>;
}
