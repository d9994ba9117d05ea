//! A shared object of kernels and the emulator's runtime in it (`kernels-cu/emu/launch.cpp`).
#![allow(unsafe_code)]

use graft_kernels::launch::{Arg, Shape, TensorMap};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// As `EmuShape`.
#[repr(C)]
struct EmuShape {
    grid: [u32; 3],
    block: [u32; 3],
    cluster: [u32; 3],
    smem: u32,
    dependent: u32,
    dependents: u32,
    resident: u32,
}

type LaunchFn = unsafe extern "C" fn(*const c_char, *const EmuShape, *mut *mut c_void, *mut c_char, usize) -> c_int;
type ArgumentsFn = unsafe extern "C" fn(*const c_char, *mut usize) -> c_int;
type MapFn = unsafe extern "C" fn(
    *mut c_void,
    c_int,
    u32,
    *mut c_void,
    *const u64,
    *const u64,
    *const u32,
    c_int,
) -> *const c_char;

/// An argument as the kernel reads it; a tensor map is the largest and the most aligned.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Value([u8; 128]);

/// Longest report of a failed launch.
const REPORT: usize = 1 << 16;

/// A loaded shared object.
pub(super) struct Library {
    library: libloading::Library,
    /// The runtime holds one launch at a time.
    busy: Mutex<()>,
}

