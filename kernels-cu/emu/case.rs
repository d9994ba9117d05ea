//! Case files: what to launch on which bytes, and what came back.

use super::process;
use super::toolchain::{Build, Program};
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Longest run of one case; a hang is a finding, too.
const PATIENCE: Duration = Duration::from_secs(300);

/// An argument of a kernel.
#[derive(Clone, Debug)]
pub enum Argument {
    /// Address of a byte of a buffer.
    Pointer(usize, usize),
    /// A scalar, as bytes.
    Bytes(Vec<u8>),
    /// A tensor map over a buffer.
    Map {
        /// `CUtensorMapDataType`.
        element: u32,
        /// 0, 1, 2, 3 for none, 32, 64, 128 bytes.
        swizzle: u32,
        /// Buffer and byte offset of element 0.
        buffer: (usize, usize),
        /// Elements along each dimension, innermost first.
        dims: Vec<u64>,
        /// Bytes from one element to the next along dimensions 1 and up.
        strides: Vec<u64>,
        /// Elements of a box along each dimension.
        block: Vec<u32>,
    },
}

impl From<u32> for Argument {
    fn from(v: u32) -> Argument {
        Argument::Bytes(v.to_le_bytes().to_vec())
    }
}

impl From<u64> for Argument {
    fn from(v: u64) -> Argument {
        Argument::Bytes(v.to_le_bytes().to_vec())
    }
}

impl From<f32> for Argument {
    fn from(v: f32) -> Argument {
        Argument::Bytes(v.to_le_bytes().to_vec())
    }
}

/// Buffers and launches.
#[derive(Clone, Debug, Default)]
pub struct Case {
    text: String,
    input: Vec<u8>,
    sizes: Vec<usize>,
}

impl Case {
    /// Adds a buffer with these bytes; gives its index.
    pub fn buffer(&mut self, bytes: &[u8]) -> usize {
        // Lines of a case are written to a string, which cannot fail.
        let _ = writeln!(self.text, "buffer {}", bytes.len());
        self.input.extend_from_slice(bytes);
        self.sizes.push(bytes.len());
        self.sizes.len() - 1
    }

    /// Adds a launch of one block or a row of blocks. `flags`: 1 dependent on the launch before, 2 has a dependent,
    /// 4 all blocks at once.
    pub fn launch(&mut self, kernel: &str, grid: u32, block: u32, smem: u32, args: &[Argument]) {
        self.launch_shaped(kernel, [grid, 1, 1], [block, 1, 1], 1, smem, 0, args);
    }

    /// Adds a launch with clusters of `cluster` blocks along x and the flags of [`Case::launch`].
    pub fn launch_shaped(
        &mut self,
        kernel: &str,
        grid: [u32; 3],
        block: [u32; 3],
        cluster: u32,
        smem: u32,
        flags: u32,
        args: &[Argument],
    ) {
        let numbers = |v: &[u32]| v.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
        let (grid, block) = (numbers(&grid), numbers(&block));
        let _ = writeln!(self.text, "launch {kernel} {grid} {block} {cluster} 1 1 {smem} {flags}");
        for arg in args {
            let _ = match arg {
                Argument::Pointer(buffer, offset) => writeln!(self.text, "pointer {buffer} {offset}"),
                Argument::Bytes(bytes) => {
                    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
                    writeln!(self.text, "bytes {hex}")
                }
                Argument::Map { element, swizzle, buffer, dims, strides, block } => {
                    let wide = |v: &[u64]| v.iter().map(u64::to_string).collect::<Vec<_>>().join(" ");
                    let (dims_text, strides) = (wide(dims), wide(strides));
                    let place = format!("{} {}", buffer.0, buffer.1);
                    writeln!(
                        self.text,
                        "map {element} {swizzle} {place} {} {dims_text} {strides} {}",
                        dims.len(),
                        numbers(block)
                    )
                }
            };
        }
    }

    /// Runs the case; `counters` asks for bank conflicts, sectors and rows. With `EMU_KEEP` set, the folder with the
    /// case stays beside the program, to be run by hand; `EMU_RECORD` names a folder for the cases of the probes.
    ///
    /// # Errors
    /// When the program cannot be started or its files not be written; a failing kernel is an [`Outcome`].
    pub fn run(&self, program: &Program, seed: u64, counters: bool) -> Result<Outcome, String> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("run-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = program.driver.parent().unwrap_or(Path::new(".")).join(name);
        std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let outcome = self.run_in(&folder, program, seed, counters);
        if let (Some(record), Ok(outcome)) = (std::env::var_os("EMU_RECORD"), &outcome) {
            self.record(Path::new(&record), program, outcome)?;
        }
        if std::env::var_os("EMU_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&folder);
        }
        outcome
    }

