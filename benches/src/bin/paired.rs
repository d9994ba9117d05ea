//! `paired`: ours and a peer in turns, the same weights, inputs and threads, outputs compared before times are.
//!
//! Each pair runs both once, and the order changes from pair to pair, so that a machine that grows slower or faster
//! favours neither. Rows are appended to `benches/results/<processor>/models.jsonl`; a row whose outputs disagree is
//! never written.

use clap::Parser;
use graft_benches::machine::{append, busy_share, commit, median, processor, slug};
use graft_benches::models::{CASES, ModelCase, Prepared, Work, case};
use graft_engine::autograd::Precision;
use graft_engine::backend::cpu;
use graft_engine::error::{Error, Result};
use serde_json::{Value, json};
use std::fs::read;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::{Duration, Instant, SystemTime};

/// Run model cases in turns with PyTorch on the CPU.
#[derive(Parser)]
struct Args {
    /// Cases to run; all where none is named.
    cases: Vec<String>,
    /// Arithmetic of both sides.
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16", value_parser = ["f32", "bf16"])]
    dtype: Vec<String>,
    /// Pairs of runs.
    #[arg(long, default_value_t = 7)]
    pairs: usize,
    /// Threads of both sides.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Python with PyTorch; tools/peers/setup_torch_cpu.sh makes one.
    #[arg(long, default_value = ".venv-torch-cpu/bin/python")]
    python: PathBuf,
    /// Print the row but write no file.
    #[arg(long)]
    dry_run: bool,
}

/// Largest relative RMS difference of outputs, by arithmetic. Two frameworks sum in different orders; in bf16 the
/// peer also rounds every activation.
const AGREEMENT: [(&str, f64); 2] = [("f32", 1e-4), ("bf16", 5e-2)];

/// Updates after which the losses of both sides are compared.
const COMPARED_STEPS: usize = 3;

/// Share of the processor that others may use before a measurement.
const IDLE: f64 = 0.1;

/// Long enough for the threads of one side to go to sleep before the other begins.
const PAUSE: Duration = Duration::from_millis(150);

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("paired: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    if args.pairs == 0 || args.threads == 0 {
        return Err(Error::usage("--pairs, --threads", "nothing to run").must("at least 1"));
    }
    cpu::set_threads(args.threads)?;
    let chosen = if args.cases.is_empty() {
        CASES.to_vec()
    } else {
        args.cases.iter().map(|n| case(n)).collect::<Result<_>>()?
    };
    for case in chosen {
        for dtype in &args.dtype {
            let row = measure(args, root, case, dtype)?;
            println!("{row}");
            if !args.dry_run {
                append(&root.join("benches/results").join(slug(&processor())).join("models.jsonl"), &row)?;
            }
        }
    }
    Ok(())
}

fn measure(args: &Args, root: &Path, case: ModelCase, dtype: &str) -> Result<Value> {
    let precision = if dtype == "bf16" { Precision::Bf16 } else { Precision::F32 };
    let folder = root.join("target/paired").join(format!("{}-{dtype}", case.name));
    let mut ours = Prepared::new(case, precision)?;
    ours.export(&folder)?;
    let mut peer = Peer::start(args, root, case, dtype, &folder)?;
    let difference = compare(&mut ours, &mut peer, case, &folder)?;
    let bound = AGREEMENT.iter().find(|(name, _)| *name == dtype).map_or(0.0, |(_, bound)| *bound);
    // Written so that a NaN fails.
    if !(difference <= bound) {
        return Err(Error::failure(format!("{} {dtype}", case.name), "outputs disagree; no time is reported")
            .is(format!("relative difference {difference:.2e}"))
            .must(format!("at most {bound:.0e}")));
    }
    let busy = busy_share(Duration::from_secs(1));
    if busy > IDLE && !args.dry_run {
        // Spinning barriers collapse on a shared processor: a peer's time taken there would flatter us.
        return Err(Error::failure("machine", "is busy; its times would mean nothing")
            .is(format!("{:.0} % in use", 100.0 * busy))
            .must(format!("at most {:.0} %", 100.0 * IDLE))
            .fix("stop other work, or look with --dry-run"));
    }
    let (mut our_ms, mut peer_ms) = (Vec::new(), Vec::new());
    for pair in 0..args.pairs {
        for turn in 0..2 {
            std::thread::sleep(PAUSE);
            if (pair + turn) % 2 == 0 {
                let start = Instant::now();
                ours.run()?;
                our_ms.push(start.elapsed().as_secs_f64() * 1e3);
            } else {
                peer_ms.push(peer.ask("run")?["ms"].as_f64().unwrap_or(f64::NAN));
            }
        }
    }
    let (a, b) = (median(&our_ms), median(&peer_ms));
    Ok(json!({
        "case": case.name, "model": case.size, "dtype": dtype, "threads": args.threads, "pairs": args.pairs,
        "work": if case.work == Work::Forward { "forward" } else { "forward, backward, AdamW" },
        "shape": { "batch": case.batch, "tokens": ours.tokens() },
        "ours_ms": a, "peer_ms": b, "ratio": b / a, "target": case.target, "ours_all_ms": our_ms, "peer_all_ms": peer_ms,
        "difference": difference, "busy_before": busy, "peer": peer.about,
        "commit": commit(root), "version": env!("CARGO_PKG_VERSION"), "processor": processor(),
        "instructions": cpu::instruction_sets(),
        "unix_time": SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
    }))
}

