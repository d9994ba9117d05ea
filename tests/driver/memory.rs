//! Memory and transfers: the arena, planned peaks, running out, huge and wrong ranges.

use super::Row;
use super::child::{open, refused, text};
use super::lab::{Lab, same};
use graft_engine::tensor::{Gpu, MemoryPlan};

pub const ROWS: &[Row] = &[
    ("transfers of any size", |lab| lab.done("transfers", &[]).map(|_| ())),
    ("planned memory is taken once", planned),
    ("running out of memory", out_of_memory),
    ("wrong ranges and huge sizes", |lab| {
        let said = lab.done("ranges", &[])?;
        // Nothing that cannot be is asked of the driver.
        same("allocations", said.count("allocate"), 1)
    }),
];

pub const PARTS: &[super::child::Part] =
    &[("transfers", transfers), ("planned", planned_part), ("exhaust", exhaust), ("ranges", ranges)];

/// Sizes around the staging slots; the host's bytes change at once after an upload.
fn transfers() -> Result<(), String> {
    let gpu = open()?;
    for bytes in [0usize, 1, 255, 4096, (1 << 20) - 1, 1 << 20, (4 << 20) + 1, (11 << 20) + 17] {
        let pattern = |i: usize| (i as u8).wrapping_mul(31) ^ (i >> 11) as u8;
        let mut host: Vec<u8> = (0..bytes).map(pattern).collect();
        let (a, b) = (text(gpu.allocate(bytes))?, text(gpu.allocate(bytes))?);
        text(gpu.upload(a, &host))?;
        host.fill(0);
        text(gpu.copy(b, a, bytes))?;
        text(gpu.fill(a, 7, bytes))?;
        text(gpu.download(b, &mut host))?;
        if let Some(i) = (0..bytes).find(|i| host[*i] != pattern(*i)) {
            return Err(format!("{bytes} bytes: byte {i} is {}", host[i]));
        }
        text(gpu.download(a, &mut host))?;
        if host.iter().any(|v| *v != 7) {
            return Err(format!("{bytes} bytes: the fill is lost"));
        }
        gpu.free(a, bytes);
        gpu.free(b, bytes);
    }
    Ok(())
}

fn planned(lab: &Lab) -> Result<(), String> {
    let said = lab.done("planned", &[])?;
    same("allocations", said.count("allocate"), 1)?;
    same("segments given back", said.count("free"), 1)
}

fn planned_part() -> Result<(), String> {
    let gpu = open()?;
    let mut plan = MemoryPlan::default();
    plan.add("weights", 48 << 20);
    plan.add("activations", 16 << 20);
    text(gpu.reserve(&plan))?;
    // A second plan that fits needs nothing more.
    text(gpu.reserve(&plan))?;
    let weights = text(gpu.allocate(48 << 20))?;
    for step in 0..20 {
        let blocks = (1..8).map(|i| text(gpu.allocate((i + step % 3) * 300_000))).collect::<Result<Vec<_>, _>>()?;
        blocks.into_iter().rev().for_each(|b| gpu.free(b, 0));
    }
    let stats = text(gpu.memory())?;
    same("segments", stats.taken, 1)?;
    same("in use", stats.used, 48 << 20)?;
    gpu.free(weights, 48 << 20);
    Ok(())
}

fn out_of_memory(lab: &Lab) -> Result<(), String> {
    let said = lab.done("exhaust", &[("FAKE_MIB", "64")])?;
    // What was idle went back to the driver before the request was refused, and served it.
    if said.count("free") == 0 { Err("no idle segment was given back".to_string()) } else { Ok(()) }
}

fn exhaust() -> Result<(), String> {
    let gpu = open()?;
    text(gpu.set_phase("sampling at 512×512"))?;
    let mut plan = MemoryPlan::default();
    plan.add("weights", 200 << 20);
    let words = [
        "cuda:0 (Fake GPU): out of device memory",
        "200.0 MiB requested in sampling at 512×512",
        "64.0 MiB free of 64.0 MiB",
        "planned peak 200.0 MiB: 200.0 weights",
        "fix: use a smaller batch",
    ];
    refused(gpu.reserve(&plan), &words)?;
    // 40 MiB do not come beside 32 in use; idle segments make room.
    let first = text(gpu.allocate(20 << 20))?;
    refused(gpu.allocate(40 << 20), &["40.0 MiB requested", "32.0 MiB free", "holds 32.0 MiB, 20.0 MiB of it in use"])?;
    gpu.free(first, 20 << 20);
    let second = text(gpu.allocate(40 << 20))?;
    // Growth in large steps falls back to what is there.
    let third = text(gpu.allocate(23 << 20))?;
    refused(gpu.allocate(2 << 20), &["out of device memory"])?;
    text(gpu.fill(third, 1, 23 << 20))?;
    gpu.free(second, 40 << 20);
    gpu.free(third, 23 << 20);
    text(gpu.allocate(60 << 20)).map(|_| ())
}

fn ranges() -> Result<(), String> {
    let gpu = open()?;
    let block = text(gpu.allocate(1024))?;
    let mut bytes = [0; 64];
    refused(gpu.upload(block + 1000, &bytes), &["upload outside of allocated memory", "64 bytes at"])?;
    refused(gpu.download(block - 1, &mut bytes), &["download outside"])?;
    refused(gpu.copy(block, block + 1024, 1), &["copy outside"])?;
    refused(gpu.fill(block, 0, 1025), &["fill outside", "1025 bytes"])?;
    for huge in [1 << 40, usize::MAX - 300, usize::MAX] {
        refused(gpu.allocate(huge), &["out of device memory", "MiB requested"])?;
    }
    gpu.free(block, 1024);
    refused(gpu.upload(block, &bytes), &["upload outside"])?;
    // A second return is told and changes nothing.
    gpu.free(block, 1024);
    same("in use", text(gpu.memory())?.used, 0)
}
