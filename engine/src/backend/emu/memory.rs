//! Memory of the emulated GPU: allocations of the exact size with guard bytes before and behind.

use crate::error::{Error, Result};
use std::collections::BTreeMap;

const GUARD: usize = 256;
/// What fresh memory holds.
const FRESH: u8 = 0xa5;

/// Guard byte `at` of the allocation at `address`. They differ from place to place: a kernel that copies what lies behind
/// one tensor behind another must not leave it as it was.
fn guard_byte(address: u64, at: usize) -> u8 {
    ((address >> 8).wrapping_add(at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// 256 bytes, so that a vector of them is aligned as device memory is.
#[derive(Clone, Copy)]
#[repr(C, align(256))]
struct Line([u8; 256]);

/// Live allocations by their address.
#[derive(Default)]
pub(super) struct Memory {
    live: BTreeMap<u64, Allocation>,
}

struct Allocation {
    lines: Vec<Line>,
    bytes: usize,
}

impl Allocation {
    fn all(&self) -> &[u8] {
        self.lines.as_slice().as_flattened_bytes()
    }

    fn all_mut(&mut self) -> &mut [u8] {
        self.lines.as_mut_slice().as_flattened_bytes_mut()
    }

    /// Where its guard bytes lie in all of its bytes.
    fn guards(&self) -> impl Iterator<Item = usize> + use<> {
        (0..GUARD).chain(GUARD + self.bytes..size_of::<Line>() * self.lines.len())
    }
}

/// Lines as the bytes that they are.
trait Flat {
    fn as_flattened_bytes(&self) -> &[u8];
    fn as_flattened_bytes_mut(&mut self) -> &mut [u8];
}

impl Flat for [Line] {
    fn as_flattened_bytes(&self) -> &[u8] {
        // SAFETY: a line is 256 bytes without padding, and the length is that of the slice.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(self.as_ptr().cast(), size_of_val(self))
        }
    }
    fn as_flattened_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and every byte pattern is a valid line.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts_mut(self.as_mut_ptr().cast(), size_of_val(self))
        }
    }
}

impl Memory {
    /// `bytes` bytes of unspecified values.
    pub(super) fn allocate(&mut self, bytes: usize) -> Result<u64> {
        let count = (bytes + 2 * GUARD).div_ceil(size_of::<Line>());
        let mut lines = Vec::new();
        lines.try_reserve_exact(count).map_err(|_| {
            Error::failure("emu memory", "out of memory").is(format!("{bytes} bytes requested")).must("free memory")
        })?;
        lines.resize(count, Line([FRESH; 256]));
        let address = lines.as_ptr() as u64 + GUARD as u64;
        let mut allocation = Allocation { lines, bytes };
        for at in allocation.guards() {
            allocation.all_mut()[at] = guard_byte(address, at);
        }
        self.live.insert(address, allocation);
        Ok(address)
    }

    pub(super) fn free(&mut self, address: u64) {
        self.live.remove(&address);
    }

    /// The allocation that holds `len` bytes at `address`, and where in it they begin.
    fn find(&self, address: u64, len: usize) -> Result<(u64, usize)> {
        let found = self.live.range(..=address).next_back();
        let inside = found.and_then(|(start, allocation)| {
            let offset = usize::try_from(address - start).ok()?;
            (offset.checked_add(len)? <= allocation.bytes).then_some((*start, offset + GUARD))
        });
        inside.ok_or_else(|| {
            Error::failure("emu memory", format!("{len} bytes at {address:#x} are not in a live allocation"))
        })
    }

    pub(super) fn bytes(&self, address: u64, len: usize) -> Result<&[u8]> {
        let (start, offset) = self.find(address, len)?;
        Ok(&self.live[&start].all()[offset..][..len])
    }

    pub(super) fn bytes_mut(&mut self, address: u64, len: usize) -> Result<&mut [u8]> {
        let (start, offset) = self.find(address, len)?;
        match self.live.get_mut(&start) {
            Some(allocation) => Ok(&mut allocation.all_mut()[offset..][..len]),
            None => Ok(&mut []),
        }
    }

    /// Whether the bytes around the allocation at `address` are as they were.
    pub(super) fn intact(&self, address: u64) -> bool {
        let Ok((start, _)) = self.find(address, 1) else { return false };
        let allocation = &self.live[&start];
        allocation.guards().all(|at| allocation.all()[at] == guard_byte(start, at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_outside_is_seen() {
        let mut memory = Memory::default();
        let address = memory.allocate(10).unwrap();
        assert_eq!(address % 256, 0);
        memory.bytes_mut(address, 10).unwrap().fill(7);
        assert!(memory.intact(address));
        assert!(memory.bytes(address, 11).is_err() && memory.bytes(address + 9, 1).is_ok());
        let other = memory.allocate(10).unwrap();
        let behind = memory.live[&other].all()[GUARD + 10..][..8].to_vec();
        memory.live.get_mut(&address).unwrap().all_mut()[GUARD + 10..][..8].copy_from_slice(&behind);
        assert!(!memory.intact(address) && memory.intact(other));
        memory.free(address);
        assert!(memory.bytes(address, 1).is_err());
    }
}
