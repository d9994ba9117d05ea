//! Criterion benches: every operator at the shapes of real models, both passes, and whole models.
//!
//! The rows follow from the contracts: adding a `real` case to an `op.toml` adds its bench. `GRAFT_BENCH_GFLOP` is the
//! largest case that runs, in GFLOP of one forward call (default 20: the 2048² shapes belong to a GPU).

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use graft_benches::models::{CASES, Prepared};
use graft_engine::autograd::Precision;
use graft_engine::backend::Device;
use graft_engine::error::{Error, Result};
use graft_engine::ops::check::{CaseRow, time_cases};
use graft_kernels::Tier;
use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

fn run() -> Result<()> {
    let limit = match std::env::var("GRAFT_BENCH_GFLOP") {
        Ok(text) => text.parse().map_err(|_| Error::usage("GRAFT_BENCH_GFLOP", "not a number").is(&text))?,
        Err(_) => 20.0,
    };
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    operators(&mut criterion, limit)?;
    models(&mut criterion, limit)?;
    criterion.final_summary();
    Ok(())
}

/// Every real case of every operator, forward and backward.
fn operators(criterion: &mut Criterion, limit: f64) -> Result<()> {
    // Criterion's own filter comes after the inputs are drawn, which takes seconds for the large shapes.
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let choose = |row: &CaseRow| {
        let ids = ["forward", "backward"].map(|pass| format!("{}/{pass}/{}", row.info.name, row.name));
        row.flops as f64 <= limit * 1e9 && ids.iter().any(|id| id.contains(&filter))
    };
    time_cases(&Device::cpu(), Tier::Real, &choose, &mut |row, pass, call| {
        let mut group = criterion.benchmark_group(row.info.name);
        group.sampling_mode(SamplingMode::Flat);
        if pass == "forward" {
            group.throughput(if row.flops > 0 {
                Throughput::Elements(row.flops as u64)
            } else {
                Throughput::Bytes(row.bytes as u64)
            });
        }
        let mut outcome = Ok(());
        group.bench_function(BenchmarkId::new(pass, row.name), |b| b.iter(|| outcome = call()));
        group.finish();
        outcome
    })
}

/// The whole models of the paired runs, here without a peer.
fn models(criterion: &mut Criterion, limit: f64) -> Result<()> {
    let mut group = criterion.benchmark_group("models");
    group.sampling_mode(SamplingMode::Flat);
    // The large models take seconds a pass: only where large cases are asked for.
    for case in CASES.into_iter().filter(|c| c.targets[0].is_none() || limit > 200.0) {
        for (name, precision) in [("f32", Precision::F32), ("bf16", Precision::Bf16)] {
            let (mut prepared, mut outcome) = (None, Ok(()));
            group.bench_function(BenchmarkId::new(case.name, name), |b| {
                b.iter(|| {
                    outcome =
                        prepare_once(&mut prepared, || Prepared::new(case, precision)).and_then(|p| p.run().map(drop))
                });
            });
            outcome?;
        }
    }
    group.finish();
    Ok(())
}

/// Built by the first, warming call, so that a filter on the command line skips it.
fn prepare_once<T>(slot: &mut Option<T>, build: impl FnOnce() -> Result<T>) -> Result<&mut T> {
    let value = match slot.take() {
        Some(value) => value,
        None => build()?,
    };
    Ok(slot.insert(value))
}
