//! Where a kernel comes from: the archive of compiled kernels, the disk cache, or the run-time compiler.
//!
//! An entry of the archive counts only if it was made from the very text that this program carries. What the compiler
//! makes is kept under the hash of that text, the options, the architecture and the compiler's version.

use super::driver::{Handle, check, refused, version_text};
use super::notices;
use super::nvrtc::{Nvrtc, VARIABLE};
use crate::error::{Error, Result};
use crate::io::cache::{self, Cache, Lookup};
use cudarc::driver::{result, sys};
use graft_kernels::archive::{Archive, digest};
use graft_kernels::launch::{ElementType, Kernel};
use graft_kernels::sources;
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::Arc;

/// File name of the archive beside the program.
pub const ARCHIVE: &str = "graft.cubins";

#[cfg(feature = "cubins")]
const EMBEDDED: Option<&[u8]> = Some(include_bytes!("../../../../target/release/graft.cubins"));
#[cfg(not(feature = "cubins"))]
const EMBEDDED: Option<&[u8]> = None;

/// Options of every compilation at run time. The second makes plain functions those of the device: there is no other.
const OPTIONS: [&str; 2] = ["-std=c++20", "-default-device"];

/// How many sources came from where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origins {
    /// From the archive.
    pub archive: usize,
    /// From the disk cache.
    pub cache: usize,
    /// Compiled at run time.
    pub compiled: usize,
}

/// A kernel that is loaded.
#[derive(Clone, Debug)]
pub(super) struct Function {
    pub handle: Handle<sys::CUfunc_st>,
    /// Bytes of its arguments in order, where the driver tells them (from CUDA 12.4 on).
    pub arguments: Option<Arc<[usize]>>,
    /// Most dynamic shared memory that it was prepared for.
    pub shared: usize,
}

/// The device that kernels are for.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub label: String,
    /// 10·major + minor of the compute capability.
    pub arch: u32,
    /// CUDA version of the driver.
    pub driver: i32,
}

/// What the run-time compiler makes code for.
fn machine(arch: u32) -> String {
    if arch == 90 { "sm_90a".to_string() } else { format!("sm_{arch}") }
}

/// Options of the run-time compiler.
fn options(element: ElementType, arch: u32) -> Vec<String> {
    let chosen = [element.define().to_string(), format!("--gpu-architecture={}", machine(arch))];
    OPTIONS.map(str::to_string).into_iter().chain(chosen).collect()
}

/// Compiles a source with the run-time compiler, as a device of this compute capability (10·major + minor) would have
/// it; no device is needed.
///
/// # Errors
/// When there is no such source or no compiler, or what the compiler says.
pub fn compile(op: &str, source: &str, element: ElementType, arch: u32) -> Result<Vec<u8>> {
    let text = unit(op, source)?;
    let nvrtc = Nvrtc::load().map_err(|why| Error::failure("cuda kernels", "no run-time compiler").is(why))?;
    nvrtc.compile(source, &text, &options(element, arch))
}

fn unit(op: &str, source: &str) -> Result<String> {
    sources::unit(op, source).ok_or_else(|| {
        Error::failure(format!("cuda: {source}"), "this program carries no such source")
            .fix("run cargo xtask codegen and build again")
    })
}

impl Target {
    /// Entries of an archive that run here, best first.
    fn accepted(&self) -> &'static [&'static str] {
        match self.arch {
            80..=89 => &["sm_80"],
            90 => &["sm_90a"],
            _ => &["compute_80"],
        }
    }
}

/// The archive that is used, if any: where it lies and what it has.
pub(super) fn open_archive(driver: i32) -> Option<(String, Archive)> {
    let found = match EMBEDDED {
        Some(bytes) => Some(("in the program".to_string(), Archive::parse(bytes))),
        None => match cache::beside_program(ARCHIVE) {
            Ok(file) => file.map(|(path, bytes)| (path.display().to_string(), Archive::parse(bytes))),
            Err(e) => {
                notices::leave(e.to_string());
                None
            }
        },
    };
    let (place, archive) = found?;
    match archive {
        // Within a major version every driver loads the code of every toolkit.
        Ok(archive) if archive.toolkit as i32 / 1000 > driver / 1000 => {
            notices::leave(format!(
                "{ARCHIVE} ({place}): made with CUDA {}, but the driver supports {}: kernels are compiled at run time; \
                 fix: update the driver",
                version_text(archive.toolkit as i32),
                version_text(driver)
            ));
            None
        }
        Ok(archive) => Some((place, archive)),
        Err(e) => {
            notices::leave(format!("{ARCHIVE} ({place}): {e}; it is not used; fix: install graft again"));
            None
        }
    }
}

