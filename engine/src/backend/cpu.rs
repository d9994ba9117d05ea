//! The host processor: threads and instruction sets.

use crate::error::{Error, Result};

/// Instruction sets that the CPU paths choose from at run time, best first.
pub fn instruction_sets() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        let found = [
            ("avx512_bf16", is_x86_feature_detected!("avx512bf16")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx2+fma", is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")),
        ];
        found.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}

/// Threads that operators use.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Runs `work` on the operator threads, so that nested parallel loops never cross a thread boundary to start
/// (crossing allocates; the sampling loop must not).
pub fn on_workers<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    if rayon::current_thread_index().is_some() { work() } else { rayon::scope(|_| work()) }
}

/// Limits the operator threads; call it before the first operator.
///
/// # Errors
/// When the thread pool was already started with another count.
pub fn set_threads(count: usize) -> Result<()> {
    rayon::ThreadPoolBuilder::new().num_threads(count).build_global().map_err(|e| {
        Error::usage("--threads", format!("cannot start the thread pool: {e}")).is(count).must("set once, at start")
    })
}
