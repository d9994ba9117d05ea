//! The host processor: threads and instruction sets.

use super::apart;
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

/// Starts `count` operator threads; call it before the first operator, in the thread that will call operators.
///
/// The caller becomes one of them, so that an operator begins in it at once: handing the work to another thread and
/// being woken when it is done takes some 15 µs a call. One thread alone is not the caller: where that waits for others,
/// nobody would run the operators that they call.
///
/// # Errors
/// When the thread pool was already started with another count.
pub fn set_threads(count: usize) -> Result<()> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(count);
    let pool = if count > 1 { pool.use_current_thread().start_handler(|_| apart::joins()) } else { pool };
    match pool.build_global().inspect(|()| apart::begin(count)) {
        Err(_) if threads() == count => Ok(()),
        Err(e) => Err(Error::usage("--threads", format!("cannot start the thread pool: {e}"))
            .is(count)
            .must(format!("{}, as set before", threads()))),
        Ok(()) => Ok(()),
    }
}

/// As many threads as this process may use processors.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

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
