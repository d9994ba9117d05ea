//! Device memory: segments from the driver, blocks out of them, and the error when there is no more.

use super::arena::{Arena, ArenaStats, whole};
use super::driver::{check, refused};
use crate::error::{Error, Result};
use crate::tensor::MemoryPlan;
use cudarc::driver::result;
use cudarc::driver::sys::CUresult;

/// Segments are multiples of this: the driver's own pages.
const PAGE: usize = 2 << 20;

/// A segment that grows on demand is at least so large, so that small tensors share one.
const GROWTH: usize = 32 << 20;

/// The memory of one device.
pub(super) struct Memory {
    /// Name of the device in errors.
    label: String,
    /// Bytes of the device.
    total: u64,
    arena: Arena,
    planned: Option<MemoryPlan>,
    /// What is being done, in errors.
    pub phase: String,
}

impl Memory {
    pub fn new(label: &str, total: u64) -> Memory {
        let phase = "unnamed work".to_string();
        Memory { label: label.to_string(), total, arena: Arena::default(), planned: None, phase }
    }

    /// Takes the planned peak from the driver at once, where the arena has it not yet.
    ///
    /// # Errors
    /// When the device has not so much: before any work.
    pub fn reserve(&mut self, plan: &MemoryPlan) -> Result<()> {
        self.planned = Some(plan.clone());
        // Each part may end inside a grain.
        let wanted = plan.total().checked_add(plan.parts.len() * super::arena::GRAIN).and_then(whole);
        let wanted = wanted.ok_or_else(|| self.exhausted(plan.total()))?;
        if self.arena.stats().largest_free < wanted && !self.grow(wanted, wanted)? {
            return Err(self.exhausted(plan.total()));
        }
        Ok(())
    }

    /// A block of at least `bytes`.
    ///
    /// # Errors
    /// [`Memory::exhausted`].
    pub fn allocate(&mut self, bytes: usize) -> Result<u64> {
        // A size that the device cannot have, or that is no number of bytes, is not the driver's business.
        let size = whole(bytes).filter(|s| *s as u64 <= self.total).ok_or_else(|| self.exhausted(bytes))?;
        loop {
            if let Some(address) = self.arena.take(size) {
                return Ok(address);
            }
            if !self.grow(size.max(GROWTH), size)? {
                return Err(self.exhausted(bytes));
            }
        }
    }

    /// Takes a segment of `best` bytes, or of `least`; idle segments are given up for it. False without success.
    fn grow(&mut self, best: usize, least: usize) -> Result<bool> {
        for attempt in 0..2 {
            for bytes in [best, least] {
                let bytes = bytes.next_multiple_of(PAGE);
                // SAFETY: the context is current; the memory is freed in `release` or `idle`, and by nobody else.
                #[allow(unsafe_code)]
                match unsafe { result::malloc_sync(bytes) } {
                    Ok(address) => {
                        self.arena.add(address, bytes);
                        return Ok(true);
                    }
                    Err(e) if e.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY => {}
                    Err(e) => return Err(refused(e, &self.label, "cannot allocate")),
                }
            }
            if attempt == 0 && !self.release_idle()? {
                break;
            }
        }
        Ok(false)
    }

    /// Gives the segments back of which nothing is in use; says whether there was one.
    fn release_idle(&mut self) -> Result<bool> {
        let idle = self.arena.idle();
        for address in &idle {
            // SAFETY: the segment came from `malloc_sync` and the arena has forgotten it. The driver waits for work
            // that may still use it.
            #[allow(unsafe_code)]
            unsafe { result::free_sync(*address) }.map_err(|e| refused(e, &self.label, "cannot free memory"))?;
        }
        Ok(!idle.is_empty())
    }

    /// Takes a block back. False where it is none.
    pub fn free(&mut self, address: u64) -> bool {
        self.arena.give(address)
    }

    /// Takes the blocks of a graph back.
    pub fn free_all(&mut self, addresses: &[u64]) {
        for address in addresses {
            self.arena.give(*address);
        }
    }

    /// Checks that bytes lie inside a block before they are touched.
    ///
    /// # Errors
    /// Says what was to be done and where.
    pub fn inside(&self, address: u64, bytes: usize, doing: &str) -> Result<()> {
        if bytes == 0 || self.arena.holds(address, bytes) {
            return Ok(());
        }
        Err(Error::failure(&self.label, format!("{doing} outside of allocated memory"))
            .is(format!("{bytes} bytes at {address:#x}"))
            .must("inside one allocation that was not freed"))
    }

    /// The counts of the arena.
    pub fn stats(&self) -> ArenaStats {
        self.arena.stats()
    }

    /// Gives everything back.
    pub fn release(&mut self) {
        for address in self.arena.segments() {
            // SAFETY: as in `release_idle`; this runs when nobody can name a block any more.
            #[allow(unsafe_code)]
            // Best effort: after a failed kernel the driver refuses everything.
            let _ = unsafe { result::free_sync(address) };
        }
        self.arena = Arena::default();
    }

    /// The error of a request that cannot be met: what was asked for, what there is, and what to change.
    fn exhausted(&self, bytes: usize) -> Error {
        let mib = |bytes: usize| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        let stats = self.arena.stats();
        // Only for the message.
        let free = result::mem_get_info().map_or("an unknown part".to_string(), |(free, _)| mib(free));
        let plan = self.planned.as_ref().map_or("none".to_string(), ToString::to_string);
        Error::failure(&self.label, "out of device memory")
            .is(format!(
                "{} requested in {}; the driver has {free} free of {:.1} MiB; this process holds {}, {} of it in use; \
                 planned peak {plan}",
                mib(bytes),
                self.phase,
                self.total as f64 / f64::from(1 << 20),
                mib(stats.reserved),
                mib(stats.used),
            ))
            .must("within the device's free memory")
            .fix(
                "use a smaller batch or size, --dtype bf16 or activation checkpointing, end other programs on this \
                 device (nvidia-smi), or choose a larger one with CUDA_VISIBLE_DEVICES",
            )
    }
}

/// Bytes free and in all, of the device whose context is current.
///
/// # Errors
/// Those of the driver.
pub(super) fn free_and_total(place: &str) -> Result<(usize, usize)> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: both pointers are to live numbers.
    #[allow(unsafe_code)]
    check(unsafe { cudarc::driver::sys::cuMemGetInfo_v2(&mut free, &mut total) }, place, "cannot ask for memory")?;
    Ok((free, total))
}
