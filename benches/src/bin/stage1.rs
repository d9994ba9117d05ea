//! `stage1`: what a step of stage 1 costs beyond one pass of its teacher and the sites' own forward and backward pass.
//!
//! The three are timed in turns on a model of a published size whose every site is grafted. A row is appended to
//! `benches/results/<processor>/stage1.jsonl`; its `ratio` is (step − sites) / teacher, which the project wants below
//! 1.6. The optimiser, the data, and what observing costs the teacher are all in the numerator.

use clap::Parser;
use graft_benches::machine::{busy_share, commit, median, processor};
use graft_benches::models::randomise;
use graft_benches::paired::rows;
use graft_engine::autograd::{Graph, ParamStore, Precision, Var};
use graft_engine::backend::{Device, cpu};
use graft_engine::error::{Error, Result};
use graft_engine::graft::distill::Distiller;
use graft_engine::graft::plan::Assignment;
use graft_engine::graft::settings::DistillConfig;
use graft_engine::io::datasets::ImageSet;
use graft_engine::io::{atomic, jsonl::JsonLog};
use graft_engine::models::dit::{Dit, DitConfig, Run, Seen};
use graft_engine::nn::operators::{self, Operator, Site, Spec};
use graft_engine::nn::{Builder, Scheme};
use graft_engine::tensor::Tensor;
use graft_engine::train::batches::Batches;
use graft_engine::train::config::Dtype;
use graft_kernels::check::{Fill, draw_f32};
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

/// Time a step of stage 1 against its parts.
#[derive(Parser)]
struct Args {
    /// Published size of the base.
    #[arg(long, default_value = "DiT-S/2")]
    size: String,
    /// Operator at every attention site.
    #[arg(long, default_value = "hyena_x")]
    attn: String,
    /// Images per update.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Arithmetic.
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
    dtype: String,
    /// Turns.
    #[arg(long, default_value_t = 5)]
    turns: usize,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Print the row but write no file.
    #[arg(long)]
    dry_run: bool,
}

/// Largest ratio that the project wants.
const TARGET: f64 = 1.6;

