//! Where blocks lie in segments of device memory: bookkeeping alone, no memory is touched.
//!
//! The smallest free block that is large enough is taken, the lowest of equals; freed neighbours become one again.

use std::collections::{BTreeMap, BTreeSet};

/// Every block starts on such a boundary and has such a size.
pub(super) const GRAIN: usize = 256;

/// Counts of an arena.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArenaStats {
    /// Bytes of all segments.
    pub reserved: usize,
    /// Bytes in use now.
    pub used: usize,
    /// Largest value of `used`.
    pub peak: usize,
    /// Largest free block.
    pub largest_free: usize,
    /// Blocks handed out so far.
    pub served: usize,
    /// Segments taken from the driver so far.
    pub taken: usize,
}

/// Segments and the blocks in them.
#[derive(Debug, Default)]
pub(super) struct Arena {
    segments: BTreeMap<u64, usize>,
    used: BTreeMap<u64, usize>,
    free: BTreeMap<u64, usize>,
    by_size: BTreeSet<(usize, u64)>,
    stats: ArenaStats,
}

/// `bytes` in whole grains, at least one; none where that is no number.
pub(super) fn whole(bytes: usize) -> Option<usize> {
    bytes.max(1).checked_next_multiple_of(GRAIN)
}

impl Arena {
    /// Adds a segment, which starts on a grain.
    pub fn add(&mut self, start: u64, bytes: usize) {
        self.segments.insert(start, bytes);
        self.stats.reserved += bytes;
        self.stats.taken += 1;
        self.put_free(start, bytes);
    }

    /// A block of `bytes`, which are whole grains; none where no free one is large enough.
    pub fn take(&mut self, bytes: usize) -> Option<u64> {
        let (size, at) = self.by_size.range((bytes, 0)..).next().copied()?;
        self.take_free(at, size);
        if size > bytes {
            self.put_free(at + bytes as u64, size - bytes);
        }
        self.used.insert(at, bytes);
        self.stats.used += bytes;
        self.stats.served += 1;
        self.stats.peak = self.stats.peak.max(self.stats.used);
        Some(at)
    }

    /// Takes a block back; false where none starts there.
    pub fn give(&mut self, at: u64) -> bool {
        let Some(bytes) = self.used.remove(&at) else { return false };
        self.stats.used -= bytes;
        let (mut start, mut size) = (at, bytes);
        let segment = self.segment(at);
        // Neighbours in memory that come from different segments stay apart: a copy may not cross.
        if let Some((&after, &length)) = self.free.range(at + bytes as u64..).next()
            && after == at + bytes as u64
            && self.segment(after) == segment
        {
            self.take_free(after, length);
            size += length;
        }
        if let Some((&before, &length)) = self.free.range(..at).next_back()
            && before + length as u64 == at
            && self.segment(before) == segment
        {
            self.take_free(before, length);
            (start, size) = (before, size + length);
        }
        self.put_free(start, size);
        true
    }

    /// Removes the segments of which nothing is in use; gives their starts.
    pub fn idle(&mut self) -> Vec<u64> {
        let whole = |(at, size): &(&u64, &usize)| self.free.get(at) == Some(size);
        let idle: Vec<(u64, usize)> = self.segments.iter().filter(whole).map(|(at, size)| (*at, *size)).collect();
        for (at, size) in &idle {
            self.segments.remove(at);
            self.take_free(*at, *size);
            self.stats.reserved -= size;
        }
        idle.into_iter().map(|(at, _)| at).collect()
    }

    /// Whether `bytes` from `at` on lie in one block that is in use.
    pub fn holds(&self, at: u64, bytes: usize) -> bool {
        let block = self.used.range(..=at).next_back();
        block.is_some_and(|(start, size)| bytes <= *size && at - start <= (*size - bytes) as u64)
    }

    /// Starts of all segments.
    pub fn segments(&self) -> Vec<u64> {
        self.segments.keys().copied().collect()
    }