/// The loaded kernels of a device.
pub(super) struct Modules {
    target: Target,
    archive: Option<(String, Archive)>,
    cache: Option<Cache>,
    /// None until it is needed.
    compiler: Option<std::result::Result<Nvrtc, String>>,
    loaded: HashMap<(&'static str, &'static str, ElementType), Handle<sys::CUmod_st>>,
    functions: HashMap<(&'static str, &'static str, &'static str, ElementType), Function>,
    pub origins: Origins,
}

impl Modules {
    pub fn new(target: Target) -> Modules {
        Modules {
            archive: open_archive(target.driver),
            cache: Cache::of_user("kernels"),
            compiler: None,
            loaded: HashMap::new(),
            functions: HashMap::new(),
            origins: Origins::default(),
            target,
        }
    }

    /// The function of a kernel if it is loaded.
    pub fn loaded(&mut self, kernel: &'static Kernel, element: ElementType) -> Option<&mut Function> {
        self.functions.get_mut(&(kernel.op, kernel.source, kernel.name, element))
    }

    /// Loads a kernel.
    ///
    /// # Errors
    /// When its source is for another device, cannot be had, or lacks the kernel.
    pub fn load(&mut self, kernel: &'static Kernel, element: ElementType) -> Result<()> {
        let key = (kernel.op, kernel.source, element);
        let module = match self.loaded.get(&key) {
            Some(module) => *module,
            None => {
                let module = self.module(kernel, element)?;
                self.loaded.insert(key, module);
                module
            }
        };
        let name = CString::new(kernel.name).unwrap_or_default();
        // SAFETY: the module is loaded and stays so until `release`.
        #[allow(unsafe_code)]
        let function = unsafe { result::module::get_function(module.0, name) }.map_err(|e| {
            let place = format!("{}: {}", self.target.label, kernel.source);
            refused(e, place, format!("has no kernel {} for {element}", kernel.name))
        })?;
        let arguments = self.arguments(function);
        let function = Function { handle: Handle(function), arguments, shared: 0 };
        self.functions.insert((kernel.op, kernel.source, kernel.name, element), function);
        Ok(())
    }

    /// Sizes of a kernel's arguments.
    fn arguments(&self, function: sys::CUfunction) -> Option<Arc<[usize]>> {
        // The function is new in this version; the bindings panic where it is missing.
        if self.target.driver < 12_040 {
            return None;
        }
        let mut sizes = Vec::new();
        loop {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: the function is loaded; both pointers are to live numbers.
            #[allow(unsafe_code)]
            let answer = unsafe { sys::cuFuncGetParamInfo(function, sizes.len(), &mut offset, &mut size) };
            match answer {
                sys::CUresult::CUDA_SUCCESS => sizes.push(size),
                // There is no such argument: all are known.
                sys::CUresult::CUDA_ERROR_INVALID_VALUE => return Some(sizes.into()),
                _ => return None,
            }
        }
    }

    fn module(&mut self, kernel: &'static Kernel, element: ElementType) -> Result<Handle<sys::CUmod_st>> {
        let place = format!("{}: {}", self.target.label, kernel.source);
        let fits = if kernel.arch == 90 { self.target.arch == 90 } else { self.target.arch >= kernel.arch };
        if !fits {
            return Err(Error::failure(place, "the kernel is for another architecture")
                .is(format!("compute capability {}.{}", self.target.arch / 10, self.target.arch % 10))
                .must(if kernel.arch == 90 { "9.0 (Hopper) exactly" } else { "at least 8.0" }));
        }
        let text = unit(kernel.op, kernel.source)?;
        if let Some(code) = self.archived(kernel, element, &text) {
            match self.put_in(&code) {
                Ok(module) => {
                    self.origins.archive += 1;
                    return Ok(module);
                }
                Err(e) => notices::leave(format!("{ARCHIVE}: {e}; compiled at run time instead")),
            }
        }
        let options = options(element, self.target.arch);
        let machine = machine(self.target.arch);
        let cache = self.cache.clone();
        let version = version_text(self.compiler()?.version);
        let key = Cache::key(&[&text, &options.join(" "), &machine, &version]);
        if let Some(cache) = &cache {
            match cache.get(&key) {
                Lookup::Found(code) => {
                    // An entry is as it was written, so a refusal is the driver's answer to the compiler's code.
                    let module = self.put_in(&code)?;
                    self.origins.cache += 1;
                    return Ok(module);
                }
                Lookup::Damaged(what) => notices::leave(format!("kernel cache: {what}; it is compiled again")),
                Lookup::Missing => {}
            }
        }
        let code = self.compiler()?.compile(kernel.source, &text, &options)?;
        let module = self.put_in(&code)?;
        self.origins.compiled += 1;
        match cache.map(|c| c.put(&key, &code)) {
            Some(Ok(())) => {}
            Some(Err(e)) => notices::leave(format!("kernel cache: {e}; kernels are compiled at every start")),
            None => notices::leave(format!(
                "kernel cache: no folder; kernels are compiled at every start; fix: set HOME or {}",
                cache::VARIABLE
            )),
        }
        Ok(module)
    }

