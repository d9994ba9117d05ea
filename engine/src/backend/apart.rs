//! Keeps the operator threads off the processor of the thread that calls operators.
//!
//! A system may wake the threads of a process that was idle on one processor and spread them only after many
//! milliseconds; an operator shorter than that takes twice its time. So the others may run everywhere but where the caller
//! does. Only they are bound: a thread or a program that the caller starts inherits nothing.

/// How the others are kept apart where the system lets one choose.
#[cfg(target_os = "linux")]
mod system {
    use rustix::thread::{CpuSet, Pid, gettid, sched_getaffinity, sched_getcpu, sched_setaffinity};
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::sync::{Mutex, PoisonError};

    /// The operator threads but for the caller, and where this process may run.
    static OTHERS: Mutex<(Vec<Pid>, Option<CpuSet>)> = Mutex::new((Vec::new(), None));
    /// The processor that the others are kept off; [`NONE`] at first, [`OFF`] where they are left alone.
    static CALLER: AtomicUsize = AtomicUsize::new(OFF);
    const NONE: usize = usize::MAX;
    const OFF: usize = usize::MAX - 1;

    pub fn joins() {
        OTHERS.lock().unwrap_or_else(PoisonError::into_inner).0.push(gettid());
        // The caller may have begun without this thread.
        let _ = CALLER.fetch_update(Relaxed, Relaxed, |now| (now != OFF).then_some(NONE));
    }

    pub fn begin(threads: usize) {
        let allowed = sched_getaffinity(None).ok().filter(|set| set.count() as usize >= threads.max(2));
        CALLER.store(if threads > 1 && allowed.is_some() { NONE } else { OFF }, Relaxed);
        OTHERS.lock().unwrap_or_else(PoisonError::into_inner).1 = allowed;
    }

    pub fn keep() {
        let before = CALLER.load(Relaxed);
        if before == OFF || rayon::current_thread_index() != Some(0) {
            return;
        }
        let here = sched_getcpu();
        if here == before {
            return;
        }
        CALLER.store(here, Relaxed);
        let others = OTHERS.lock().unwrap_or_else(PoisonError::into_inner);
        let (threads, Some(mut free)) = (&others.0, others.1) else { return };
        free.unset(here);
        for thread in threads {
            // Refused, a thread stays where it may run: slower, not wrong.
            let _ = sched_setaffinity(Some(*thread), &free);
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    pub fn joins() {}
    pub fn begin(_threads: usize) {}
    pub fn keep() {}
}

/// Told by every operator thread but the caller when it starts.
pub(super) fn joins() {
    system::joins();
}

/// From now on [`keep`] works, where there are processors for so many threads.
pub(super) fn begin(threads: usize) {
    system::begin(threads);
}

/// Told before an operator; takes some 20 ns while the caller stays where it is.
pub(crate) fn keep() {
    system::keep();
}

#[cfg(test)]
mod tests {
    #[cfg(target_os = "linux")]
    use rustix::thread::{sched_getaffinity, sched_getcpu};

    /// In a process of its own, because a thread pool is one for all: the test names itself.
    #[test]
    #[cfg(target_os = "linux")]
    fn the_other_thread_is_kept_off_the_callers_processor() {
        if std::env::var_os("GRAFT_APART").is_none() {
            let name = "backend::apart::tests::the_other_thread_is_kept_off_the_callers_processor";
            let program = std::env::current_exe().unwrap();
            let mut command = std::process::Command::new(program);
            let out = command.args([name, "--exact", "--test-threads=1"]).env("GRAFT_APART", "1").output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
            return;
        }
        if crate::backend::cpu::processors() < 2 {
            return;
        }
        crate::backend::cpu::set_threads(2).unwrap();
        let before = sched_getaffinity(None).unwrap();
        super::keep();
        let here = sched_getcpu();
        let of_others = rayon::broadcast(|at| (at.index(), sched_getaffinity(None).unwrap()));
        for (index, set) in of_others {
            // The caller may have moved since; what it may do is as before.
            assert_eq!(set.count(), before.count() - u32::from(index > 0), "thread {index}");
            assert!(index == 0 || !set.is_set(here) || sched_getcpu() != here, "thread {index}");
        }
    }
}
