//! Planted faults: each with the build that must see it and what must be said.

use super::Row;
use super::data::*;
use graft_kernels::emu::{Argument, Build, Case, Outcome, Program};
use half::bf16;

pub const SOURCE: &str = "tests/emulator/faults.cu";

/// How a fault shows.
#[derive(Clone, Copy)]
enum Shows {
    /// The run ends with a report that has these words.
    Report(&'static str),
    /// The run ends, with a wrong result, under some seed below 8.
    Wrong,
    /// As a wrong result or as any report, under some seed below 8.
    Any,
    /// The race checker reports it.
    Race,
}
use Build::{Asan, Plain, Tsan};
use Shows::{Any, Race, Report, Wrong};

/// Kernel, number of the fault, what it is, the build, what shows.
const FAULTS: &[(&str, u32, &str, Build, Shows)] = &[
    ("rows", 1, "no barrier before partial sums are read", Tsan, Race),
    ("rows", 1, "no barrier before partial sums are read", Plain, Wrong),
    ("rows", 2, "partial sums reused without a barrier", Tsan, Race),
    ("rows", 3, "a barrier that half of the block reaches", Plain, Report("deadlock [kernel fault_rows, block (")),
    ("rows", 4, "a full-mask shuffle in a divergent branch", Plain, Report("faults.cu:")),
    ("rows", 5, "a write past a shared array", Asan, Report("use-after-poison")),
    ("rows", 6, "a read past the last row", Asan, Report("heap-buffer-overflow")),
    ("rows", 7, "a write past the output", Plain, Report("memory beside buffer 1 was written")),
    ("rows", 7, "a write past the output", Asan, Report("heap-buffer-overflow")),
    ("rows", 8, "a lane that exits early", Plain, Report("for a lane that exits")),
    ("rows", 9, "a lane outside of its own mask", Plain, Report("the calling lane is not in its mask")),
    ("rows", 10, "no __syncwarp between lanes", Tsan, Race),
    ("rows", 11, "a shuffle from a lane outside of the mask", Plain, Report("reads lane 20, which is not in mask")),
    ("rows", 12, "a misaligned vector load", Plain, Report("is not aligned to 16 bytes")),
    ("rows", 13, "two barriers in branches of a warp", Plain, Report("part of a warp comes here")),
    ("rows", 14, "different counts at one barrier", Plain, Report("threads expected here")),
    ("pipeline", 1, "no barrier after the wait", Tsan, Race),
    ("pipeline", 1, "no barrier after the wait", Plain, Wrong),
    ("pipeline", 2, "a wait that is too lax", Plain, Wrong),
    ("pipeline", 2, "a wait that is too lax", Tsan, Race),
    ("pipeline", 3, "the next tile into the buffer in use", Plain, Wrong),
    ("pipeline", 4, "a copy not waited for", Plain, Report("exits with cp.async issued here")),
    ("pipeline", 5, "sums not cleared", Plain, Wrong),
    ("pipeline", 6, "a misaligned copy", Plain, Report("is not aligned to 16 bytes")),
    ("pipeline", 7, "a plain add for an atomic one", Tsan, Race),
    ("pipeline", 8, "a copy past its region", Asan, Report("out of bounds")),
    ("gemm", 1, "no wait for the copy", Plain, Any),
    ("gemm", 2, "too few bytes expected", Plain, Any),
    ("gemm", 3, "too many bytes expected", Plain, Report("mbarrier wait at faults.cu:")),
    ("gemm", 4, "the wrong parity", Plain, Report("deadlock [kernel fault_gemm")),
    ("gemm", 5, "no wgmma.fence", Plain, Report("wgmma without wgmma.fence")),
    ("gemm", 6, "the wrong swizzle", Plain, Wrong),
    ("gemm", 7, "no proxy fence before the store", Tsan, Race),
    ("gemm", 8, "no barrier before the store", Tsan, Race),
    ("gemm", 9, "a stage refilled too early", Plain, Any),
    ("gemm", 10, "a store not waited for", Plain, Report("exits with bulk stores issued here")),
    ("gemm", 11, "wgmma not waited for", Plain, Report("exits with wgmma issued here")),
    ("gemm", 12, "a sum touched in flight", Tsan, Race),
    ("gemm", 13, "a barrier not initialised", Plain, Report("is used before mbarrier.init")),
    ("gemm", 14, "more arrivals than the count", Plain, Report("more arrivals in a phase than its count")),
    ("gemm", 15, "a descriptor inside an atom", Plain, Report("lies inside a swizzle atom")),
    ("gemm", 16, "a misaligned box", Plain, Report("is not aligned to 128 bytes")),
    ("gemm", 17, "a descriptor outside of the block", Plain, Report("outside the block's")),
    ("gemm", 18, "a named barrier with a wrong count", Plain, Report("barrier 2: 128 of 160 threads arrived")),
    ("gemm", 19, "registers that nobody gave back", Plain, Report("registers that other warps must give back")),
    ("cluster", 1, "no cluster barrier before a remote read", Plain, Wrong),
    ("cluster", 1, "no cluster barrier before a remote read", Tsan, Race),
    ("cluster", 2, "a block that the cluster has not", Plain, Report("mapa: block 2 of a cluster of 2")),
    ("cluster", 3, "an arrival at the wrong block", Plain, Any),
    ("cluster", 4, "multicast to a block that is not there", Plain, Report("multicast to blocks 0x5")),
    ("cluster", 5, "a remote read after the owner's exit", Plain, Report("has exited")),
    ("grids", 1, "no wait for the grid before", Plain, Wrong),
];

pub fn rows() -> Vec<Row> {
    let row = |(kernel, fault, what, build, shows): &'static (&str, u32, &str, Build, Shows)| {
        Row::new(format!("fault {kernel} {fault}: {what}"), SOURCE, *build, move |p| caught(p, kernel, *fault, *shows))
    };
    FAULTS.iter().map(row).collect()
}

