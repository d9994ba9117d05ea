//! The CUDA kernels on an emulated GPU: the very sources, compiled by the host compiler, in host memory.
//!
//! Slow and exact: for tests and for developing kernels without a GPU. Every tensor is an allocation of its own with
//! guard bytes around it, a kernel sees only live memory, and what the emulator reports (a race that shows, a barrier
//! that not all threads reach, a step outside of shared memory) is the error of the launch. `record` puts the launches
//! into a file instead, for the builds with an address or a race checker.

mod library;
mod memory;
mod record;

pub use record::{Recorder, Recording};

use crate::error::{Error, Result};
use crate::io::cache;
use crate::tensor::{DType, Device, DeviceKind, Gpu};
use graft_kernels::emu::{Build, Toolchain};
use graft_kernels::launch::{Arg, ElementType, Kernel, Launch, Properties};
use graft_kernels::launchers::KERNELS;
use graft_kernels::sources;
use library::Library;
use memory::Memory;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the emulator pretends to be: few multiprocessors, so that small cases already have more blocks than those.
pub(crate) fn properties() -> Properties {
    Properties {
        name: "emulator".to_string(),
        arch: 90,
        multiprocessors: 4,
        shared_per_block: 227 << 10,
        memory: 16 << 30,
    }
}

/// Whether a launch is one that the device can start.
fn fits(launch: &Launch<'_>, device: &Properties) -> Result<()> {
    let Launch { kernel, shape, .. } = launch;
    let place = || format!("{}: {}", kernel.op, kernel.name);
    if shape.threads == 0 || shape.threads > 1024 {
        return Err(Error::failure(place(), "impossible block").is(shape.threads).must("1 to 1024 threads"));
    }
    if shape.shared > device.shared_per_block {
        return Err(Error::failure(place(), "too much shared memory")
            .is(format!("{} bytes", shape.shared))
            .must(format!("at most {}", device.shared_per_block)));
    }
    Ok(())
}

/// Bytes that the emulator puts behind each region of shared memory (`ptx::kRedZone`).
const RED_ZONE: usize = 128;

/// Names a folder with a `kernels-cu` whose sources are taken instead of those in the program: a kernel can be changed
/// and run without building anything else.
pub const SOURCES: &str = "GRAFT_KERNELS";

/// The host compiler with the sources of the kernels.
///
/// # Errors
/// Why this machine cannot build the emulator.
pub fn toolchain() -> Result<Toolchain> {
    let builds = cache::folder("emulator")?;
    let root = match std::env::var_os(SOURCES).filter(|v| !v.is_empty()) {
        Some(folder) => PathBuf::from(folder),
        None => cache::tree("kernel-sources", &embedded())?,
    };
    Toolchain::find(&root, &builds)
        .map_err(|why| Error::failure("--backend emu", why).fix("install g++ 12 or newer, or use --backend cpu"))
}

/// Every file that the emulator and the kernels need, as a path and its text.
fn embedded() -> Vec<(String, &'static str)> {
    let of = |folder: &str, list: &'static [sources::File]| -> Vec<(String, &'static str)> {
        list.iter().map(|(file, text)| (format!("kernels-cu/{folder}/{file}"), *text)).collect()
    };
    let mut files = [of("common", sources::COMMON), of("emu", sources::EMULATOR)].concat();
    files.extend(sources::OPERATORS.iter().flat_map(|op| of(op, sources::operator(op))));
    files
}

/// The sources that are compiled together with a kernel's, relative to the folder that holds `kernels-cu`: those of its
/// operator. Probes are programs of their own.
pub(crate) fn files_of(kernel: &Kernel) -> Vec<String> {
    let mut files: Vec<&str> = KERNELS.iter().filter(|k| k.op == kernel.op).map(|k| k.source).collect();
    files.dedup();
    if files.is_empty() {
        files.push(kernel.source);
    }
    files.into_iter().map(|file| format!("kernels-cu/{}/{file}", kernel.op)).collect()
}

/// Opens an emulated GPU that computes in `element`; `seed` chooses the order in which warps and copies advance.
///
/// # Errors
/// When this machine has no C++ compiler.
pub fn open(element: DType, seed: u64) -> Result<Device> {
    let emu = Emu::new(seed, false)?;
    Ok(Device::gpu(DeviceKind::Emu, Arc::new(emu), element))
}

