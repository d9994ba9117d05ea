//! A stream of cust as the queue that graft's operators put their kernels in.

use cust::device::{Device, DeviceAttribute};
use cust::error::CudaError;
use cust::function::{BlockSize, GridSize};
use cust::memory::DeviceBuffer;
use cust::module::Module;
use cust::stream::Stream;
use cust::sys;
use graft_kernels::archive::Archive;
use graft_kernels::launch::{Arg, Element, Kernel, Launch, Out, Properties, Queue};
use std::collections::HashMap;
use std::ffi::c_void;

/// Why a kernel could not be put in.
#[derive(Debug)]
pub enum Error {
    /// The driver's own.
    Cuda(CudaError),
    /// Anything else, in words.
    Other(String),
}

impl From<CudaError> for Error {
    fn from(error: CudaError) -> Self {
        Error::Cuda(error)
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Error::Cuda(error) => write!(f, "CUDA: {error}"),
            Error::Other(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Error {}

/// Kernels of the archive `graft.cubins`, launched on one stream of the current context.
pub struct CustQueue<'s> {
    stream: &'s Stream,
    archive: Archive,
    properties: Properties,
    /// Loaded code, by operator, source and element.
    modules: HashMap<[&'static str; 3], Module>,
    /// What operators asked for between their launches; it lives as long as the queue.
    scratch: Vec<DeviceBuffer<u8>>,
}

impl<'s> CustQueue<'s> {
    /// A queue on `stream` of `device`, with the kernels of an archive.
    ///
    /// # Errors
    /// Those of the driver, and an archive that is damaged.
    pub fn new(stream: &'s Stream, device: Device, archive: Vec<u8>) -> Result<Self, Error> {
        let number = |attribute| device.get_attribute(attribute).map(|value| value.max(0) as usize);
        let [major, minor] =
            [number(DeviceAttribute::ComputeCapabilityMajor)?, number(DeviceAttribute::ComputeCapabilityMinor)?];
        // The most that a kernel can ask for, which cust has no name for.
        let optin = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let mut shared = 0;
        // SAFETY: writes one integer.
        if unsafe { sys::cuDeviceGetAttribute(&mut shared, optin, device.as_raw()) }
            != sys::cudaError_enum::CUDA_SUCCESS
        {
            return Err(Error::Other("the device does not tell its shared memory".to_string()));
        }
        let properties = Properties {
            name: device.name()?,
            arch: (10 * major + minor) as u32,
            multiprocessors: number(DeviceAttribute::MultiprocessorCount)?,
            shared_per_block: shared.max(0) as usize,
            memory: device.total_memory()? as u64,
        };
        let archive = Archive::parse(archive).map_err(Error::Other)?;
        Ok(CustQueue { stream, archive, properties, modules: HashMap::new(), scratch: Vec::new() })
    }

    /// Targets of the archive that run on this device, best first.
    fn targets(&self) -> &'static [&'static str] {
        match self.properties.arch {
            90 => &["sm_90a", "sm_80", "compute_80"],
            80..=89 => &["sm_80", "compute_80"],
            _ => &["compute_80"],
        }
    }

    /// Loads the code of a kernel, once.
    fn load(&mut self, launch: &Launch<'_>) -> Result<[&'static str; 3], Error> {
        let Kernel { op, source, .. } = *launch.kernel;
        let key = [op, source, launch.element.name()];
        if !self.modules.contains_key(&key) {
            let missing = || Error::Other(format!("the archive has no {source} of {op} for {} here", key[2]));
            let entry = self.archive.find(op, source, key[2], self.targets()).ok_or_else(missing)?;
            let code = self.archive.code(entry).map_err(Error::Other)?;
            let module = if entry.key.target.starts_with("compute") {
                Module::from_ptx(String::from_utf8_lossy(code), &[])?
            } else {
                Module::from_cubin(code, &[])?
            };
            self.modules.insert(key, module);
        }
        Ok(key)
    }
}

impl Queue for CustQueue<'_> {
    type Error = Error;

    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn scratch<T: Element>(&mut self, elements: usize) -> Result<Out<T>, Error> {
        // SAFETY: plain bytes, which kernels write before they read them.
        let buffer = unsafe { DeviceBuffer::<u8>::uninitialized((elements * size_of::<T>()).max(1))? };
        let address = buffer.as_device_ptr().as_raw();
        self.scratch.push(buffer);
        Ok(Out::at(address))
    }

    fn zero<T: Element>(&mut self, at: Out<T>, elements: usize) -> Result<(), Error> {
        // SAFETY: the caller's promise that so many elements lie at this address; zero bytes are zero in every type.
        let mut place = unsafe {
            cust::memory::DeviceSlice::<u8>::from_raw_parts(
                cust::memory::DevicePointer::from_raw(at.address()),
                elements * size_of::<T>(),
            )
        };
        // SAFETY: on the stream of the kernels, so in order with them.
        unsafe { place.set_8_async(0, self.stream)? };
        Ok(())
    }

    fn launch(&mut self, launch: &Launch<'_>) -> Result<(), Error> {
        let key = self.load(launch)?;
        let function = self.modules[&key].get_function(launch.kernel.name)?;
        let shape = launch.shape;
        if shape.cluster > 1 || launch.args.iter().any(|arg| matches!(arg, Arg::Map(_))) {
            return Err(Error::Other(format!("{}: cust launches no clusters and encodes no tensor maps", key[0])));
        }
        if shape.shared > 48 << 10 {
            let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is of a module that is loaded.
            let done = unsafe { sys::cuFuncSetAttribute(function.to_raw(), most, shape.shared as i32) };
            if done != sys::cudaError_enum::CUDA_SUCCESS {
                return Err(Error::Other(format!("{}: {} bytes of shared memory: {done:?}", key[0], shape.shared)));
            }
        }
        // Every argument in eight bytes of its own, low bytes first, as the driver reads them.
        let mut slots: Vec<u64> = launch
            .args
            .iter()
            .map(|arg| match *arg {
                Arg::Address(value) | Arg::U64(value) => value,
                Arg::I32(value) => u64::from(value as u32),
                Arg::U32(value) => u64::from(value),
                Arg::F32(value) => u64::from(value.to_bits()),
                Arg::Map(_) => 0,
            })
            .collect();
        let args: Vec<*mut c_void> = slots.iter_mut().map(|slot| (slot as *mut u64).cast()).collect();
        let [x, y, z] = shape.grid.map(|blocks| blocks as u32);
        let (grid, block) = (GridSize::xyz(x, y, z), BlockSize::x(shape.threads as u32));
        // SAFETY: the typed launcher made the arguments from the kernel's own signature; `slots` outlives the call,
        // which copies them.
        unsafe { self.stream.launch(&function, grid, block, shape.shared as u32, &args)? };
        Ok(())
    }

    fn refuse(&self, kernel: &'static Kernel, argument: &'static str, value: usize) -> Error {
        Error::Other(format!("{}: {argument} is {value}, which its type does not hold", kernel.name))
    }
}
