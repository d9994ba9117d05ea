//! The run-time compiler: a library that is used if it is there.

use super::driver::version_text;
use crate::error::{Error, Result};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;

/// Names the library where it is not on the library path.
pub const VARIABLE: &str = "GRAFT_NVRTC";

/// File names under which it is installed, newest first.
const NAMES: [&str; 4] = ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "nvrtc64_120_0.dll"];

type Program = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
type ErrorString = unsafe extern "C" fn(c_int) -> *const c_char;

/// The library and its functions, which stay as long as it is loaded.
pub(super) struct Nvrtc {
    create: Create,
    compile: Compile,
    cubin_size: Size,
    cubin: Text,
    log_size: Size,
    log: Text,
    destroy: Destroy,
    error: ErrorString,
    /// As 1000·major + 10·minor.
    pub version: i32,
    /// The name under which it was found.
    pub name: String,
    _library: Library,
    /// What it needs from its own folder.
    _builtins: Option<Library>,
}

/// The library asks for its second half by name alone: where it was named by path, the second half is taken from the
/// same folder, which need not be on the library path.
fn builtins(name: &str, major: c_int, minor: c_int) -> Option<Library> {
    let folder = Path::new(name).parent().filter(|f| !f.as_os_str().is_empty())?;
    let path = folder.join(format!("libnvrtc-builtins.so.{major}.{minor}"));
    // SAFETY: as the first half. Where it is missing, the compiler says so itself.
    #[allow(unsafe_code)]
    let half = unsafe { Library::new(path) };
    half.ok()
}

impl Nvrtc {
    /// Loads the library that [`VARIABLE`] names, else the first of its usual names.
    ///
    /// # Errors
    /// Which names were tried and what the loader said.
    pub fn load() -> std::result::Result<Nvrtc, String> {
        let named = std::env::var(VARIABLE).ok().filter(|v| !v.is_empty());
        let names: Vec<&str> = named.as_deref().map_or(NAMES.to_vec(), |name| vec![name]);
        let mut said = String::new();
        for name in &names {
            // SAFETY: the library's constructors run; it is NVIDIA's, or one that the user names.
            #[allow(unsafe_code)]
            match unsafe { Library::new(*name) } {
                Ok(library) => return Nvrtc::of(library, name).map_err(|e| format!("{name}: {e}")),
                Err(e) => said = e.to_string(),
            }
        }
        Err(format!("no {} ({said})", names.join(", ")))
    }

    fn of(library: Library, name: &str) -> std::result::Result<Nvrtc, String> {
        fn find<F: Copy>(library: &Library, name: &str) -> std::result::Result<F, String> {
            // SAFETY: the types above are those of nvrtc.h, which have not changed since CUDA 11.1.
            #[allow(unsafe_code)]
            unsafe { library.get::<F>(name.as_bytes()) }.map(|f| *f).map_err(|e| e.to_string())
        }
        let ask: Version = find(&library, "nvrtcVersion")?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both pointers are to live numbers.
        #[allow(unsafe_code)]
        let answer = unsafe { ask(&mut major, &mut minor) };
        if answer != 0 {
            return Err(format!("nvrtcVersion answers {answer}"));
        }
        Ok(Nvrtc {
            create: find(&library, "nvrtcCreateProgram")?,
            compile: find(&library, "nvrtcCompileProgram")?,
            cubin_size: find(&library, "nvrtcGetCUBINSize")?,
            cubin: find(&library, "nvrtcGetCUBIN")?,
            log_size: find(&library, "nvrtcGetProgramLogSize")?,
            log: find(&library, "nvrtcGetProgramLog")?,
            destroy: find(&library, "nvrtcDestroyProgram")?,
            error: find(&library, "nvrtcGetErrorString")?,
            version: 1000 * major + 10 * minor,
            name: name.to_string(),
            _library: library,
            _builtins: builtins(name, major, minor),
        })
    }

    /// Compiles a text to machine code.
    ///
    /// # Errors
    /// The compiler's first lines.
    pub fn compile(&self, name: &str, text: &str, options: &[String]) -> Result<Vec<u8>> {
        let refuse = |problem: String| {
            Error::failure(format!("cuda: {name}"), problem).is(format!(
                "NVRTC {} ({})",
                version_text(self.version),
                self.name
            ))
        };
        let c_string = |text: &str| CString::new(text).map_err(|_| refuse("a text holds a zero byte".to_string()));
        let (text, file) = (c_string(text)?, c_string(name)?);
        let options = options.iter().map(|o| c_string(o)).collect::<Result<Vec<_>>>()?;
        let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: the texts end in zero and live as long as the calls; the program is destroyed below.
        #[allow(unsafe_code)]
        let made = unsafe { (self.create)(&mut program, text.as_ptr(), file.as_ptr(), 0, none, none) };
        if made != 0 {
            return Err(refuse(format!("cannot start the compiler: {}", self.reason(made))));
        }
        // SAFETY: as above; the count is that of the pointers.
        #[allow(unsafe_code)]
        let compiled = unsafe { (self.compile)(program, options.len() as c_int, options.as_ptr()) };
        let result = if compiled == 0 {
            self.fetch(program, self.cubin_size, self.cubin).map_err(|e| refuse(format!("cannot get the code: {e}")))
        } else {
            let log = self.fetch(program, self.log_size, self.log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<&str> = log.lines().filter(|l| l.contains("error")).take(3).collect();
            Err(refuse(format!("does not compile: {}: {}", self.reason(compiled), lines.join(" | ")))
                .fix("use the NVRTC of CUDA 12.0 or newer; if it is, this is a defect of graft: report the message"))
        };
        // SAFETY: made above and not used after.
        #[allow(unsafe_code)]
        unsafe {
            (self.destroy)(&mut program);
        }
        result
    }

    /// Bytes whose number one function tells and another writes.
    fn fetch(&self, program: Program, size: Size, bytes: Text) -> std::result::Result<Vec<u8>, String> {
        let mut length = 0;
        // SAFETY: the program lives and the pointer is to a live number.
        #[allow(unsafe_code)]
        let answer = unsafe { size(program, &mut length) };
        if answer != 0 {
            return Err(self.reason(answer));
        }
        let mut buffer = vec![0u8; length];
        // SAFETY: the buffer has as many bytes as the compiler said that it writes.
        #[allow(unsafe_code)]
        let answer = unsafe { bytes(program, buffer.as_mut_ptr().cast()) };
        if answer == 0 { Ok(buffer) } else { Err(self.reason(answer)) }
    }

    fn reason(&self, code: c_int) -> String {
        // SAFETY: the library gives a text of its own for any number.
        #[allow(unsafe_code)]
        let text = unsafe { (self.error)(code) };
        if text.is_null() {
            return format!("error {code}");
        }
        // SAFETY: not null, ends in zero, and lives as long as the library.
        #[allow(unsafe_code)]
        let text = unsafe { CStr::from_ptr(text) };
        text.to_string_lossy().into_owned()
    }
}
