//! Kernels compiled by the host compiler, a folder for each set of texts and flags.

use crate::launch::ElementType;
use sha2::{Digest, Sha256};
use std::fmt;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

/// How kernels are compiled for the emulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Build {
    /// Optimised, a shared object: fast enough for many seeds.
    Plain,
    /// With AddressSanitizer and UndefinedBehaviorSanitizer.
    Asan,
    /// With ThreadSanitizer on the clocks of the emulator.
    Tsan,
}

impl Build {
    /// All three.
    pub const ALL: [Build; 3] = [Build::Plain, Build::Asan, Build::Tsan];

    /// Name in tables and file names.
    pub fn name(self) -> &'static str {
        match self {
            Build::Plain => "plain",
            Build::Asan => "asan",
            Build::Tsan => "tsan",
        }
    }

    fn kernel_flags(self) -> &'static [&'static str] {
        match self {
            Build::Plain => &["-O2"],
            Build::Asan => &["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
            Build::Tsan => &["-O1", "-g1", "-fsanitize=thread"],
        }
    }

    /// The runtime reports its accesses to the race checker by itself: it is not instrumented, and none of its loops
    /// may become a call of memcpy, which is intercepted.
    fn runtime_flags(self) -> &'static [&'static str] {
        match self {
            Build::Plain => &["-O2"],
            Build::Asan => &["-O1", "-g1", "-fsanitize=address"],
            Build::Tsan => &["-O2", "-g1", "-DEMU_TSAN", "-fno-tree-loop-distribute-patterns"],
        }
    }
}

impl fmt::Display for Build {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A host compiler that can build the emulator.
#[derive(Clone, Debug)]
pub struct Toolchain {
    root: PathBuf,
    builds: PathBuf,
    compiler: String,
    version: String,
    target: &'static [&'static str],
    /// Contents of the emulator and of the shared headers, hashed.
    sources: [u8; 32],
}

/// A compiled set of kernels.
#[derive(Clone, Debug)]
pub struct Program {
    /// How it was compiled.
    pub build: Build,
    /// The program that runs case files.
    pub driver: PathBuf,
    /// The shared object of the kernels, where they are not linked into the driver.
    pub library: Option<PathBuf>,
    /// What it was compiled from.
    pub sources: Vec<String>,
}