    /// Code from the archive that was made of this text.
    fn archived(&self, kernel: &Kernel, element: ElementType, text: &str) -> Option<Vec<u8>> {
        let (place, archive) = self.archive.as_ref()?;
        let entry = archive.find(kernel.op, kernel.source, element.name(), self.target.accepted())?;
        if entry.digest != digest(text.as_bytes()) {
            notices::leave(format!(
                "{ARCHIVE} ({place}): {} was made from another text than this program's; it is compiled at run time; \
                 fix: make kernels",
                kernel.source
            ));
            return None;
        }
        match archive.code(entry) {
            Ok(code) => Some(code.to_vec()),
            Err(e) => {
                notices::leave(format!(
                    "{ARCHIVE} ({place}): {e}; it is compiled at run time; fix: install graft again"
                ));
                None
            }
        }
    }

    /// Gives code to the driver.
    fn put_in(&self, code: &[u8]) -> Result<Handle<sys::CUmod_st>> {
        // Assembly must end in zero; machine code knows its length.
        let code = [code, &[0]].concat();
        // SAFETY: the image is whole (its checksum held, or it comes from the compiler) and the driver copies it.
        #[allow(unsafe_code)]
        let module = unsafe { result::module::load_data(code.as_ptr().cast()) };
        module.map(Handle).map_err(|e| {
            refused(e, &self.target.label, "the driver does not load the kernels").fix(format!(
                "update the driver (it supports CUDA {}), or set {VARIABLE} to an NVRTC that is no newer",
                version_text(self.target.driver)
            ))
        })
    }

    fn compiler(&mut self) -> Result<&Nvrtc> {
        let driver = self.target.driver;
        let archive = match &self.archive {
            Some((place, _)) => format!("{place} has none that fit"),
            None => format!("no {ARCHIVE} that this driver loads lies beside the program"),
        };
        match self.compiler.get_or_insert_with(Nvrtc::load) {
            Ok(nvrtc) if nvrtc.version / 1000 > driver / 1000 => {
                Err(Error::failure("cuda kernels", "the run-time compiler is newer than the driver")
                    .is(format!("NVRTC {}, CUDA {}", version_text(nvrtc.version), version_text(driver)))
                    .must(format!("NVRTC {}.x or older", driver / 1000))
                    .fix(format!("update the driver, or set {VARIABLE} to the library of an older toolkit")))
            }
            Ok(nvrtc) => Ok(nvrtc),
            Err(why) => Err(Error::failure("cuda kernels", "no compiled kernels for this device and no compiler")
                .is(format!("{archive}; {why}"))
                .must(format!("{ARCHIVE} of this release, or NVRTC {}", version_text(super::OLDEST_DRIVER)))
                .fix(format!(
                    "put {ARCHIVE} beside the program (make kernels), or install NVRTC (part of the CUDA toolkit) and \
                     name it in {VARIABLE} or LD_LIBRARY_PATH"
                ))),
        }
    }

    /// Prepares a function for so much dynamic shared memory.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn allow_shared(label: &str, function: &mut Function, bytes: usize) -> Result<()> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is loaded.
        #[allow(unsafe_code)]
        check(
            unsafe { sys::cuFuncSetAttribute(function.handle.0, attribute, bytes as i32) },
            label,
            format!("cannot give a kernel {bytes} bytes of shared memory"),
        )?;
        function.shared = bytes;
        Ok(())
    }

    /// Unloads everything; nothing of it runs any more.
    pub fn release(&mut self) {
        self.functions.clear();
        for (_, module) in self.loaded.drain() {
            // SAFETY: loaded here, and its functions are forgotten. Best effort, as everywhere at the end.
            #[allow(unsafe_code)]
            let _ = unsafe { result::module::unload(module.0) };
        }
    }
}
