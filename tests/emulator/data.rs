//! Inputs of probes as bytes, and comparisons of what came back.

use graft_kernels::check::SplitMix64;
use graft_kernels::emu::{Argument, Build, Case, Outcome, Program};

pub fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn halves(values: &[u16]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn to_words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()
}

pub fn to_floats(bytes: &[u8]) -> Vec<f32> {
    to_words(bytes).into_iter().map(f32::from_bits).collect()
}

/// Small whole numbers: their sums of products are exact in f32, whatever the order.
pub fn small_integers(name: &str, n: usize, largest: i64) -> Vec<f32> {
    let mut rng = SplitMix64::named("probe", name);
    (0..n).map(|_| (rng.next_u64() % (2 * largest as u64 + 1)) as f32 - largest as f32).collect()
}

pub fn random_bytes(name: &str, n: usize) -> Vec<u8> {
    let mut rng = SplitMix64::named("probe", name);
    (0..n).map(|_| rng.next_u64() as u8).collect()
}

pub fn random_floats(name: &str, n: usize, scale: f64) -> Vec<f32> {
    let mut rng = SplitMix64::named("probe", name);
    (0..n).map(|_| (rng.normal() * scale) as f32).collect()
}

/// Runs a kernel of one block over an input and an output buffer; gives the output.
pub fn simple(
    program: &Program,
    kernel: &str,
    threads: u32,
    smem: u32,
    input: &[u8],
    out: usize,
) -> Result<Vec<u8>, String> {
    let mut case = Case::default();
    let (i, o) = (case.buffer(input), case.buffer(&vec![0xcc; out]));
    case.launch(kernel, 1, threads, smem, &[Argument::Pointer(i, 0), Argument::Pointer(o, 0)]);
    Ok(finished(case.run(program, 0, false)?)?.buffers.swap_remove(1))
}

/// The outcome of a case that must run to its end.
pub fn finished(outcome: Outcome) -> Result<Outcome, String> {
    if outcome.good { Ok(outcome) } else { Err(outcome.summary()) }
}

/// Equality of lists, with the first difference named.
pub fn same<T: PartialEq + std::fmt::Debug>(got: &[T], want: &[T]) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{} values, not {}", got.len(), want.len()));
    }
    match got.iter().zip(want).position(|(g, w)| g != w) {
        Some(i) => Err(format!("element {i} is {:?}, not {:?}", got[i], want[i])),
        None => Ok(()),
    }
}

/// Every element within `relative` of what it must be; NaN is not.
pub fn close(got: &[f32], want: &[f64], relative: f64) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{} values, not {}", got.len(), want.len()));
    }
    let far = |(g, w): (&f32, &f64)| !((f64::from(*g) - w).abs() <= relative * w.abs().max(1e-3));
    match got.iter().zip(want).position(far) {
        Some(i) => Err(format!("element {i} is {}, not {}", got[i], want[i])),
        None => Ok(()),
    }
}

/// Schedules to try: the checkers' builds are slow.
pub fn seeds(p: &Program) -> std::ops::Range<u64> {
    if p.build == Build::Plain { 0..4 } else { 0..1 }
}
