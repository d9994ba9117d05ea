//! What the child processes share: the device, kernels, and how a part ends.

use graft_engine::backend::cuda::{Cuda, notices};
use graft_engine::tensor::Gpu;
use graft_kernels::launch::{Arg, ElementType, Kernel, Launch, Shape};
use std::process::ExitCode;

/// `y += alpha * x`.
pub static AXPY: Kernel = Kernel { op: "axpy", source: "axpy.cu", name: "axpy_forward", arch: 80 };

/// A name, and what the child does.
pub type Part = (&'static str, fn() -> Result<(), String>);

/// Plays a part; what it prints is read by the parent.
pub fn run(part: &str) -> ExitCode {
    let parts = [
        super::memory::PARTS,
        super::kernels::PARTS,
        super::graphs::PARTS,
        super::machines::PARTS,
        super::model::PARTS,
    ]
    .concat();
    let Some((_, play)) = parts.iter().find(|(name, _)| *name == part) else {
        eprintln!("no part is called {part}");
        return ExitCode::FAILURE;
    };
    let result = play();
    notices::take().iter().for_each(|n| println!("notice: {n}"));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

/// The errors of the engine as text.
pub fn text<T>(result: graft_engine::error::Result<T>) -> Result<T, String> {
    result.map_err(|e| e.to_string())
}

pub fn open() -> Result<Cuda, String> {
    text(Cuda::open(0))
}

/// Fails unless this was refused with all of these words.
pub fn refused<T>(result: graft_engine::error::Result<T>, words: &[&str]) -> Result<(), String> {
    match result {
        Ok(_) => Err(format!("was not refused: {words:?}")),
        Err(e) if words.iter().all(|w| e.to_string().contains(w)) => Ok(()),
        Err(e) => Err(format!("lacks one of {words:?}: {e}")),
    }
}

/// A block of memory that holds these floats.
pub fn floats(gpu: &Cuda, values: &[f32]) -> Result<u64, String> {
    let address = text(gpu.allocate(4 * values.len()))?;
    write(gpu, address, values)?;
    Ok(address)
}

pub fn write(gpu: &Cuda, address: u64, values: &[f32]) -> Result<(), String> {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_ne_bytes()).collect();
    text(gpu.upload(address, &bytes))
}

pub fn read(gpu: &Cuda, address: u64, len: usize) -> Result<Vec<f32>, String> {
    let mut bytes = vec![0; 4 * len];
    text(gpu.download(address, &mut bytes))?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_ne_bytes(*b)).collect())
}

/// Launches `y += alpha * x` on `len` floats, with so much shared memory that it does not need.
pub fn axpy(gpu: &Cuda, x: u64, y: u64, len: usize, alpha: f32, shared: usize) -> graft_engine::error::Result<()> {
    let args = [Arg::Address(x), Arg::Address(y), Arg::I32(len as i32), Arg::F32(alpha)];
    let mut shape = Shape::new(len.div_ceil(2048).max(1), 256);
    if shared > 0 {
        shape = shape.shared(&[shared]);
    }
    gpu.launch(&Launch { kernel: &AXPY, element: ElementType::F32, shape, args: &args })
}