/// Share of the processor that others may use before a measurement.
const IDLE: f64 = 0.1;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("stage1: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

/// A site with what it saw and what was given in its place.
struct Learner {
    site: Site,
    params: ParamStore,
    operator: Box<dyn Operator>,
    input: Tensor,
    target: Tensor,
}

fn run(args: &Args) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    if args.turns == 0 || args.threads == 0 || args.batch == 0 {
        return Err(Error::usage("--turns, --threads, --batch", "nothing to run").must("at least 1"));
    }
    cpu::set_threads(args.threads)?;
    let device = Device::cpu();
    let mut teacher = Dit::new(DitConfig::named(&args.size)?, &device, 0)?;
    randomise(&mut teacher)?;
    let dtype = if args.dtype == "bf16" { Dtype::Bf16 } else { Dtype::F32 };
    let (precision, dims) = (Precision::from(dtype), teacher.config.block_dims());
    let sites = (0..teacher.config.depth()).flat_map(|block| {
        let mlp = Spec::new("mlp").with("ratio", 4.0);
        [(Site::Attn, Spec::new(&args.attn)), (Site::Mlp, mlp)].map(|(site, spec)| Assignment::new(block, site, spec))
    });
    let sites: Vec<Assignment> = sites.collect();
    let config = DistillConfig { steps: u64::MAX, batch: args.batch, dtype, ..DistillConfig::default() };
    let data = noise(&teacher.config, args.batch);
    let mut batches = Batches::new(&data, args.batch, 0)?;
    let mut distiller = Distiller::homeless(&teacher, &sites, &config)?;
    let (x, t, y) = inputs(&teacher, args.batch)?;
    let pass = |observer: Option<&mut graft_engine::models::dit::Observer<'_>>| -> Result<()> {
        let g = Graph::inference(precision);
        teacher.forward_observed(&g, &Var::constant(x.clone()), &t, &y, Run::default(), observer).map(drop)
    };
    let mut learners = Vec::new();
    pass(Some(&mut |seen: &Seen<'_>| {
        if seen.site == Site::BlockPair {
            return Ok(());
        }
        let assignment = &sites[learners.len()];
        let mut params = ParamStore::default();
        let mut builder = Builder::new(&mut params, &device, 0, Scheme::Torch);
        let operator = operators::build(&assignment.spec, seen.site, dims, &mut builder)?;
        let (input, target) = (seen.input.tensor().copy()?, seen.output.tensor().copy()?);
        learners.push(Learner { site: seen.site, params, operator, input, target });
        Ok(())
    }))?;
    let learn = || -> Result<()> {
        for learner in &learners {
            let g = Graph::training(precision);
            let output = learner.operator.forward(&g, &learner.params, &Var::constant(learner.input.clone()), None)?;
            let target = Var::constant(learner.target.clone());
            let loss = g.loss_regression(&output, &target, config.loss.params(learner.site))?;
            drop(g.backward(&loss)?);
        }
        Ok(())
    };
    // Once untimed: buffers are made and threads wake up.
    pass(None)?;
    learn()?;
    distiller.update(&mut batches)?;
    let busy = busy_share(Duration::from_secs(1));
    if busy > IDLE && !args.dry_run {
        return Err(Error::failure("machine", "is busy; its times would mean little")
            .is(format!("{:.0} % in use", 100.0 * busy))
            .must(format!("at most {:.0} %", 100.0 * IDLE))
            .fix("stop other work, or look with --dry-run"));
    }
    let mut ms = [const { Vec::new() }; 3];
    for _ in 0..args.turns {
        let mut time = |which: usize, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
            let start = Instant::now();
            work()?;
            ms[which].push(start.elapsed().as_secs_f64() * 1e3);
            Ok(())
        };
        time(0, &mut || pass(None))?;
        time(1, &mut || learn())?;
        time(2, &mut || distiller.update(&mut batches).map(drop))?;
    }
    let [teacher_ms, sites_ms, step_ms] = [0, 1, 2].map(|i| median(&ms[i]));
    let row = json!({
        "case": "stage1_step", "model": args.size, "attn": args.attn, "sites": sites.len(), "dtype": args.dtype,
        "threads": args.threads, "turns": args.turns, "shape": { "batch": args.batch, "tokens": teacher.config.tokens() },
        "teacher_ms": teacher_ms, "sites_ms": sites_ms, "step_ms": step_ms,
        "ratio": (step_ms - sites_ms) / teacher_ms, "target": TARGET, "teacher_all_ms": ms[0], "sites_all_ms": ms[1],
        "step_all_ms": ms[2], "busy_before": busy, "commit": commit(root), "version": env!("CARGO_PKG_VERSION"),
        "processor": processor(), "instructions": cpu::instruction_sets(),
        "unix_time": SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs()),
    });
    println!("{row}");
    if args.dry_run {
        return Ok(());
    }
    let folder = rows::folder(root);
    atomic::ensure_writable_dir(&folder)?;
    JsonLog::resume(&folder.join("stage1.jsonl"), u64::MAX)?.append(&row)
}

/// A batch of noise for the teacher alone.
fn inputs(teacher: &Dit, batch: usize) -> Result<(Tensor, Tensor, Tensor)> {
    let (c, device) = (&teacher.config, teacher.device());
    let len = batch * c.in_channels * c.input_size * c.input_size;
    let shape = [batch, c.in_channels, c.input_size, c.input_size];
    let x = Tensor::from_f32(device, &shape, &draw_f32("stage1", "x", len, Fill::Normal))?;
    let t: Vec<f32> = (0..batch).map(|i| (i * 997 % 1000) as f32).collect();
    let y: Vec<i32> = (0..batch).map(|i| (i % c.classes) as i32).collect();
    Ok((x, Tensor::from_f32(device, &[batch], &t)?, Tensor::from_i32(device, &[batch], &y)?))
}

/// Images of the model's own shape.
fn noise(c: &DitConfig, n: usize) -> ImageSet {
    let len = n * c.in_channels * c.input_size * c.input_size;
    let pixels = draw_f32("stage1", "pixels", len, Fill::Uniform(0.0, 255.0)).iter().map(|v| *v as u8).collect();
    let (height, width) = (c.input_size, c.input_size);
    ImageSet { n, channels: c.in_channels, height, width, pixels, labels: vec![0; n], class_names: Vec::new() }
}