/// Flags of every compilation. GPUs fuse multiply and add; so does the host where it can.
const FLAGS: [&str; 7] = ["-std=c++20", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"];

impl Toolchain {
    /// The compiler named by `CXX`, else `g++`, `clang++` or `c++`; `root` holds `kernels-cu`, and what is compiled goes
    /// into `builds`.
    ///
    /// # Errors
    /// Why this machine has none.
    pub fn find(root: &Path, builds: &Path) -> Result<Toolchain, String> {
        if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
            return Err("the emulator switches stacks on x86-64 Linux alone".to_string());
        }
        let chosen = std::env::var("CXX").ok();
        let candidates = match &chosen {
            Some(name) => vec![name.as_str()],
            None => vec!["g++", "clang++", "c++"],
        };
        let version = |name: &str| {
            let output = Command::new(name).arg("--version").output().ok()?;
            output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let Some((compiler, version)) = candidates.iter().find_map(|c| Some((c.to_string(), version(c)?))) else {
            return Err(format!("no C++ compiler ({}); install g++ 12 or set CXX", candidates.join(", ")));
        };
        let kernels = root.join("kernels-cu");
        let mut hash = Sha256::new();
        for folder in ["emu", "common"] {
            hash_folder(&mut hash, &kernels.join(folder))?;
        }
        Ok(Toolchain {
            root: root.to_path_buf(),
            builds: builds.to_path_buf(),
            compiler,
            version,
            target: if fused_multiply_add() { &["-march=x86-64-v3"] } else { &[] },
            sources: hash.finalize().into(),
        })
    }

    /// Compiles `sources`, paths relative to the folder that holds `kernels-cu`, into one program, unless the same
    /// texts were compiled before.
    ///
    /// # Errors
    /// What the compiler said; warnings count.
    pub fn compile(&self, sources: &[String], element: Option<ElementType>, build: Build) -> Result<Program, String> {
        let runtime = self.prepare(build)?;
        let mut flags = build.kernel_flags().to_vec();
        flags.extend(element.map(ElementType::define));
        let mut hash = self.hash(&flags);
        let paths: Vec<PathBuf> = sources.iter().map(|s| self.root.join(s)).collect();
        let mut folders: Vec<&Path> = paths.iter().filter_map(|p| p.parent()).collect();
        folders.dedup();
        for folder in folders {
            hash_folder(&mut hash, folder)?;
        }
        sources.iter().for_each(|source| hash.update(source));
        let folder = self.folder(hash)?;
        let [linked, driver] = ["runtime.o", "driver.o"].map(|o| runtime.join(o).display().to_string());
        let paths: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
        // A source is C++ to the host compiler whatever its name ends in; objects are not.
        let mut inputs = vec!["-x", "c++"];
        inputs.extend(paths.iter().map(String::as_str));
        inputs.extend(["-x", "none", linked.as_str()]);
        if build == Build::Plain {
            let library = folder.join("kernels.so");
            inputs.push("-shared");
            self.run(&library, &flags, &inputs)?;
            Ok(Program { build, driver: runtime.join("driver"), library: Some(library), sources: sources.to_vec() })
        } else {
            let program = folder.join("kernels");
            // The checkers find their hooks in the program.
            inputs.extend([driver.as_str(), "-ldl", "-rdynamic"]);
            self.run(&program, &flags, &inputs)?;
            Ok(Program { build, driver: program, library: None, sources: sources.to_vec() })
        }
    }

    /// Compiles the runtime and the driver of a build, which every program of it needs; gives their folder. Prepare
    /// a build before compiling several programs of it at once.
    ///
    /// # Errors
    /// As [`Toolchain::compile`].
    pub fn prepare(&self, build: Build) -> Result<PathBuf, String> {
        let folder = self.folder(self.hash(build.runtime_flags()))?;
        let emulator = self.root.join("kernels-cu/emu");
        let source = |name: &str| emulator.join(name).display().to_string();
        self.run(&folder.join("runtime.o"), build.runtime_flags(), &["-c", &source("runtime.cpp")])?;
        let sanitize: &[&str] = if build == Build::Asan { &["-fsanitize=address"] } else { &[] };
        self.run(&folder.join("driver.o"), &["-O1"], &[&["-c", &source("driver.cpp")], sanitize].concat())?;
        if build == Build::Plain {
            let object = folder.join("driver.o").display().to_string();
            self.run(&folder.join("driver"), &["-O1"], &[&object, "-ldl"])?;
        }
        Ok(folder)
    }

    fn hash(&self, flags: &[&str]) -> Sha256 {
        let mut hash = Sha256::new();
        hash.update(self.sources);
        for text in [self.compiler.as_str(), self.version.as_str()].iter().chain(self.target).chain(&FLAGS).chain(flags)
        {
            hash.update(text);
            hash.update([0]);
        }
        hash
    }

    fn folder(&self, hash: Sha256) -> Result<PathBuf, String> {
        let mut name = String::new();
        for byte in &hash.finalize()[..8] {
            // Writing to a string cannot fail.
            let _ = write!(name, "{byte:02x}");
        }
        let folder = self.builds.join(name);
        std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        Ok(folder)
    }

    /// Runs the compiler unless `output` is there; it appears whole or not at all.
    fn run(&self, output: &Path, flags: &[&str], inputs: &[&str]) -> Result<(), String> {
        if output.is_file() {
            return Ok(());
        }
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let unfinished = output.with_extension(format!("{}-{number}.tmp", std::process::id()));
        let mut command = Command::new(&self.compiler);
        command.args(FLAGS).args(self.target).args(flags).args(inputs).arg("-o").arg(&unfinished);
        let result = command.output().map_err(|e| format!("{}: {e}", self.compiler))?;
        let said = String::from_utf8_lossy(&result.stderr);
        if !result.status.success() || !said.trim().is_empty() {
            let _ = std::fs::remove_file(&unfinished);
            return Err(format!("{command:?}\n{said}"));
        }
        std::fs::rename(&unfinished, output).map_err(|e| format!("{}: {e}", output.display()))
    }
}

fn hash_folder(hash: &mut Sha256, folder: &Path) -> Result<(), String> {
    let entries = std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|e| e.ok()).map(|e| e.path()).filter(|p| p.is_file()).collect();
    files.sort();
    let is_source =
        |p: &&PathBuf| p.extension().and_then(|e| e.to_str()).is_some_and(|e| ["h", "cpp", "cu", "cuh"].contains(&e));
    for file in files.iter().filter(is_source) {
        hash.update(file.file_name().map(|n| n.as_encoded_bytes()).unwrap_or_default());
        hash.update(std::fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?);
    }
    Ok(())
}

#[cfg(target_arch = "x86_64")]
fn fused_multiply_add() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
}

#[cfg(not(target_arch = "x86_64"))]
fn fused_multiply_add() -> bool {
    false
}