fn caught(p: &Program, kernel: &str, fault: u32, shows: Shows) -> Result<(), String> {
    let mut said = String::new();
    let seeds = if matches!(shows, Wrong | Any) { 8 } else { 1 };
    for seed in 0..seeds {
        let (outcome, right) = run(p, kernel, fault, seed)?;
        let seen = match shows {
            Report(words) => !outcome.good && outcome.report.contains(words),
            Race => outcome.report.contains("ThreadSanitizer: data race"),
            Wrong => outcome.good && !right,
            Any => !outcome.good || !right,
        };
        if seen {
            return Ok(());
        }
        said = if outcome.good { format!("ran, result right: {right}") } else { outcome.summary() };
    }
    Err(format!("not caught: {said}"))
}

/// The correct kernel: nothing is reported and the result is right.
pub fn clean(p: &Program, kernel: &str, seed: u64) -> Result<(), String> {
    let (outcome, right) = run(p, kernel, 0, seed)?;
    let outcome = finished(outcome).map_err(|e| format!("seed {seed}: {e}"))?;
    if !outcome.report.is_empty() {
        return Err(format!("seed {seed}: {}", outcome.summary()));
    }
    if right { Ok(()) } else { Err(format!("seed {seed}: the result is wrong")) }
}

fn run(p: &Program, kernel: &str, fault: u32, seed: u64) -> Result<(Outcome, bool), String> {
    match kernel {
        "rows" => sums_of_rows(p, fault, seed),
        "pipeline" => pipeline(p, fault, seed),
        "gemm" => gemm(p, fault, seed),
        "cluster" => cluster(p, fault, seed),
        _ => grids(p, fault, seed),
    }
}

fn right(outcome: &Outcome, buffer: usize, want: &[f32]) -> bool {
    outcome.buffers.get(buffer).is_some_and(|b| same(&to_floats(b), want).is_ok())
}

fn sums_of_rows(p: &Program, fault: u32, seed: u64) -> Result<(Outcome, bool), String> {
    let (rows, n) = (3usize, 200usize);
    let x = small_integers("rows", rows * n, 9);
    let mut case = Case::default();
    let buffers = [case.buffer(&floats(&x)), case.buffer(&vec![0; 4 * rows])];
    let [i, o] = buffers.map(|b| Argument::Pointer(b, 0));
    case.launch("fault_rows", rows as u32, 128, 0, &[i, o, (n as u32).into(), fault.into()]);
    let outcome = case.run(p, seed, false)?;
    let want: Vec<f32> = x.chunks(n).map(|r| 2.0 * r.iter().sum::<f32>()).collect();
    let good = right(&outcome, 1, &want);
    Ok((outcome, good))
}

