//! Work on all processors.

use std::sync::atomic::{AtomicUsize, Ordering};

/// `work` on every item by as many threads as there are processors; results in the order of the items.
pub fn in_parallel<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut done: Vec<(usize, R)> = std::thread::scope(|scope| {
        let take = || {
            let mut done = Vec::new();
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                match items.get(i) {
                    Some(item) => done.push((i, work(item))),
                    None => return done,
                }
            }
        };
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(take)).collect();
        // A thread that dies leaves results out, which the caller's zip would hide: it dies, too.
        running.into_iter().flat_map(|t| t.join().unwrap_or_else(|e| std::panic::resume_unwind(e))).collect()
    });
    done.sort_by_key(|(i, _)| *i);
    done.into_iter().map(|(_, r)| r).collect()
}
