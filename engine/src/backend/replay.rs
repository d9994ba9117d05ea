//! Recorded launches of probe kernels on a device, bit by bit: what the emulator believes against what hardware does.
//!
//! A recording is the case file of the emulator's driver (`kernels-cu/emu/driver.cpp`) under a line that names the
//! source, with the bytes before and after.

use crate::error::{Error, Result};
use crate::tensor::{Device, Gpu};
use graft_kernels::launch::{Arg, ElementType, Kernel, Launch, Shape, TensorMap};
use graft_kernels::launchers::PROBES;

/// A recorded case.
pub struct Recorded<'r> {
    /// Its name, for errors.
    pub name: &'r str,
    /// The case file.
    pub text: &'r str,
    /// Contents of the buffers before, one after the other.
    pub input: &'r [u8],
    /// Contents afterwards.
    pub output: &'r [u8],
}

/// Memory of the device, given back at the end.
struct Held<'g> {
    gpu: &'g dyn Gpu,
    blocks: Vec<(u64, usize)>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        for (address, bytes) in &self.blocks {
            self.gpu.free(*address, *bytes);
        }
    }
}

struct Pending {
    kernel: &'static Kernel,
    shape: Shape,
    args: Vec<Arg>,
}

/// Runs a case on `device` and compares every byte.
///
/// # Errors
/// A file that is not such a case, a kernel that the device cannot run, or the first byte that differs.
pub fn replay(device: &Device, case: &Recorded<'_>) -> Result<()> {
    let Some(gpu) = device.driver() else {
        return Err(Error::failure(case.name, "recorded launches need a GPU").is(device.kind()).must("cuda or emu"));
    };
    let mut held = Held { gpu: gpu.as_ref(), blocks: Vec::new() };
    let mut lines = case.text.lines();
    let source = lines.next().and_then(|l| l.strip_prefix("source ")).ok_or_else(|| bad(case, "source FILE"))?;
    let (mut input, mut pending) = (case.input, None);
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["buffer", bytes] => {
                let bytes: usize = number(case, bytes)?;
                let (values, rest) = input.split_at_checked(bytes).ok_or_else(|| bad(case, "as many bytes"))?;
                let address = gpu.allocate(bytes)?;
                held.blocks.push((address, bytes));
                gpu.upload(address, values)?;
                input = rest;
            }
            ["launch", kernel, numbers @ ..] => {
                run(gpu.as_ref(), pending.take())?;
                let n: Vec<usize> = numbers.iter().map(|w| number(case, w)).collect::<Result<_>>()?;
                let [gx, gy, gz, threads, 1, 1, cluster, 1, 1, shared, 0] = n[..] else {
                    return Err(bad(case, "a launch of one row of threads without flags"));
                };
                let found = PROBES.iter().find(|k| k.name == *kernel && k.source == source);
                let kernel = *found.ok_or_else(|| bad(case, "a kernel of the probes"))?;
                let shape = Shape { grid: [gx, gy, gz], threads, cluster, shared, regions: 0, dependent: false };
                pending = Some(Pending { kernel, shape, args: Vec::new() });
            }
            _ => {
                let arg = argument(case, &held.blocks, &words)?;
                pending.as_mut().ok_or_else(|| bad(case, "a launch before its arguments"))?.args.push(arg);
            }
        }
    }
    run(gpu.as_ref(), pending)?;
    compare(case, &held)
}

fn run(gpu: &dyn Gpu, pending: Option<Pending>) -> Result<()> {
    let Some(p) = pending else { return Ok(()) };
    gpu.launch(&Launch { kernel: p.kernel, element: ElementType::F32, shape: p.shape, args: &p.args })
}

fn compare(case: &Recorded<'_>, held: &Held<'_>) -> Result<()> {
    let mut want = case.output;
    for (index, (address, bytes)) in held.blocks.iter().enumerate() {
        let mut got = vec![0; *bytes];
        held.gpu.download(*address, &mut got)?;
        let (expected, rest) = want.split_at_checked(*bytes).ok_or_else(|| bad(case, "as many bytes afterwards"))?;
        if let Some(at) = got.iter().zip(expected).position(|(g, e)| g != e) {
            return Err(Error::failure(case.name, format!("byte {at} of buffer {index} differs from the emulator's"))
                .is(format!("{:#04x}", got[at]))
                .must(format!("{:#04x}", expected[at])));
        }
        want = rest;
    }
    Ok(())
}

fn bad(case: &Recorded<'_>, must: &str) -> Error {
    Error::failure(case.name, "is not a recorded case").must(must)
}

fn number<T: std::str::FromStr>(case: &Recorded<'_>, word: &str) -> Result<T> {
    word.parse().map_err(|_| bad(case, "decimal numbers").is(word))
}

fn argument(case: &Recorded<'_>, blocks: &[(u64, usize)], words: &[&str]) -> Result<Arg> {
    let place = |buffer: &str, offset: &str| -> Result<u64> {
        let (buffer, offset): (usize, u64) = (number(case, buffer)?, number(case, offset)?);
        blocks.get(buffer).map(|(address, _)| address + offset).ok_or_else(|| bad(case, "a buffer that is there"))
    };
    match words {
        ["pointer", buffer, offset] => Ok(Arg::Address(place(buffer, offset)?)),
        ["bytes", hex] => {
            let value = u64::from_str_radix(&reversed(hex), 16).map_err(|_| bad(case, "hexadecimal bytes").is(hex))?;
            match hex.len() {
                8 => Ok(Arg::U32(value as u32)),
                16 => Ok(Arg::U64(value)),
                _ => Err(bad(case, "an argument of 4 or 8 bytes").is(hex)),
            }
        }
        ["map", element, swizzle, buffer, offset, rank, numbers @ ..] => {
            let rank: usize = number(case, rank)?;
            let n: Vec<u64> = numbers.iter().map(|w| number(case, w)).collect::<Result<_>>()?;
            if rank == 0 || rank > 5 || n.len() != 3 * rank - 1 {
                return Err(bad(case, "a map of rank 1 to 5"));
            }
            let mut map = TensorMap {
                element: number(case, element)?,
                swizzle: number(case, swizzle)?,
                address: place(buffer, offset)?,
                rank,
                dims: [0; 5],
                strides: [0; 4],
                block: [0; 5],
            };
            map.dims[..rank].copy_from_slice(&n[..rank]);
            map.strides[..rank - 1].copy_from_slice(&n[rank..2 * rank - 1]);
            for (b, n) in map.block.iter_mut().zip(&n[2 * rank - 1..]) {
                *b = u32::try_from(*n).map_err(|_| bad(case, "a box that fits"))?;
            }
            Ok(Arg::Map(map))
        }
        _ => Err(bad(case, "buffer, launch, pointer, bytes or map").is(words.join(" "))),
    }
}

/// Little-endian hexadecimal bytes, the highest first.
fn reversed(hex: &str) -> String {
    let bytes: Vec<&str> = (0..hex.len() / 2).filter_map(|i| hex.get(2 * i..2 * i + 2)).collect();
    bytes.into_iter().rev().collect()
}
