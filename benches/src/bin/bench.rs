//! `bench`: everything that `make bench` does. Peers are set up where they are missing, operators and models run in
//! turns with them, what has no peer is measured alone, and two pages show it.

use clap::Parser;
use graft_benches::models::CASES;
use graft_benches::page;
use graft_benches::paired::models::WAYS;
use graft_benches::paired::ops::Choice;
use graft_benches::paired::peer::{OPERATOR_PEERS, Program, operators, set_up};
use graft_benches::paired::{MODELS, OPS, Settings, rows, run_models, run_ops};
use graft_engine::error::{Error, Result};
use graft_engine::io::atomic;
use graft_engine::report::results::ladders;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Measure this machine: ours and its peers in turns, rows and a page.
#[derive(Parser)]
struct Args {
    /// Only operators whose name contains this; models run where nothing is given.
    #[arg(default_value = "")]
    filter: String,
    /// Peers of operators.
    #[arg(long, value_delimiter = ',', default_value = "pytorch,onnxruntime,candle", value_parser = OPERATOR_PEERS)]
    peer: Vec<String>,
    /// Pairs of runs.
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// Threads of both sides.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Folder of the rows; that of this processor below benches/results where it is not given.
    #[arg(long)]
    rows: Option<PathBuf>,
    /// Models also against torch.compile, which compiles for a minute or more each.
    #[arg(long)]
    compile: bool,
    /// Write no rows, and measure on a busy machine too.
    #[arg(long)]
    dry_run: bool,
    /// Set no peer up.
    #[arg(long)]
    no_setup: bool,
    /// Only make the page of the rows that are there.
    #[arg(long)]
    page_only: bool,
}

/// Folder of the operators, whose READMEs have their ladders.
const KERNELS: &str = "kernels-cu";

/// Operators without a peer on the CPU.
const ALONE: [&str; 3] = ["attention_int8", "gemm_fp8", "philox"];

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bench: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let settings = Settings::new(args.rows.as_deref(), args.pairs, args.threads, args.dry_run)?;
    let folder = settings.root.join("target/bench");
    std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, "make the folder", &e))?;
    if !args.page_only {
        measure(args, &settings, &folder)?;
    }
    let mut measured = rows::read(&settings.rows.join(OPS))?;
    measured.extend(rows::read(&settings.rows.join(MODELS))?);
    let (path, own) = (folder.join("bench.html"), folder.join("own.html"));
    let link = own.is_file().then_some("own.html");
    let ladders = ladders::read(&settings.root.join(KERNELS))?;
    atomic::write_bytes(&path, page::page(&measured, link, &ladders).as_bytes())?;
    let (holds, below) = page::verdicts(&measured);
    below.iter().for_each(|row| println!("{}", rows::line(row)));
    measured.iter().filter(|r| !r["could_not_run"].is_null()).for_each(|row| println!("{}", rows::line(row)));
    println!("{holds} targets hold, {} do not (above); rows: {}", below.len(), settings.rows.display());
    println!("page: {}", path.display());
    Ok(())
}

fn measure(args: &Args, settings: &Settings, folder: &Path) -> Result<()> {
    let mut say = |line| println!("{line}");
    let peers = args.peer.iter().map(|name| operators(name, &settings.root, settings.threads));
    let peers: Vec<Program> = peers.collect::<Result<_>>()?;
    if !args.no_setup {
        for program in &peers {
            if let Err(e) = set_up(program, &settings.root) {
                // It gets a row that says so when it cannot start.
                println!("{}: {e}", program.name);
            }
        }
    }
    let (case, pass) = (String::new(), String::new());
    let choice = Choice { filter: args.filter.clone(), case, pass, gflop: 80.0, megabytes: 310.0 };
    let mut failed = run_ops(settings, &choice, &peers, &mut say)?;
    if args.filter.is_empty() {
        let [dtypes, ways] = [["f32", "bf16"], WAYS].map(|words| words.map(str::to_string));
        let ways = if args.compile { &ways[..] } else { &ways[..1] };
        let python = settings.root.join(".venv-torch-cpu/bin/python");
        failed += run_models(settings, &CASES, &dtypes, ways, &python, &mut say)?;
        alone(folder, &settings.root.join(KERNELS))?;
    }
    if failed > 0 {
        println!("{failed} measurements gave no row (NO ROW above)");
    }
    Ok(())
}

/// What no peer has, and how the cost of a model grows: rows of the program itself, and their page.
fn alone(folder: &Path, kernels: &Path) -> Result<()> {
    let rows = folder.join("own.jsonl");
    if rows.is_file() {
        std::fs::remove_file(&rows).map_err(|e| Error::io(&rows, "remove the rows of the last run", &e))?;
    }
    let path = rows.display().to_string();
    let graft = |words: &[&str]| {
        // It says itself what went wrong.
        let _ = graft_engine::cli::run(["graft"].iter().chain(words).map(Into::into));
    };
    for op in ALONE {
        graft(&["bench", "op", op, "--samples", "5", "--rows", &path]);
    }
    let grown = ["--pixels", "256,512", "--grafted", "0,50,100", "--samples", "3", "--rows", &path];
    graft(&[&["bench", "model", "DiT-S/2"], &grown[..]].concat());
    graft(&["bench", "model", "DiT-S/2", "--batch", "1,2,4,8", "--samples", "3", "--rows", &path]);
    let [page, kernels] = [&folder.join("own.html"), kernels].map(|path| path.display().to_string());
    graft(&["bench", "report", &path, "--out", &page, "--ladders", &kernels]);
    Ok(())
}