/// Relative RMS difference of the outputs, or the largest one of the losses of the first steps.
fn compare(ours: &mut Prepared, peer: &mut Peer, case: ModelCase, folder: &Path) -> Result<f64> {
    if case.work == Work::TrainingStep {
        let mut worst = 0.0f64;
        for _ in 0..COMPARED_STEPS {
            let (a, b) = (f64::from(ours.run()?[0]), peer.ask("run")?["loss"].as_f64().unwrap_or(f64::NAN));
            let relative = (a - b).abs() / b.abs();
            worst = if relative > worst || relative.is_nan() { relative } else { worst };
        }
        return Ok(worst);
    }
    peer.ask("output")?;
    let path = folder.join("peer_output.f32");
    let bytes = read(&path).map_err(|e| Error::io(&path, "read the peer's output", &e))?;
    let theirs = bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b)));
    let mine = ours.run()?;
    if bytes.len() != 4 * mine.len() {
        return Err(Error::failure(path.display().to_string(), "wrong size").is(bytes.len()).must(4 * mine.len()));
    }
    let (mut error, mut total) = (0.0, 0.0);
    for (a, b) in mine.iter().zip(theirs) {
        error += (f64::from(*a) - b).powi(2);
        total += b * b;
    }
    Ok((error / total).sqrt())
}

/// The peer's process: it loads once, then answers one JSON line for each line it is sent.
struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Name and versions, as it states them.
    about: Value,
}

impl Peer {
    fn start(args: &Args, root: &Path, case: ModelCase, dtype: &str, folder: &Path) -> Result<Peer> {
        let fix = "run tools/peers/setup_torch_cpu.sh, or name another --python";
        let place = args.python.display().to_string();
        let mut child = Command::new(&args.python)
            .arg(root.join("tools/peers/pytorch_cpu.py"))
            .arg(folder)
            .args(["--work", if case.work == Work::Forward { "forward" } else { "training-step" }])
            .args(["--dtype", dtype, "--threads", &args.threads.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| Error::failure(&place, format!("cannot start: {e}")).fix(fix))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::failure(place, "no pipes to the peer"));
        };
        let mut peer = Peer { child, input, output: BufReader::new(output), about: Value::Null };
        peer.about = peer.answer().map_err(|e| e.fix(fix))?;
        Ok(peer)
    }

    fn ask(&mut self, word: &str) -> Result<Value> {
        writeln!(self.input, "{word}").map_err(|e| Error::failure("peer", format!("cannot be asked: {e}")))?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.output.read_line(&mut line).map_err(|e| Error::failure("peer", format!("cannot be read: {e}")))?;
        serde_json::from_str(&line).map_err(|_| {
            Error::failure("peer", "ended or gave no answer; its own message is above").is(format!("{line:?}"))
        })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself; either way it must not outlive us, and is waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
