//! The pinned compiler of `tools/setup/cuda_compiler.py`: where it is and how it is called.

use crate::cubins::archive::Key;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A CUDA compiler and its disassembler.
#[derive(Clone, Debug)]
pub struct Nvcc {
    root: PathBuf,
    bin: PathBuf,
    version: String,
    /// Headers of CUTLASS, where its wheel is installed.
    pub cutlass: Option<PathBuf>,
}

/// What came of one source for one architecture.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// What compiler and assembler said.
    pub log: String,
    /// The disassembly.
    pub sass: String,
}

impl Nvcc {
    /// The compiler in `.venv-cuda`, or in the folder that `GRAFT_CUDA` names (with `bin/nvcc`).
    ///
    /// # Errors
    /// Why there is none.
    pub fn find(root: &Path) -> Result<Nvcc, String> {
        let libraries = root.join(".venv-cuda/lib");
        let site = std::fs::read_dir(&libraries)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
            .map(|e| e.path().join("site-packages"))
            .find(|p| p.is_dir());
        let home = std::env::var_os("GRAFT_CUDA").map(PathBuf::from).or(site.as_ref().map(|s| s.join("nvidia/cu13")));
        let Some(bin) = home.map(|h| h.join("bin")).filter(|b| b.join("nvcc").is_file()) else {
            return Err("no CUDA compiler; run python3 tools/setup/cuda_compiler.py".to_string());
        };
        let output = Command::new(bin.join("nvcc")).arg("--version").output().map_err(|e| format!("nvcc: {e}"))?;
        let cutlass = site.map(|s| s.join("cutlass_library/source/include")).filter(|p| p.is_dir());
        let version = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(Nvcc { root: root.to_path_buf(), bin, version, cutlass })
    }

    /// Compiles `source`, relative to the repository, for `sm_<arch>`; kept in `target/nvcc` by what it depends on.
    ///
    /// # Errors
    /// What the compiler said.
    pub fn compile(&self, source: &str, arch: &str, extra: &[String]) -> Result<Compiled, String> {
        let folder = self.root.join("target/nvcc");
        std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let stem = folder.join(self.key(source, arch, extra)?);
        let (log_file, sass_file) = (stem.with_extension("log"), stem.with_extension("sass"));
        if let (Ok(log), Ok(sass)) = (std::fs::read_to_string(&log_file), std::fs::read_to_string(&sass_file)) {
            return Ok(Compiled { log, sass });
        }
        let cubin = stem.with_extension(format!("{}.cubin", std::process::id()));
        let mut nvcc = Command::new(self.bin.join("nvcc"));
        nvcc.args(["-std=c++20", "-O3", "-cubin", "-Xptxas", "-v"])
            .arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"))
            .args(extra)
            .arg("-o")
            .arg(&cubin)
            .arg(self.root.join(source));
        let output = nvcc.output().map_err(|e| format!("nvcc: {e}"))?;
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            return Err(format!("does not compile\n{log}"));
        }
        // The disassembler calls another tool, which lies beside it.
        let path = std::env::var("PATH").unwrap_or_default();
        let dump = Command::new(self.bin.join("cuobjdump"))
            .arg("-sass")
            .arg(&cubin)
            .env("PATH", format!("{}:{path}", self.bin.display()))
            .output()
            .map_err(|e| format!("cuobjdump: {e}"))?;
        let _ = std::fs::remove_file(&cubin);
        if !dump.status.success() {
            return Err(format!("cuobjdump: {}", String::from_utf8_lossy(&dump.stderr)));
        }
        let sass = String::from_utf8_lossy(&dump.stdout).into_owned();
        std::fs::write(&sass_file, &sass).map_err(|e| format!("{}: {e}", sass_file.display()))?;
        std::fs::write(&log_file, &log).map_err(|e| format!("{}: {e}", log_file.display()))?;
        Ok(Compiled { log, sass })
    }

    /// Version of the toolkit, as 1000·major + 10·minor.
    ///
    /// # Errors
    /// When the compiler does not say.
    pub fn toolkit(&self) -> Result<u32, String> {
        let release = self.version.split("release ").nth(1).and_then(|rest| rest.split(',').next());
        let number = release
            .and_then(|r| r.split_once('.'))
            .and_then(|(major, minor)| Some(1000 * major.parse::<u32>().ok()? + 10 * minor.parse::<u32>().ok()?));
        number.ok_or_else(|| format!("nvcc says no release: {}", self.version))
    }

    /// Compiles a text that has its headers in it, for the archive of compiled kernels; kept in `target/nvcc`.
    ///
    /// # Errors
    /// What the compiler said.
    pub fn code(&self, key: &Key, text: &str) -> Result<Vec<u8>, String> {
        let mut hash = Sha256::new();
        for word in [text, &self.version, &key.element, &key.target] {
            hash.update(word);
            hash.update([0]);
        }
        let name: String = hash.finalize()[..8].iter().map(|b| format!("{b:02x}")).collect();
        let folder = self.root.join("target/nvcc");
        std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let kept = folder.join(format!("{name}.code"));
        if let Ok(code) = std::fs::read(&kept) {
            return Ok(code);
        }
        let source = folder.join(format!("{name}.cu"));
        let unfinished = folder.join(format!("{name}.{}.tmp", std::process::id()));
        std::fs::write(&source, text).map_err(|e| format!("{}: {e}", source.display()))?;
        let kind = match key.target.strip_prefix("sm_") {
            Some(arch) => vec!["-cubin".to_string(), format!("-gencode=arch=compute_{arch},code=sm_{arch}")],
            None => vec!["-ptx".to_string(), format!("-arch={}", key.target)],
        };
        let define = format!("-DELEMENT_{}", key.element.to_uppercase());
        let mut nvcc = Command::new(self.bin.join("nvcc"));
        nvcc.args(["-std=c++20", "-O3"]).args(kind).arg(define).arg("-o").arg(&unfinished).arg(&source);
        let output = nvcc.output().map_err(|e| format!("nvcc: {e}"))?;
        let _ = std::fs::remove_file(&source);
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(format!("{} {} for {} does not compile\n{said}", key.source, key.element, key.target));
        }
        std::fs::rename(&unfinished, &kept).map_err(|e| format!("{}: {e}", kept.display()))?;
        std::fs::read(&kept).map_err(|e| format!("{}: {e}", kept.display()))
    }

    /// A name from the text of the source, of its folder's and the shared headers, the compiler and its flags.
    fn key(&self, source: &str, arch: &str, extra: &[String]) -> Result<String, String> {
        let mut hash = Sha256::new();
        let path = self.root.join(source);
        let mut texts = vec![path.clone()];
        for folder in [Some(self.root.join("kernels-cu/common")), path.parent().map(Path::to_path_buf)] {
            let entries = std::fs::read_dir(folder.unwrap_or_default()).map_err(|e| format!("{source}: {e}"))?;
            texts.extend(
                entries.filter_map(Result::ok).map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "cuh")),
            );
        }
        texts[1..].sort();
        for text in &texts {
            hash.update(std::fs::read(text).map_err(|e| format!("{}: {e}", text.display()))?);
        }
        for word in [self.version.as_str(), arch, source].into_iter().chain(extra.iter().map(String::as_str)) {
            hash.update(word);
            hash.update([0]);
        }
        Ok(hash.finalize()[..8].iter().map(|b| format!("{b:02x}")).collect())
    }
}