fn pipeline(p: &Program, fault: u32, seed: u64) -> Result<(Outcome, bool), String> {
    let tiles = 5usize;
    let (a, b) = (small_integers("pipe a", tiles * 256, 5), small_integers("pipe b", tiles * 128, 5));
    let bits = |v: &[f32]| halves(&v.iter().map(|x| bf16::from_f32(*x).to_bits()).collect::<Vec<u16>>());
    let mut case = Case::default();
    let buffers = [case.buffer(&bits(&a)), case.buffer(&bits(&b)), case.buffer(&vec![0; 2048]), case.buffer(&[0; 4])];
    let [x, y, o, c] = buffers.map(|i| Argument::Pointer(i, 0));
    // Regions of 512 and 256 bytes, each with its red zone.
    let smem = 2 * (512 + 256) + 4 * 128;
    case.launch("fault_pipeline", 4, 64, smem, &[x, y, o, c, (tiles as u32).into(), fault.into()]);
    let outcome = case.run(p, seed, false)?;
    let dot = |m: usize, n: usize| -> f32 {
        (0..tiles * 16).map(|k| a[k / 16 * 256 + m * 16 + k % 16] * b[k / 16 * 128 + n * 16 + k % 16]).sum()
    };
    let one: Vec<f32> = (0..128).map(|i| dot(i / 8, i % 8)).collect();
    let good = right(&outcome, 2, &one.repeat(4)) && to_words(&outcome.buffers[3]) == [4];
    Ok((outcome, good))
}

fn gemm(p: &Program, fault: u32, seed: u64) -> Result<(Outcome, bool), String> {
    let k = 320usize;
    let (a, b) = (small_integers("gemm a", 64 * k, 1), small_integers("gemm b", 64 * k, 1));
    let bits = |v: &[f32]| halves(&v.iter().map(|x| bf16::from_f32(*x).to_bits()).collect::<Vec<u16>>());
    let mut case = Case::default();
    let buffers = [case.buffer(&bits(&a)), case.buffer(&bits(&b)), case.buffer(&vec![0; 8192])];
    let map = |buffer: usize, width: usize, swizzle: u32| Argument::Map {
        element: 9,
        swizzle,
        buffer: (buffer, 0),
        dims: vec![width as u64, 64],
        strides: vec![2 * width as u64],
        block: vec![64, 64],
    };
    let maps = [map(buffers[0], k, 3), map(buffers[1], k, 3), map(buffers[2], 64, 0)];
    let [ma, mb, mc] = maps;
    case.launch("fault_gemm", 1, 160, 32768 + 1024, &[ma, mb, mc, (k as u32 / 64).into(), fault.into()]);
    let outcome = case.run(p, seed, false)?;
    let dot = |m: usize, n: usize| (0..k).map(|i| a[m * k + i] * b[n * k + i]).sum::<f32>();
    let want: Vec<f32> = (0..4096).map(|i| bf16::from_f32(dot(i / 64, i % 64)).to_f32()).collect();
    let got: Option<Vec<f32>> = outcome.buffers.get(2).map(|bytes| {
        bytes.chunks_exact(2).map(|c| bf16::from_bits(u16::from_le_bytes([c[0], c[1]])).to_f32()).collect()
    });
    let good = got.is_some_and(|g| same(&g, &want).is_ok());
    Ok((outcome, good))
}

fn cluster(p: &Program, fault: u32, seed: u64) -> Result<(Outcome, bool), String> {
    let x = small_integers("cluster", 128, 99);
    let mut case = Case::default();
    let buffers = [case.buffer(&floats(&x)), case.buffer(&[0; 512])];
    let [i, o] = buffers.map(|b| Argument::Pointer(b, 0));
    case.launch_shaped("fault_cluster", [4, 1, 1], [32, 1, 1], 2, 0, 0, &[i, o, fault.into()]);
    let outcome = case.run(p, seed, false)?;
    let want: Vec<f32> = (0..128).map(|n| x[n] + x[n ^ 32]).collect();
    let good = right(&outcome, 1, &want);
    Ok((outcome, good))
}

fn grids(p: &Program, fault: u32, seed: u64) -> Result<(Outcome, bool), String> {
    let x = small_integers("grids", 128, 99);
    let mut case = Case::default();
    let [i, m, o] = [case.buffer(&floats(&x)), case.buffer(&[0; 512]), case.buffer(&[0; 512])];
    let at = |b| Argument::Pointer(b, 0);
    case.launch_shaped("fault_first", [4, 1, 1], [32, 1, 1], 1, 0, 2, &[at(i), at(m)]);
    case.launch_shaped("fault_second", [4, 1, 1], [32, 1, 1], 1, 0, 1, &[at(m), at(o), fault.into()]);
    let outcome = case.run(p, seed, false)?;
    let good = right(&outcome, o, &x.iter().map(|v| 2.0 * v + 1.0).collect::<Vec<f32>>());
    Ok((outcome, good))
}
