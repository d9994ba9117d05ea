//! A device that writes down what it is asked to do: one case file with all buffers and launches, to be run by the
//! builds of the emulator that have a checker.
//!
//! Nothing is computed while recording: what is read back is zero. It serves work whose launches do not depend on
//! values, as those of operators do not.

use super::{RED_ZONE, files_of, properties, toolchain};
use crate::error::{Error, Result};
use crate::tensor::{DType, Device, DeviceKind, Gpu};
use graft_kernels::emu::{Argument, Build, Case, Outcome};
use graft_kernels::launch::{Arg, ElementType, Kernel, Launch, Properties};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Addresses of buffers are this far apart, so that an address tells its buffer.
const SPAN: u64 = 1 << 40;

/// A device that records; see [`Recorder::finish`].
pub struct Recorder {
    properties: Properties,
    /// Whether contents are kept; without them a recording only counts.
    keep: bool,
    log: Mutex<Log>,
}

#[derive(Default)]
struct Log {
    /// Contents of the buffers before the first launch; empty where they are not kept.
    buffers: Vec<Vec<u8>>,
    sizes: Vec<usize>,
    /// Buffers that a launch has seen: their contents are no longer known.
    used: Vec<bool>,
    /// A kernel of each operator that launched one, and their working type.
    ops: Vec<&'static Kernel>,
    element: Option<ElementType>,
    launches: Vec<Recorded>,
    /// Buffer of each download, in order.
    reads: Vec<usize>,
}

struct Recorded {
    kernel: &'static str,
    grid: [u32; 3],
    threads: u32,
    cluster: u32,
    shared: u32,
    dependent: bool,
    args: Vec<Argument>,
}

/// A finished recording.
pub struct Recording {
    /// Kernels in the order of their launches.
    pub kernels: Vec<&'static str>,
    /// Number of launches.
    pub launches: usize,
    ops: Vec<&'static Kernel>,
    element: ElementType,
    case: Case,
    /// Buffer of each download, in order.
    pub reads: Vec<usize>,
}

impl Recorder {
    /// A recorder and the device that it records, which computes in `element`. With `keep` false no contents are kept,
    /// and the shapes may be as large as they like.
    pub fn open(element: DType, keep: bool) -> (Arc<Recorder>, Device) {
        let recorder = Arc::new(Recorder { properties: properties(), keep, log: Mutex::default() });
        let device = Device::gpu(DeviceKind::Emu, Arc::clone(&recorder) as Arc<dyn Gpu>, element);
        (recorder, device)
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was recorded; `None` where nothing was launched.
    pub fn finish(&self) -> Option<Recording> {
        let log = std::mem::take(&mut *self.log());
        let element = log.element?;
        let mut case = Case::default();
        for bytes in &log.buffers {
            case.buffer(bytes);
        }
        for (i, l) in log.launches.iter().enumerate() {
            // A launch that another depends on is held back until that one starts: the two then overlap.
            let followed = log.launches.get(i + 1).is_some_and(|next| next.dependent);
            let flags = u32::from(l.dependent && i > 0) | u32::from(followed) << 1;
            case.launch_shaped(l.kernel, l.grid, [l.threads, 1, 1], l.cluster, l.shared, flags, &l.args);
        }
        let kernels = log.launches.iter().map(|l| l.kernel).collect::<Vec<_>>();
        Some(Recording { launches: kernels.len(), kernels, ops: log.ops, element, case, reads: log.reads })
    }
}

impl Recording {
    /// Runs the case in a build of the emulator; the buffers of the outcome are in the order of [`Recording::reads`].
    ///
    /// # Errors
    /// When it cannot be compiled or started; a report of the checker is an [`Outcome`].
    pub fn run(&self, build: Build, seed: u64) -> Result<Outcome> {
        let names: Vec<&str> = self.ops.iter().map(|k| k.op).collect();
        let failed =
            |why: String| Error::failure(format!("{} for {} ({build} build)", names.join(", "), self.element), why);
        let files: Vec<String> = self.ops.iter().flat_map(|kernel| files_of(kernel)).collect();
        let program = toolchain()?.compile(&files, Some(self.element), build).map_err(failed)?;
        self.case.run(&program, seed, false).map_err(failed)
    }
}

impl Log {
    /// Buffer and offset of an address.
    fn place(&self, address: u64) -> Result<(usize, usize)> {
        let buffer = usize::try_from(address / SPAN).unwrap_or(0).wrapping_sub(1);
        match self.sizes.get(buffer) {
            Some(bytes) if (address % SPAN) <= *bytes as u64 => Ok((buffer, (address % SPAN) as usize)),
            _ => Err(Error::failure("recording", format!("{address:#x} is no address of a buffer"))),
        }
    }