    /// Writes a case of the probes with what came out, for `graft op replay` on hardware.
    fn record(&self, folder: &Path, program: &Program, outcome: &Outcome) -> Result<(), String> {
        let [source] = program.sources.as_slice() else { return Ok(()) };
        let Some(file) = source.strip_prefix("kernels-cu/probes/") else { return Ok(()) };
        // Regions of the emulator's shared memory and grids held back have no meaning on hardware.
        let replayable = self.text.lines().filter(|l| l.starts_with("launch")).all(|l| l.ends_with(" 0"));
        // Approximate functions, and atomics whose order is free, have no bits to hold hardware to.
        let exact = !["special", "atomics"].iter().any(|k| self.text.contains(&format!("launch probe_{k} ")));
        if program.build != Build::Plain || !outcome.good || !replayable || !exact {
            return Ok(());
        }
        let kernel = self.text.split_whitespace().skip_while(|w| *w != "launch").nth(1).unwrap_or("none");
        let mut hash = Sha256::new();
        hash.update(&self.text);
        hash.update(&self.input);
        let digest: String = hash.finalize()[..4].iter().map(|b| format!("{b:02x}")).collect();
        let stem = folder.join(format!("{kernel}-{digest}"));
        let text = format!("source {file}\n{}", self.text);
        let files: [(&str, &[u8]); 3] =
            [("case", text.as_bytes()), ("in", &self.input), ("out", &outcome.buffers.concat())];
        for (extension, bytes) in files {
            let path = stem.with_extension(extension);
            std::fs::write(&path, bytes).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        Ok(())
    }

    fn run_in(&self, folder: &Path, program: &Program, seed: u64, counters: bool) -> Result<Outcome, String> {
        let [text, input, output]: [PathBuf; 3] = ["case.txt", "input", "output"].map(|n| folder.join(n));
        std::fs::write(&text, &self.text).map_err(|e| format!("{}: {e}", text.display()))?;
        std::fs::write(&input, &self.input).map_err(|e| format!("{}: {e}", input.display()))?;
        let mut command = command(program);
        command.arg(&text).arg(&input).arg(&output).args(&program.library);
        command.env("EMU_SEED", seed.to_string());
        if program.build == Build::Tsan {
            command.env("EMU_THREADS", "2").env("TSAN_OPTIONS", "report_bugs=1:history_size=2");
        }
        if counters {
            command.env("EMU_COUNT", "1");
        }
        let (status, stdout, stderr) = wait(command)?;
        let bytes = std::fs::read(&output).unwrap_or_default();
        let mut buffers = Vec::new();
        let mut rest = bytes.as_slice();
        for size in &self.sizes {
            let Some((one, after)) = rest.split_at_checked(*size) else { break };
            buffers.push(one.to_vec());
            rest = after;
        }
        let whole = buffers.len() == self.sizes.len();
        Ok(Outcome { good: status == Some(0) && whole, report: stderr, counters: stdout, buffers })
    }
}

/// The race checker needs its addresses where it expects them, which randomisation may prevent.
fn command(program: &Program) -> Command {
    let fixed = program.build == Build::Tsan
        && Command::new("setarch").args(["-R", "true"]).output().is_ok_and(|o| o.status.success());
    if !fixed {
        return Command::new(&program.driver);
    }
    let mut command = Command::new("setarch");
    command.arg("-R").arg(&program.driver);
    command
}

/// Status (none after a signal or too long), stdout and stderr.
fn wait(mut command: Command) -> Result<(Option<i32>, String, String), String> {
    let done = process::run(&mut command, PATIENCE).map_err(|e| format!("{command:?}: {e}"))?;
    let status = done.status.and_then(|s| s.code());
    let late = match (done.status, status) {
        (None, _) => "emulator: the case takes too long and was ended\n",
        (Some(_), None) => "emulator: the program was ended by a signal\n",
        _ => "",
    };
    Ok((status, done.stdout, format!("{}{late}", done.stderr)))
}

/// What a case did.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Whether it ran to its end with nothing reported.
    pub good: bool,
    /// What was written to stderr: the report.
    pub report: String,
    /// The counters, a line a place.
    pub counters: String,
    /// The buffers afterwards; none after a failure.
    pub buffers: Vec<Vec<u8>>,
}

impl Outcome {
    /// The words of the report that say what is wrong, without the stacks.
    pub fn summary(&self) -> String {
        let telling = |l: &&str| ["emulator: ", "SUMMARY: ", "runtime error: "].iter().any(|word| l.contains(word));
        let mut lines: Vec<&str> = self.report.lines().filter(telling).collect();
        lines.dedup();
        lines.truncate(3);
        if lines.is_empty() { self.report.lines().next().unwrap_or_default().to_string() } else { lines.join(" | ") }
    }
}
