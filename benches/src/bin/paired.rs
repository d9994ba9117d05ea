//! `paired`: operators and models in turns with peers on the CPU, outputs compared before times are.
//!
//! Rows go to `benches/results/<processor>/`, in the place of older ones of the same measurement; a row whose outputs
//! disagree is never written.

use clap::{Parser, Subcommand};
use graft_benches::models::{CASES, case};
use graft_benches::paired::models::WAYS;
use graft_benches::paired::ops::Choice;
use graft_benches::paired::peer::{OPERATOR_PEERS, operators};
use graft_benches::paired::{Settings, run_models, run_ops};
use graft_engine::error::{Error, Result};
use std::path::PathBuf;
use std::process::ExitCode;

/// Operators and models in turns with peers on the CPU.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    what: What,
    /// Pairs of runs.
    #[arg(long, default_value_t = 7, global = true)]
    pairs: usize,
    /// Threads of both sides.
    #[arg(long, default_value_t = 2, global = true)]
    threads: usize,
    /// Folder of the rows; that of this processor below benches/results where it is not given.
    #[arg(long, global = true)]
    rows: Option<PathBuf>,
    /// Print rows but write no file, and measure on a busy machine too.
    #[arg(long, global = true)]
    dry_run: bool,
}

#[derive(Subcommand)]
enum What {
    /// Operators at the shapes of real models.
    Op {
        /// Only operators whose name contains this; =NAME is one.
        #[arg(default_value = "")]
        filter: String,
        /// Only cases whose name contains this.
        #[arg(long, default_value = "")]
        case: String,
        /// forward or backward; both where it is not given.
        #[arg(long, default_value = "", value_parser = ["", "forward", "backward"])]
        pass: String,
        /// Peers.
        #[arg(long, value_delimiter = ',', default_value = "pytorch", value_parser = OPERATOR_PEERS)]
        peer: Vec<String>,
        /// Largest case, in GFLOP of a forward call.
        #[arg(long, default_value_t = 80.0)]
        gflop: f64,
        /// Largest case, in megabytes that a forward call moves.
        #[arg(long, default_value_t = 310.0)]
        megabytes: f64,
    },
    /// Whole models against PyTorch.
    Model {
        /// Cases to run; all where none is named.
        cases: Vec<String>,
        /// Arithmetic of both sides.
        #[arg(long, value_delimiter = ',', default_value = "f32,bf16", value_parser = ["f32", "bf16"])]
        dtype: Vec<String>,
        /// How PyTorch runs them.
        #[arg(long, value_delimiter = ',', default_value = "eager", value_parser = WAYS)]
        way: Vec<String>,
        /// Python with PyTorch; tools/peers/setup_torch_cpu.sh makes one.
        #[arg(long, default_value = ".venv-torch-cpu/bin/python")]
        python: PathBuf,
    },
}

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
    let settings = Settings::new(args.rows.as_deref(), args.pairs, args.threads, args.dry_run)?;
    let mut say = |line| println!("{line}");
    let failed = match &args.what {
        What::Op { filter, case, pass, peer, gflop, megabytes } => {
            let (filter, case, pass) = (filter.clone(), case.clone(), pass.clone());
            let choice = Choice { filter, case, pass, gflop: *gflop, megabytes: *megabytes };
            let programs = peer.iter().map(|name| operators(name, &settings.root, settings.threads));
            run_ops(&settings, &choice, &programs.collect::<Result<Vec<_>>>()?, &mut say)
        }
        What::Model { cases, dtype, way, python } => {
            let chosen =
                if cases.is_empty() { CASES.to_vec() } else { cases.iter().map(|n| case(n)).collect::<Result<_>>()? };
            run_models(&settings, &chosen, dtype, way, python, &mut say)
        }
    }?;
    if failed == 0 { Ok(()) } else { Err(Error::failure("paired", format!("{failed} measurements gave no row"))) }
}
