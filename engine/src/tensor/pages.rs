//! Memory on large pages, for buffers that no cache holds: a pass over 128 MiB on small ones waits a third of its time for
//! translations of addresses.

use memmap2::MmapMut;
use std::io;

/// Bytes from which a buffer is a mapping of its own. What a cache may hold is better off on small pages: on large ones all
/// tensors begin in the same sets.
pub(super) const LARGE: usize = 32 << 20;

/// A mapping of no file, from the start of a page, zeros at first.
pub(super) struct Pages(MmapMut);

impl Pages {
    /// `bytes` bytes, on large pages where the system has them.
    ///
    /// # Errors
    /// When memory runs out.
    pub(super) fn zeroed(bytes: usize) -> io::Result<Pages> {
        let pages = MmapMut::map_anon(bytes)?;
        // A wish: where it is not granted the pages are small ones.
        #[cfg(target_os = "linux")]
        let _ = pages.advise(memmap2::Advice::HugePage);
        Ok(Pages(pages))
    }

    /// All of it as numbers; its length is a multiple of 64 bytes.
    pub(super) fn floats(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }

    /// As [`Pages::floats`].
    pub(super) fn floats_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Device;

    #[test]
    fn a_large_tensor_is_zero_at_first_and_holds_what_is_written() {
        let mut pages = Pages::zeroed(LARGE).unwrap();
        assert_eq!(pages.floats().len(), LARGE / 4);
        assert!(pages.floats().iter().all(|v| *v == 0.0));
        pages.floats_mut()[LARGE / 4 - 1] = 2.5;
        assert_eq!(pages.floats().last(), Some(&2.5));
        let device = Device::cpu();
        let mut large = device.empty(&[LARGE / 4 + 1]).unwrap();
        large.f32s_mut().unwrap().fill(0.5);
        assert!(large.f32s().unwrap().iter().all(|v| *v == 0.5));
    }
}
