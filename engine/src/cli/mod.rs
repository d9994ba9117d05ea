//! The command line: the only room that prints and exits.

mod ablate;
mod bench;
mod classifier;
mod convert;
mod doctor;
mod encode;
mod eval;
mod forward;
mod gpu;
mod graft_run;
mod inspect;
mod inspect_text;
mod known;
mod layers;
mod locality;
mod model_args;
pub mod op;
mod out;
mod pictures;
mod plan;
mod pretrain;
mod progress;
mod sample;
mod sample_sources;
mod sample_text;
mod science;
mod shipped;
mod stages;
mod synthesize;
mod table;
mod texts;
mod verify;

use crate::autograd::Precision;
use crate::error::{Error, Result};
use clap::{Parser, Subcommand};
use std::ffi::OsString;
use std::process::ExitCode;

/// Edit pretrained diffusion transformers by grafting, and run them at full speed.
#[derive(Parser)]
#[command(name = "graft", version, about, arg_required_else_help = true)]
struct Cli {
    /// Threads for operators; all cores where not given.
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
    /// Reports as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

/// Arithmetic of the products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Dtype {
    /// 32-bit floats.
    F32,
    /// bfloat16 products, accumulated in 32 bits.
    Bf16,
}

impl From<Dtype> for crate::train::config::Dtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

impl From<Dtype> for Precision {
    fn from(dtype: Dtype) -> Precision {
        match dtype {
            Dtype::F32 => Precision::F32,
            Dtype::Bf16 => Precision::Bf16,
        }
    }
}

#[derive(Subcommand)]
enum Command {
    /// Train a model from scratch; resumes by itself.
    Pretrain(pretrain::Args),
    /// Check and explain a grafting plan, fill in its defaults, or import one.
    Plan(plan::Args),
    /// Graft a model: distil, finetune, summarise; resumes by itself.
    Run(graft_run::PlanArgs),
    /// Stage 1 of a graft alone: train each new operator to imitate the one it replaces.
    Distill(graft_run::DistillArgs),
    /// Stage 2 of a graft alone: finetune the distilled model of a run folder.
    Finetune(graft_run::RunArgs),
    /// Many grafts of one base under the same settings, scored in one table; resumes by itself.
    Science(science::Args),
    /// What each stage of a graft contributes: none, either, both, and the self-graft beside them.
    Ablate(ablate::Args),
    /// Train the small network that scores look through; the trained one ships with the program.
    #[command(hide = true)]
    Classifier(classifier::Args),
    /// Score samples of a model against real images.
    Eval(eval::Args),
    /// Draw pictures, or latents, from class labels or from text.
    Sample(Box<sample::Args>),
    /// Make the pairs of latents and texts that a text-to-image model is grafted on; resumes by itself.
    Synthesize(synthesize::Args),
    /// Encode texts once, for `graft sample --embeddings` and `graft forward`.
    Encode(encode::Args),
    /// One forward pass on tensors from a file.
    Forward(forward::Args),
    /// Measure how near its own token the attention of each layer stays, as a table and a heat map.
    Locality(locality::Args),
    /// Write a model under the names of another layout, bit for bit.
    Convert(convert::Args),
    /// Show what a model, a tensor file or a picture is.
    Inspect(inspect::Args),
    /// Operators: list them, run one, check all against the oracle.
    Op(op::Args),
    /// Measure operators, whole models and training steps; compare measurements; make a page of them.
    Bench(bench::Args),
    /// The battery of checks and times for a GPU, most valuable first; resumes by itself.
    Gpu(gpu::Args),
    /// What this machine offers, and what is missing.
    Doctor,
    /// Compare with recorded cases: every one below the given folders.
    Verify(verify::Args),
}

/// Runs the program: 0 done, 1 failed, 2 wrong usage.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version come this way too, with code 0.
            let _ = e.print();
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2));
        }
    };
    let result = execute(cli);
    for notice in crate::backend::cuda::notices::take() {
        eprintln!("graft: note: {notice}");
    }
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("graft: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

fn execute(cli: Cli) -> Result<()> {
    let threads = cli.threads.unwrap_or_else(crate::backend::cpu::processors);
    if threads == 0 {
        return Err(Error::usage("--threads", "no threads").is(0).must("at least 1"));
    }
    crate::backend::cpu::set_threads(threads)?;
    match cli.command {
        Command::Pretrain(args) => pretrain::run(&args),
        Command::Plan(args) => plan::run(&args, cli.json),
        Command::Run(args) => graft_run::run(&args),
        Command::Distill(args) => graft_run::distill(&args),
        Command::Finetune(args) => graft_run::finetune(&args),
        Command::Science(args) => science::run(&args),
        Command::Ablate(args) => ablate::run(&args, cli.json),
        Command::Classifier(args) => classifier::run(&args),
        Command::Eval(args) => eval::run(&args, cli.json),
        Command::Sample(args) => sample::run(&args),
        Command::Synthesize(args) => synthesize::run(&args),
        Command::Encode(args) => encode::run(&args),
        Command::Forward(args) => forward::run(&args),
        Command::Locality(args) => locality::run(&args, cli.json),
        Command::Convert(args) => convert::run(&args, cli.json),
        Command::Inspect(args) => inspect::run(&args, cli.json),
        Command::Op(args) => op::run(&args, cli.json),
        Command::Bench(args) => bench::run(&args, cli.json),
        Command::Gpu(args) => gpu::run(&args, cli.json),
        Command::Doctor => doctor::run(cli.json),
        Command::Verify(args) => verify::run(&args, cli.json),
    }
}