impl Library {
    /// Loads the object at `path`.
    pub(super) fn open(path: &Path) -> Result<Library, String> {
        // SAFETY: the object was compiled from this library's own sources; its initialisers only fill a table.
        let library = unsafe { libloading::Library::new(path) }.map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Library { library, busy: Mutex::new(()) })
    }

    /// Chooses the order in which warps and copies of the launches that follow advance.
    ///
    /// # Errors
    /// When the object is not one of the emulator's.
    pub(super) fn seed(&self, seed: u64) -> Result<(), String> {
        // SAFETY: the signature is that of launch.cpp; it takes any number.
        unsafe { self.symbol::<unsafe extern "C" fn(u64)>(c"emu_seed").map(|set| set(seed)) }
    }

    /// Counts what the launches that follow cost.
    ///
    /// # Errors
    /// As [`Library::seed`].
    pub(super) fn count(&self) -> Result<(), String> {
        // SAFETY: the signature is that of launch.cpp; it takes any number.
        unsafe { self.symbol::<unsafe extern "C" fn(c_int)>(c"emu_count").map(|set| set(1)) }
    }

    /// What the launches since the last call cost, a line a place in a source.
    ///
    /// # Errors
    /// As [`Library::seed`].
    pub(super) fn counters(&self) -> Result<String, String> {
        let mut lines = vec![0u8; 1 << 20];
        let _one = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the signature is that of launch.cpp, which writes at most as many bytes as stated; the buffer lives on.
        unsafe {
            let read = self.symbol::<unsafe extern "C" fn(*mut c_char, usize)>(c"emu_counters")?;
            read(lines.as_mut_ptr().cast(), lines.len());
        }
        Ok(text(&lines))
    }

    /// Gives back the stacks that the runtime keeps for the next launch.
    ///
    /// # Errors
    /// As [`Library::seed`].
    pub(super) fn release(&self) -> Result<(), String> {
        let _one = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the signature is that of launch.cpp, and no launch runs while the lock is held.
        unsafe { self.symbol::<unsafe extern "C" fn()>(c"emu_release").map(|release| release()) }
    }

    /// A function of the runtime.
    ///
    /// # Safety
    /// `F` must be the type of its signature in launch.cpp or tma.cpp.
    unsafe fn symbol<F>(&self, name: &CStr) -> Result<libloading::Symbol<'_, F>, String> {
        // SAFETY: the caller's.
        unsafe { self.library.get::<F>(name.to_bytes_with_nul()) }.map_err(|e| e.to_string())
    }

    /// Runs a kernel to its end.
    pub(super) fn launch(&self, kernel: &str, shape: &Shape, shared: usize, args: &[Arg]) -> Result<(), String> {
        let name = CString::new(kernel).map_err(|e| e.to_string())?;
        let mut values = args.iter().map(|a| self.value(a)).collect::<Result<Vec<_>, _>>()?;
        self.agree(&name, args)?;
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| v.0.as_mut_ptr().cast()).collect();
        let number = |n: usize| u32::try_from(n).map_err(|_| format!("{n} does not fit a launch"));
        let [x, y, z] = shape.grid;
        let shape = EmuShape {
            grid: [number(x)?, number(y)?, number(z)?],
            block: [number(shape.threads)?, 1, 1],
            cluster: [number(shape.cluster)?, 1, 1],
            smem: number(shared)?,
            dependent: 0,
            dependents: 0,
            resident: 0,
        };
        let mut report = vec![0u8; REPORT];
        let _one = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the signature is that of launch.cpp. The name and the shape live on; there are as many arguments of
        // the right sizes as the kernel takes (`agree`), each in memory of its own; the report has the stated length.
        let status = unsafe {
            let run = self.symbol::<LaunchFn>(c"emu_launch")?;
            run(name.as_ptr(), &shape, pointers.as_mut_ptr(), report.as_mut_ptr().cast(), report.len())
        };
        if status == 0 { Ok(()) } else { Err(text(&report)) }
    }

    /// The kernel takes arguments of these sizes.
    fn agree(&self, name: &CStr, args: &[Arg]) -> Result<(), String> {
        let mut sizes = [0usize; 32];
        // SAFETY: the signature is that of launch.cpp, which writes at most 32 sizes.
        let count = unsafe {
            let ask = self.symbol::<ArgumentsFn>(c"emu_arguments")?;
            ask(name.as_ptr(), sizes.as_mut_ptr())
        };
        let given: Vec<usize> = args.iter().map(size).collect();
        let taken = usize::try_from(count).ok().map(|n| &sizes[..n]);
        if taken == Some(given.as_slice()) {
            return Ok(());
        }
        Err(format!("the kernel takes arguments of {taken:?} bytes, the launcher gives {given:?}"))
    }

    fn value(&self, arg: &Arg) -> Result<Value, String> {
        let mut value = Value([0; 128]);
        let mut put = |bytes: &[u8]| value.0[..bytes.len()].copy_from_slice(bytes);
        match arg {
            Arg::Address(v) | Arg::U64(v) => put(&v.to_ne_bytes()),
            Arg::I32(v) => put(&v.to_ne_bytes()),
            Arg::U32(v) => put(&v.to_ne_bytes()),
            Arg::F32(v) => put(&v.to_ne_bytes()),
            Arg::Map(map) => self.encode(map, &mut value)?,
        }
        Ok(value)
    }

    fn encode(&self, map: &TensorMap, value: &mut Value) -> Result<(), String> {
        let number = |n: usize| u32::try_from(n).map_err(|e| e.to_string());
        let code = |n: u32| c_int::try_from(n).map_err(|e| e.to_string());
        // SAFETY: the signature is that of tma.cpp: it writes 128 bytes and reads at most five numbers of each array.
        let wrong = unsafe {
            let encode = self.symbol::<MapFn>(c"emu_tensor_map")?;
            let wrong = encode(
                value.0.as_mut_ptr().cast(),
                code(map.element)?,
                number(map.rank)?,
                map.address as *mut c_void,
                map.dims.as_ptr(),
                map.strides.as_ptr(),
                map.block.as_ptr(),
                code(map.swizzle)?,
            );
            // SAFETY: null, or a literal of the runtime.
            (!wrong.is_null()).then(|| CStr::from_ptr(wrong).to_string_lossy().into_owned())
        };
        wrong.map_or(Ok(()), |why| Err(format!("tensor map: {why}")))
    }
}

/// Bytes of an argument in the kernel's signature.
fn size(arg: &Arg) -> usize {
    match arg {
        Arg::Address(_) | Arg::U64(_) => 8,
        Arg::I32(_) | Arg::U32(_) | Arg::F32(_) => 4,
        Arg::Map(_) => 128,
    }
}

fn text(report: &[u8]) -> String {
    let end = report.iter().position(|b| *b == 0).unwrap_or(report.len());
    String::from_utf8_lossy(&report[..end]).into_owned()
}