    fn bytes_mut(&mut self, address: u64, len: usize) -> Result<&mut [u8]> {
        let (buffer, offset) = self.place(address)?;
        if self.used[buffer] {
            return Err(Error::failure("recording", "a buffer is written by the host after a kernel had it"));
        }
        match self.buffers[buffer].get_mut(offset..offset + len) {
            Some(bytes) => Ok(bytes),
            None => Err(Error::failure("recording", format!("{len} bytes at {offset} are outside of a buffer"))),
        }
    }

    fn argument(&mut self, arg: &Arg) -> Result<Argument> {
        let pointer = |log: &mut Log, address: u64| {
            let place = log.place(address)?;
            log.used[place.0] = true;
            Ok::<_, Error>(place)
        };
        Ok(match arg {
            Arg::Address(0) => Argument::from(0u64),
            Arg::Address(address) => {
                let (buffer, offset) = pointer(self, *address)?;
                Argument::Pointer(buffer, offset)
            }
            Arg::I32(v) => Argument::Bytes(v.to_le_bytes().to_vec()),
            Arg::U32(v) => Argument::from(*v),
            Arg::U64(v) => Argument::from(*v),
            Arg::F32(v) => Argument::from(*v),
            Arg::Map(map) => Argument::Map {
                element: map.element,
                swizzle: map.swizzle,
                buffer: pointer(self, map.address)?,
                dims: map.dims[..map.rank].to_vec(),
                strides: map.strides[..map.rank.saturating_sub(1)].to_vec(),
                block: map.block[..map.rank].to_vec(),
            },
        })
    }
}

impl Gpu for Recorder {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn recycles(&self) -> bool {
        false
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        let mut log = self.log();
        log.buffers.push(if self.keep { vec![0; bytes] } else { Vec::new() });
        log.sizes.push(bytes);
        log.used.push(false);
        Ok(log.buffers.len() as u64 * SPAN)
    }

    fn free(&self, _address: u64, _bytes: usize) {}

    fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        if self.keep {
            self.log().bytes_mut(to, bytes.len())?.copy_from_slice(bytes);
        }
        Ok(())
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        bytes.fill(0);
        let mut log = self.log();
        let (buffer, _) = log.place(from)?;
        log.reads.push(buffer);
        Ok(())
    }

    fn copy(&self, _to: u64, _from: u64, _bytes: usize) -> Result<()> {
        Err(Error::failure("recording", "copies between buffers are not recorded"))
    }

    fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<()> {
        if self.keep {
            self.log().bytes_mut(to, bytes)?.fill(byte);
        }
        Ok(())
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let mut log = self.log();
        let Launch { kernel, element, shape, args } = launch;
        if *log.element.get_or_insert(*element) != *element {
            return Err(Error::failure("recording", "launches in two working types in one case").is(kernel.op));
        }
        if log.ops.iter().all(|known| known.op != kernel.op) {
            log.ops.push(kernel);
        }
        super::fits(launch, &self.properties)?;
        let number = |n: usize| u32::try_from(n).map_err(|_| Error::failure("recording", format!("{n} is too large")));
        let args = args.iter().map(|a| log.argument(a)).collect::<Result<Vec<_>>>()?;
        let [x, y, z] = shape.grid;
        log.launches.push(Recorded {
            kernel: kernel.name,
            grid: [number(x)?, number(y)?, number(z)?],
            threads: number(shape.threads)?,
            cluster: number(shape.cluster)?,
            shared: number(shape.shared + RED_ZONE * shape.regions)?,
            dependent: shape.dependent,
            args,
        });
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}
