//! The host processor: threads and instruction sets.

use crate::error::{Error, Result};
use graft_kernels::simd;
use rayon::prelude::*;

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

/// Starts `count` operator threads, at 0 as many as there are processors; call it before the first operator.
///
/// # Errors
/// When the thread pool was already started.
pub fn set_threads(count: usize) -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(count).start_handler(keep_to_a_processor);
    pool.build_global().map_err(|e| {
        Error::usage("--threads", format!("cannot start the thread pool: {e}")).is(count).must("set once, at start")
    })
}

/// Gives every operator thread a processor of its own where there are as many as the process may use. Threads that wake
/// together after a pause are otherwise put on one processor, and stay there for longer than a short operator takes.
/// Where that fails the thread runs anywhere.
#[cfg(target_os = "linux")]
fn keep_to_a_processor(index: usize) {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let Ok(allowed) = sched_getaffinity(None) else { return };
    if allowed.count() as usize != rayon::current_num_threads() {
        return;
    }
    let own = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).nth(index);
    if let Some(own) = own {
        let mut set = CpuSet::new();
        set.set(own);
        let _ = sched_setaffinity(None, &set);
    }
}

#[cfg(not(target_os = "linux"))]
fn keep_to_a_processor(_: usize) {}

/// `rounds` times e^(x − 1) of every value x in 0..=1, each thread on its own part. For measurements.
pub fn exponentials(values: &mut [f32], rounds: usize) {
    let part = values.len().div_ceil(threads()).max(1);
    values.par_chunks_mut(part).for_each(|part| {
        simd::vectorised(
            #[inline(always)]
            || {
                for _ in 0..rounds {
                    for v in part.iter_mut() {
                        // Of what softmax takes it of: never above 0, and it stays there.
                        *v = simd::exp_decay(*v - 1.0);
                    }
                }
            },
        );
    });
}

/// `rounds` copies of `from` to `to`, each thread its own part. For measurements.
pub fn copies(from: &[f32], to: &mut [f32], rounds: usize) {
    let part = from.len().div_ceil(threads()).max(1);
    from.par_chunks(part).zip(to.par_chunks_mut(part)).for_each(|(from, to)| {
        for _ in 0..rounds {
            // The compiler must not see that one copy would do.
            std::hint::black_box(&mut *to).copy_from_slice(std::hint::black_box(from));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_taken_and_copied() {
        let mut values: Vec<f32> = (0..1000).map(|i| i as f32 / 1000.0).collect();
        let want: Vec<f32> = values.iter().map(|v| ((v - 1.0).exp() - 1.0).exp()).collect();
        exponentials(&mut values, 2);
        assert!(values.iter().zip(&want).all(|(v, w)| (v - w).abs() < 1e-5 * w));
        let mut to = vec![0.0; 1000];
        copies(&values, &mut to, 3);
        assert_eq!(to, values);
    }
}