/// As [`open`], with a count of what launches cost.
///
/// # Errors
/// As [`open`].
pub fn open_counting(element: DType) -> Result<(Arc<Emu>, Device)> {
    let emu = Arc::new(Emu::new(0, true)?);
    let device = Device::gpu(DeviceKind::Emu, Arc::clone(&emu) as Arc<dyn Gpu>, element);
    Ok((emu, device))
}

/// What a library was compiled from, and for which working type.
type Compiled = (Vec<String>, ElementType);

/// The emulated GPU.
pub struct Emu {
    toolchain: Toolchain,
    properties: Properties,
    seed: u64,
    counts: bool,
    libraries: Mutex<HashMap<Compiled, Arc<Library>>>,
    /// The one that ran last: it alone keeps its stacks.
    last: Mutex<Option<Arc<Library>>>,
    memory: Mutex<Memory>,
}

impl Emu {
    fn new(seed: u64, counts: bool) -> Result<Emu> {
        Ok(Emu {
            toolchain: toolchain()?,
            properties: properties(),
            seed,
            counts,
            libraries: Mutex::default(),
            last: Mutex::default(),
            memory: Mutex::default(),
        })
    }

    /// What the launches since the last call cost, a line a place in a source; see `docs/emulator.md`.
    ///
    /// # Errors
    /// When a library of kernels is not one of the emulator's.
    pub fn counters(&self) -> Result<String> {
        let held = self.libraries.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = held.values().map(|library| library.counters());
        let lines: std::result::Result<String, String> = counted.collect();
        lines.map_err(|why| Error::failure("emulator: counters", why))
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The compiled kernels of an operator; the first call compiles them.
    fn library(&self, kernel: &'static Kernel, element: ElementType) -> Result<Arc<Library>> {
        let mut held = self.libraries.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (files_of(kernel), element);
        if let Some(library) = held.get(&key) {
            return Ok(Arc::clone(library));
        }
        let place = || format!("{}: {} for {element}", kernel.op, kernel.source);
        let program = self
            .toolchain
            .compile(&key.0, Some(element), Build::Plain)
            .map_err(|said| Error::failure(place(), format!("does not compile for the emulator:\n{said}")))?;
        let path = program.library.unwrap_or_default();
        let library = Arc::new(Library::open(&path).map_err(|why| Error::failure(place(), why))?);
        library.seed(self.seed).map_err(|why| Error::failure(place(), why))?;
        if self.counts {
            library.count().map_err(|why| Error::failure(place(), why))?;
        }
        held.insert(key, Arc::clone(&library));
        Ok(library)
    }
}

impl Gpu for Emu {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn recycles(&self) -> bool {
        false
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.memory().allocate(bytes)
    }

    fn free(&self, address: u64, _bytes: usize) {
        self.memory().free(address);
    }

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.memory().bytes_mut(to, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.synchronize()?;
        bytes.copy_from_slice(self.memory().bytes(from, bytes.len())?);
        Ok(())
    }

    fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        let mut memory = self.memory();
        let values = memory.bytes(from, bytes)?.to_vec();
        memory.bytes_mut(to, bytes)?.copy_from_slice(&values);
        Ok(())
    }

    fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<()> {
        self.memory().bytes_mut(to, bytes)?.fill(byte);
        Ok(())
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let Launch { kernel, element, shape, args } = *launch;
        let failed = |why: String| Error::failure(format!("{}: {} on the emulator", kernel.op, kernel.name), why);
        fits(launch, &self.properties)?;
        let library = self.library(kernel, element)?;
        let addresses = || {
            args.iter().filter_map(|a| match a {
                Arg::Address(0) => None,
                Arg::Address(at) => Some(*at),
                Arg::Map(map) => Some(map.address),
                _ => None,
            })
        };
        let dead = addresses().find(|at| self.memory().bytes(*at, 1).is_err());
        if let Some(address) = dead {
            return Err(failed(format!("an argument is the address {address:#x}, where no tensor is")));
        }
        let before = self.last.lock().unwrap_or_else(PoisonError::into_inner).replace(Arc::clone(&library));
        if let Some(before) = before.filter(|before| !Arc::ptr_eq(before, &library)) {
            before.release().map_err(failed)?;
        }
        let shared = shape.shared + RED_ZONE * shape.regions;
        library.launch(kernel.name, &shape, shared, args).map_err(failed)?;
        match addresses().find(|at| !self.memory().intact(*at)) {
            Some(_) => Err(failed("wrote beside a tensor".to_string())),
            None => Ok(()),
        }
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