    /// The counts.
    pub fn stats(&self) -> ArenaStats {
        ArenaStats { largest_free: self.by_size.last().map_or(0, |(size, _)| *size), ..self.stats }
    }

    fn segment(&self, at: u64) -> Option<u64> {
        self.segments.range(..=at).next_back().map(|(start, _)| *start)
    }

    fn put_free(&mut self, at: u64, bytes: usize) {
        self.free.insert(at, bytes);
        self.by_size.insert((bytes, at));
    }

    fn take_free(&mut self, at: u64, bytes: usize) {
        self.free.remove(&at);
        self.by_size.remove(&(bytes, at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_that_fits_is_taken_and_neighbours_join() {
        let mut arena = Arena::default();
        arena.add(0x10000, 4096);
        let blocks: Vec<u64> = [1024, 256, 512, 256].map(|b| arena.take(b).unwrap()).to_vec();
        assert_eq!(blocks, [0x10000, 0x10400, 0x10500, 0x10700]);
        // Free: 1024 in front, 512 in the middle, 2048 at the end.
        assert!(arena.give(blocks[0]) && arena.give(blocks[2]));
        assert_eq!(arena.take(512), Some(blocks[2]));
        assert_eq!(arena.take(512), Some(blocks[0]));
        assert_eq!(arena.stats().largest_free, 2048);
        for at in [blocks[0], blocks[1], blocks[2], blocks[3]] {
            assert!(arena.give(at) && !arena.give(at));
        }
        let stats = arena.stats();
        assert_eq!((stats.used, stats.peak, stats.largest_free, stats.served), (0, 2048, 4096, 6));
        assert_eq!(arena.take(4096 + 256), None);
    }

    #[test]
    fn blocks_do_not_cross_segments_and_idle_ones_leave() {
        let mut arena = Arena::default();
        arena.add(0x1000, 1024);
        arena.add(0x1400, 1024);
        let (a, b) = (arena.take(1024).unwrap(), arena.take(1024).unwrap());
        assert!(arena.holds(a, 1024) && arena.holds(a + 1000, 24) && !arena.holds(a, 1025) && !arena.holds(0xfff, 1));
        arena.give(a);
        arena.give(b);
        assert_eq!(arena.take(2048), None);
        assert_eq!(arena.take(256), Some(0x1000));
        assert_eq!(arena.idle(), [0x1400]);
        assert_eq!((arena.stats().reserved, arena.segments()), (1024, vec![0x1000]));
    }

    #[test]
    fn sizes_are_whole_grains() {
        assert_eq!([0, 1, 256, 257].map(whole), [Some(256), Some(256), Some(256), Some(512)]);
        assert_eq!(whole(usize::MAX), None);
    }

    /// Thousands of random takes and gives: blocks never overlap, and everything joins again.
    #[test]
    fn random_use_keeps_blocks_apart() {
        let mut arena = Arena::default();
        arena.add(0x100000, 1 << 20);
        arena.add(0x900000, 1 << 18);
        let mut random = 12345u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 33) % below
        };
        let mut live: Vec<(u64, usize)> = Vec::new();
        for _ in 0..5000 {
            if live.len() > 40 || next(3) == 0 && !live.is_empty() {
                let (at, _) = live.swap_remove(next(live.len() as u64) as usize);
                assert!(arena.give(at));
            } else if let Some(bytes) = whole(next(60_000) as usize)
                && let Some(at) = arena.take(bytes)
            {
                assert!(live.iter().all(|(l, size)| at + bytes as u64 <= *l || l + *size as u64 <= at));
                live.push((at, bytes));
            }
            assert_eq!(arena.stats().used, live.iter().map(|(_, b)| b).sum::<usize>());
        }
        live.iter().for_each(|(at, _)| assert!(arena.give(*at)));
        assert_eq!(arena.stats().largest_free, 1 << 20);
        assert_eq!(arena.idle().len(), 2);
    }
}
