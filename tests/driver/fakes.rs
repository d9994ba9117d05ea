//! The fake driver and the fake run-time compiler, built by the host's compiler into `target/driver/`.

use graft_kernels::archive::digest;
use graft_kernels::emu::{Build, Toolchain};
use graft_tools::codegen::workspace_root;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a child needs to run on the fakes.
pub struct Fakes {
    /// Folder with both libraries.
    pub both: PathBuf,
    /// Folder with the driver alone.
    pub driver_alone: PathBuf,
    /// Variables that the fake compiler reads.
    pub variables: Vec<(&'static str, String)>,
}

/// Builds them unless the same texts were built before.
///
/// # Errors
/// `Err(Ok(why))` where this machine cannot, `Err(Err(said))` where they do not compile.
pub fn build() -> Result<Fakes, Result<String, String>> {
    let root = workspace_root();
    let toolchain = Toolchain::find(&root, &root.join("target/emu")).map_err(Ok)?;
    let compiler = compiler();
    let runtime = toolchain.prepare(Build::Plain).map_err(Err)?.join("runtime.o");
    let sources = root.join("tests/driver/fake");
    let names = ["driver.h", "driver.cpp", "modules.cpp", "nvrtc.cpp"];
    let texts: Vec<u8> =
        names.iter().map(|n| std::fs::read(sources.join(n)).unwrap_or_default()).collect::<Vec<_>>().concat();
    let folder = root.join("target/driver").join(format!("{:032x}", digest(&[&texts, compiler.as_bytes()].concat())));
    let (both, driver_alone) = (folder.join("both"), folder.join("driver"));
    for library in [&both, &driver_alone] {
        std::fs::create_dir_all(library).map_err(|e| Err(format!("{}: {e}", library.display())))?;
    }
    let make = |output: PathBuf, parts: &[&str]| -> Result<(), Result<String, String>> {
        if output.is_file() {
            return Ok(());
        }
        let unfinished = output.with_extension(format!("{}.tmp", std::process::id()));
        let mut command = Command::new(&compiler);
        command.args(["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]);
        command.args(["-Wno-unused-result"]).args(parts.iter().map(|p| sources.join(p)));
        let said = command.arg("-ldl").arg("-o").arg(&unfinished).output().map_err(|e| Err(e.to_string()))?;
        if !said.status.success() {
            return Err(Err(String::from_utf8_lossy(&said.stderr).into_owned()));
        }
        std::fs::rename(&unfinished, &output).map_err(|e| Err(e.to_string()))
    };
    make(driver_alone.join("libcuda.so.1"), &["driver.cpp", "modules.cpp"])?;
    make(both.join("libcuda.so.1"), &["driver.cpp", "modules.cpp"])?;
    make(both.join("libnvrtc.so"), &["nvrtc.cpp"])?;
    let text = |p: &Path| p.display().to_string();
    let variables = vec![
        ("FAKE_CXX", compiler),
        ("FAKE_KERNELS", text(&root.join("kernels-cu"))),
        ("FAKE_RUNTIME", text(&runtime)),
        ("FAKE_FLAGS", if fused_multiply_add() { "-march=x86-64-v3".to_string() } else { String::new() }),
    ];
    Ok(Fakes { both, driver_alone, variables })
}

/// The one that [`Toolchain::find`] takes.
fn compiler() -> String {
    let works = |name: &str| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success());
    let chosen = std::env::var("CXX").ok();
    chosen.unwrap_or_else(|| ["g++", "clang++"].into_iter().find(|n| works(n)).unwrap_or("c++").to_string())
}

#[cfg(target_arch = "x86_64")]
fn fused_multiply_add() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
}

#[cfg(not(target_arch = "x86_64"))]
fn fused_multiply_add() -> bool {
    false
}
