//! Transfers through page-locked host memory: the device copies from and to it while the host goes on.

use super::driver::{Handle, refused};
use crate::error::Result;
use cudarc::driver::{DriverError, result, sys};
use std::ffi::c_void;

/// Bytes of a slot.
const SLOT: usize = 1 << 20;

/// Slots: one is filled while others are on their way.
const SLOTS: usize = 4;

/// A page-locked buffer and the event behind the last copy from or to it.
struct Slot {
    memory: Handle<c_void>,
    event: Handle<sys::CUevent_st>,
    busy: bool,
}

/// The slots, made at the first transfer.
pub(super) struct Staging {
    label: String,
    stream: Handle<sys::CUstream_st>,
    slots: Vec<Slot>,
    next: usize,
}

impl Staging {
    pub fn new(label: &str, stream: Handle<sys::CUstream_st>) -> Staging {
        Staging { label: label.to_string(), stream, slots: Vec::new(), next: 0 }
    }

    /// Copies to the device; the host's bytes may change when it returns.
    pub fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<()> {
        self.prepare()?;
        let mut address = to;
        for part in bytes.chunks(SLOT) {
            self.send(address, part).map_err(|e| refused(e, &self.label, "cannot copy to the device"))?;
            address += part.len() as u64;
        }
        Ok(())
    }

    fn send(&mut self, to: u64, part: &[u8]) -> std::result::Result<(), DriverError> {
        let slot = self.next;
        self.next = (slot + 1) % SLOTS;
        self.wait(slot)?;
        let Slot { memory, event, .. } = self.slots[slot];
        // SAFETY: the slot has SLOT bytes, the part no more, and no copy uses it: `wait` has seen its event. The
        // device's bytes lie inside a block (the caller has checked). The slot is not touched before its event.
        #[allow(unsafe_code)]
        unsafe {
            std::ptr::copy_nonoverlapping(part.as_ptr(), memory.0.cast::<u8>(), part.len());
            sys::cuMemcpyHtoDAsync_v2(to, memory.0, part.len(), self.stream.0).result()?;
            result::event::record(event.0, self.stream.0)?;
        }
        self.slots[slot].busy = true;
        Ok(())
    }

    /// Copies to the host, after everything that the stream was given before.
    pub fn download(&mut self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.prepare()?;
        let mut address = from;
        for wave in bytes.chunks_mut(SLOT * SLOTS) {
            self.fetch(address, wave).map_err(|e| refused(e, &self.label, "cannot copy to the host"))?;
            address += wave.len() as u64;
        }
        Ok(())
    }

    /// One part a slot: all are on their way before the first is waited for.
    fn fetch(&mut self, from: u64, wave: &mut [u8]) -> std::result::Result<(), DriverError> {
        for (slot, part) in wave.chunks(SLOT).enumerate() {
            self.wait(slot)?;
            let Slot { memory, event, .. } = self.slots[slot];
            // SAFETY: as in `send`, in the other direction.
            #[allow(unsafe_code)]
            unsafe {
                sys::cuMemcpyDtoHAsync_v2(memory.0, from + (slot * SLOT) as u64, part.len(), self.stream.0).result()?;
                result::event::record(event.0, self.stream.0)?;
            }
            self.slots[slot].busy = true;
        }
        for (slot, part) in wave.chunks_mut(SLOT).enumerate() {
            self.wait(slot)?;
            // SAFETY: the copy into the slot is complete, and it wrote as many bytes as the part has.
            #[allow(unsafe_code)]
            unsafe {
                std::ptr::copy_nonoverlapping(self.slots[slot].memory.0.cast::<u8>(), part.as_mut_ptr(), part.len());
            }
        }
        Ok(())
    }

    fn wait(&mut self, slot: usize) -> std::result::Result<(), DriverError> {
        if std::mem::take(&mut self.slots[slot].busy) {
            // SAFETY: the event was recorded.
            #[allow(unsafe_code)]
            unsafe {
                result::event::synchronize(self.slots[slot].event.0)?;
            }
        }
        Ok(())
    }

    fn prepare(&mut self) -> Result<()> {
        while self.slots.len() < SLOTS {
            // SAFETY: freed in `release` and nowhere else.
            #[allow(unsafe_code)]
            let memory = unsafe { result::malloc_host(SLOT, 0) }
                .map_err(|e| refused(e, &self.label, "cannot lock host memory for transfers"))?;
            let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(|e| {
                // SAFETY: just made, used by nobody.
                #[allow(unsafe_code)]
                let _ = unsafe { result::free_host(memory) };
                refused(e, &self.label, "cannot make an event")
            })?;
            self.slots.push(Slot { memory: Handle(memory), event: Handle(event), busy: false });
        }
        Ok(())
    }

    /// Gives everything back; the stream is idle.
    pub fn release(&mut self) {
        for slot in self.slots.drain(..) {
            // SAFETY: made in `prepare`, and the stream that used them is idle. Best effort, as everywhere at the end.
            #[allow(unsafe_code)]
            unsafe {
                let _ = result::event::destroy(slot.event.0);
                let _ = result::free_host(slot.memory.0);
            }
        }
    }
}
