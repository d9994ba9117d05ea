//! The program from outside: instructions of small runs, what is loaded of it, and its system calls at the start.

use super::table::Measured;
use super::{Outcome, root};
use std::path::Path;
use std::process::{Command, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_graft");

/// Small runs, by name. Pictures go to a file of the temporary folder, which `{out}` stands for.
const RUNS: [(&str, &[&str]); 3] = [
    ("help", &["--help"]),
    ("inspect", &["inspect", "assets/fashion-dit/model"]),
    (
        "sample",
        &[
            "sample",
            "--model",
            "assets/fashion-dit/model",
            "--class-labels",
            "1",
            "--steps",
            "1",
            "--guidance-scale",
            "1",
            "--threads",
            "1",
            "-o",
            "{out}",
        ],
    ),
];

fn measured(on: &str, case: &str, what: &str, value: u64) -> Measured {
    Measured { on: on.into(), case: case.into(), what: what.into(), value }
}

/// A command without the environment of the tests: what cargo sets there has the loader look in more places.
fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
}

/// Whether a tool of this machine runs.
fn has(tool: &str) -> Result<(), String> {
    let outcome = Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    match outcome {
        Ok(status) if status.success() => Ok(()),
        _ => Err(format!("{tool} is not installed")),
    }
}

/// Instructions as valgrind counts them: it knows no AVX-512, so these are of the AVX2 paths.
pub fn instructions() -> Outcome {
    if cfg!(not(target_arch = "x86_64")) {
        return Err("the accepted counts are of x86-64".into());
    }
    has("valgrind")?;
    let out = std::env::temp_dir().join(format!("graft-guard-{}.png", std::process::id()));
    let mut values = Vec::new();
    for (name, arguments) in RUNS {
        let arguments = arguments.iter().map(|a| a.replace("{out}", &out.display().to_string()));
        let mut valgrind = command("valgrind");
        valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null", PROGRAM]).args(arguments);
        let ran = valgrind.current_dir(root()).output().map_err(|e| e.to_string())?;
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        if !ran.status.success() && said.contains("valgrind:") {
            return Err(format!("valgrind cannot run it here: {}", said.lines().next().unwrap_or_default()));
        }
        assert!(ran.status.success(), "{name}: {said}");
        // `==1== Collected : 123456`
        let count = said.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
        values.push(measured("avx2", name, "instructions", count.ok_or("callgrind gave no count")?));
    }
    // Only the picture of this run.
    let _ = std::fs::remove_file(&out);
    Ok(values)
}

/// Bytes of the file that are loaded: code and data without symbols, whether or not the file is stripped.
pub fn size() -> Outcome {
    let bytes = std::fs::read(Path::new(PROGRAM)).map_err(|e| e.to_string())?;
    let loaded = loaded(&bytes).ok_or("the program is no 64-bit ELF file")?;
    Ok(vec![measured(std::env::consts::ARCH, "graft", "bytes loaded", loaded)])
}

/// Sum of the loadable segments of a little-endian 64-bit ELF file.
fn loaded(bytes: &[u8]) -> Option<u64> {
    if bytes.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let number = |at: usize, len: usize| -> Option<u64> {
        Some(bytes.get(at..at + len)?.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    };
    let (table, size, count) = (number(32, 8)? as usize, number(54, 2)? as usize, number(56, 2)? as usize);
    let mut sum = 0;
    for header in (0..count).map(|i| table + i * size) {
        if number(header, 4)? == 1 {
            sum += number(header + 32, 8)?;
        }
    }
    Some(sum)
}

/// System calls of `graft --help`.
pub fn start() -> Outcome {
    has("strace")?;
    let ran = command("strace").args(["-f", "-c", PROGRAM, "--help"]).output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&ran.stderr).into_owned();
    // The last line of the table: `100.00 0.001 12 89 3 total`; the errors may be absent.
    let total = said.lines().rfind(|line| line.trim_end().ends_with("total"));
    let fields: Vec<&str> = total.unwrap_or_default().split_whitespace().collect();
    let calls = fields.get(3).and_then(|field| field.parse().ok());
    let why = || format!("strace cannot trace here: {}", said.lines().next().unwrap_or_default());
    Ok(vec![measured(std::env::consts::ARCH, "help", "system calls", calls.ok_or_else(why)?)])
}

#[test]
fn loadable_segments_are_summed() {
    let mut file = vec![0u8; 64 + 3 * 56];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[32] = 64;
    file[54] = 56;
    file[56] = 3;
    for (i, (kind, size)) in [(1u8, 100u8), (2, 50), (1, 7)].into_iter().enumerate() {
        file[64 + i * 56] = kind;
        file[64 + i * 56 + 32] = size;
    }
    assert_eq!(loaded(&file), Some(107));
    assert_eq!(loaded(b"MZ"), None);
    assert_eq!(loaded(&file[..80]), None);
}
