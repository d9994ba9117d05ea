//! Correct kernels under many schedules: nothing is reported, and the result is right every time.

use super::{Row, faults};
use graft_kernels::emu::Build;

const KERNELS: [&str; 5] = ["rows", "pipeline", "gemm", "cluster", "grids"];

/// `soak`: more seeds.
pub fn rows(soak: bool) -> Vec<Row> {
    let seeds = move |build| match (build, soak) {
        (Build::Plain, false) => 10,
        (Build::Plain, true) => 100,
        (_, false) => 1,
        (_, true) => 8,
    };
    let row = |kernel: &'static str, build: Build| {
        let n = seeds(build);
        Row::new(format!("clean {kernel}, {n} seeds"), faults::SOURCE, build, move |p| {
            (0..n).try_for_each(|seed| faults::clean(p, kernel, seed))
        })
    };
    Build::ALL.into_iter().flat_map(|b| KERNELS.map(|k| row(k, b))).collect()
}
