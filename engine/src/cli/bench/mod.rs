//! `graft bench op|site|model|train|e2e|load|start|compare|report|plots|results`: measurements as rows, one JSON object each.
//!
//! Every run begins with the ceilings of its device ([`ceilings`]), so that rows can be read as shares of what the
//! device can do, and so that the cost model can be held against them. Times are those of calls after a warm-up; on a GPU by the device's own clock and
//! without the host's launches.

pub mod ceilings;
pub mod layers;
pub mod load;
pub mod model;
pub mod op;
pub mod site;
mod text_model;

use crate::autograd::Precision;
use crate::backend::{self, Device, cpu};
use crate::cli::out;
use crate::cli::table::Table;
use crate::error::{Error, Result};
use crate::io::jsonl::JsonLog;
use crate::io::{atomic, system};
use crate::ops::contracts;
use crate::report::bench::{self, CEILING, Ceilings, Misfit, Row, compare};
use crate::report::format::significant;
use crate::report::results::{self, ladders};
use crate::tensor::DType;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Time after which a model on the host takes no further sample.
const PATIENCE_MODEL: Duration = Duration::from_secs(20);

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(clap::Subcommand)]
enum BenchCommand {
    /// Operators at the shapes of real models, both passes.
    Op(OpArgs),
    /// Operators as they sit in a block, by number of tokens.
    Site(site::Args),
    /// Forward passes of whole models with random weights.
    Model(model::Args),
    /// Training steps of whole models with random weights: forward, backward, AdamW.
    Train(model::Args),
    /// Images from noise by models with random weights: all steps of a sampler.
    E2e(model::Args),
    /// Loading a transformer of safetensors against the sequential read rate of its disk, with cold caches.
    Load(load::LoadArgs),
    /// Starting the program: graft --help.
    Start(load::StartArgs),
    /// What became faster or slower from one file of rows to another; fails where something became slower.
    Compare {
        /// Rows from before.
        before: PathBuf,
        /// Rows from after.
        after: PathBuf,
    },
    /// Pictures of how cost grows along what was varied, a file each.
    Plots {
        /// Files of rows.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// The folder.
        #[arg(short, long, default_value = "docs/results")]
        out: PathBuf,
    },
    /// Write the tables of README.md and docs/results.md from the rows in benches/results.
    Results {
        /// The repository.
        #[arg(default_value = ".")]
        root: PathBuf,
        /// Write nothing; fail where a table and its rows differ.
        #[arg(long)]
        check: bool,
    },
    /// A page of rows: a roofline, the layers of a model, the cost model beside what was measured, how cost grows, what was
    /// tried at each operator.
    Report {
        /// Files of rows.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// The page.
        #[arg(short, long, default_value = "bench.html")]
        out: PathBuf,
        /// Folder with the folders of the operators, kernels-cu of the sources: the ladder of each from its README.
        #[arg(long, value_name = "DIR")]
        ladders: Option<PathBuf>,
    },
}

/// Where rows go besides the terminal.
#[derive(clap::Args)]
pub struct Keep {
    /// Add each row to this file when it is measured.
    #[arg(long, value_name = "FILE")]
    rows: Option<PathBuf>,
    /// Print what became faster or slower since these rows; fails where something became slower.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
}

impl Keep {
    /// The place for the rows of a run.
    fn open(&self, json: bool) -> Result<Rows> {
        let log = self.rows.as_ref().map(|path| JsonLog::resume(path, u64::MAX)).transpose()?;
        Ok(Rows { json, log, before: self.compare.clone(), rows: Vec::new() })
    }
}

/// The rows of a run. Each is kept and, where JSON was asked for, printed when it is measured: a run that is ended before
/// its time loses none.
struct Rows {
    json: bool,
    log: Option<JsonLog>,
    before: Option<PathBuf>,
    rows: Vec<Row>,
}

impl Rows {
    fn put(&mut self, row: Row) -> Result<()> {
        if let Some(log) = &mut self.log {
            log.append(&row)?;
        }
        if self.json {
            out::line(serde_json::to_string(&row).unwrap_or_default())?;
        }
        self.rows.push(row);
        Ok(())
    }

    /// The table of the rows and what the cost model makes of them, and the comparison that was asked for.
    fn finish(self) -> Result<()> {
        if !self.json {
            out::line(table(&self.rows).to_string().trim_end())?;
            Misfit::of(&self.rows).map_or(Ok(()), |misfit| out::line(misfit.to_string()))?;
        }
        self.before.map_or(Ok(()), |before| changes(&bench::read(&before)?, &self.rows))
    }
}

/// Arguments of `op`.
#[derive(clap::Args)]
pub struct OpArgs {
    /// Only operators whose name contains this.
    #[arg(default_value = "")]
    filter: String,
    /// cpu or cuda; emu counts what the small cases move.
    #[arg(long, default_value = "cpu")]
    backend: String,
    /// Working type of a GPU: f32 or bf16.
    #[arg(long, default_value = "bf16")]
    element: String,
    /// Only cases whose name contains this.
    #[arg(long, default_value = "")]
    case: String,
    /// forward or backward; both where it is not given.
    #[arg(long, default_value = "")]
    pass: String,
    /// Only this way of running it on a GPU, where it takes the case. Its rows name it and answer no target.
    #[arg(long)]
    way: Option<String>,
    /// Measurements of each.
    #[arg(long, default_value_t = 20)]
    samples: usize,
    /// Largest case, in GFLOP of a forward call.
    #[arg(long, default_value_t = 20.0)]
    gflop: f64,
    /// On a GPU the cases that a cache can hold once more, each call after the cache was emptied.
    #[arg(long)]
    cold: bool,
    #[command(flatten)]
    keep: Keep,
}

/// Runs the command.
pub fn run(args: &Args, json: bool) -> Result<()> {
    match &args.command {
        BenchCommand::Op(args) => run_op(args, json),
        BenchCommand::Site(args) => site::run(args, json),
        BenchCommand::Load(args) => load::run(args, json),
        BenchCommand::Start(args) => load::start(args, json),
        BenchCommand::Model(args) => model::run(args, model::Work::Forward, json),
        BenchCommand::Train(args) => model::run(args, model::Work::TrainingStep, json),
        BenchCommand::E2e(args) => model::run(args, model::Work::Sampling, json),
        BenchCommand::Compare { before, after } => changes(&bench::read(before)?, &bench::read(after)?),
        BenchCommand::Plots { files, out: folder } => {
            atomic::ensure_writable_dir(folder)?;
            for (name, picture) in bench::plots(&read(files)?) {
                atomic::write_bytes(&folder.join(&name), picture.as_bytes())?;
                out::line(folder.join(name).display().to_string())?;
            }
            Ok(())
        }
        BenchCommand::Results { root, check } => tables(root, *check),
        BenchCommand::Report { files, out: path, ladders: folder } => {
            let rows = read(files)?;
            let ladders = folder.as_ref().map_or(Ok(Vec::new()), |folder| ladders::read(folder))?;
            atomic::write_bytes(path, bench::page("Measurements", &rows, &ladders).as_bytes())?;
            if let Some(misfit) = Misfit::of(&rows) {
                out::line(misfit.to_string())?;
            }
            out::line(format!("{} rows in {}", rows.len(), path.display()))
        }
    }
}

/// Brings the tables of committed rows up to date, or fails where they are not.
fn tables(root: &Path, check: bool) -> Result<()> {
    for (path, text) in results::stale(root)? {
        if check {
            let stale = Error::failure(path.display().to_string(), "a table differs from its rows");
            return Err(stale.fix("graft bench results, and commit it"));
        }
        atomic::write_bytes(&path, text.as_bytes())?;
        out::line(format!("wrote {}", path.display()))?;
    }
    out::line("every table follows from its rows")
}

fn read(files: &[PathBuf]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for file in files {
        rows.extend(bench::read(file)?);
    }
    Ok(rows)
}

/// `graft bench op` and `graft op bench`.
pub fn run_op(args: &OpArgs, json: bool) -> Result<()> {
    let OpArgs { filter, backend, element, case, pass, way, samples, gflop, cold, keep } = args;
    let way = way.as_deref().map(known_way).transpose()?;
    let choice = op::Choice { filter, case, pass, gflop: *gflop, samples: *samples, cold: *cold, way };
    let element = backend::element(element)?;
    if backend == "emu" {
        return op::count(element, &choice, json);
    }
    let device = backend::open_as(backend, element)?;
    let mut rows = keep.open(json)?;
    ceilings::measure(&device, Precision::F32, &mut rows)?;
    op::measure(&device, &choice, &mut rows)?;
    rows.finish()
}

/// The way of some operator that a `--way` flag names.
///
/// # Errors
/// A name that no operator has.
pub fn known_way(name: &str) -> Result<&'static str> {
    let known = contracts::OPS.iter().flat_map(|op| op.ways).find(|w| w.name == name);
    known.map(|w| w.name).ok_or_else(|| {
        Error::usage("--way", "no operator has such a way")
            .is(format!("{name:?}"))
            .fix("docs/ops.md lists the ways of each operator")
    })
}

/// What a row measures.
struct Subject {
    bench: &'static str,
    case: String,
    work: String,
}

impl Subject {
    /// The row of the times of calls, in milliseconds.
    fn row(self, device: &Device, element: DType, mut times: Vec<f64>) -> Row {
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
        let (mhz, watts) = match device.is_host() {
            true => (system::processor_mhz(), None),
            false => system::gpu_clock_and_power(),
        };
        Row {
            bench: self.bench.into(),
            case: self.case,
            work: self.work,
            axes: BTreeMap::new(),
            way: None,
            backend: device.kind().to_string(),
            element: element.to_string(),
            device: if device.is_host() { system::processor() } else { device.describe() },
            threads: device.is_host().then(cpu::threads),
            ms: at(0.5),
            ms_min: at(0.0),
            ms_p90: at(0.9),
            samples: times.len(),
            flops: None,
            bytes: None,
            exps: None,
            predicted_ms: None,
            mhz,
            watts,
            peak_bytes: None,
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}

fn table(rows: &[Row]) -> Table {
    let heads = [
        "what",
        "work",
        "varied",
        "median ms",
        "predicted",
        "fastest",
        "GB/s",
        "TFLOP/s",
        "of the ceiling",
        "peak MiB",
    ];
    let mut table = Table::new(&heads);
    for row in rows {
        let number = |value: Option<f64>| value.map_or("-".to_string(), significant);
        let share = Ceilings::of(rows, row).share(row).filter(|_| row.bench != CEILING);
        table.row([
            row.case.clone(),
            row.work.clone(),
            row.axes_in_words().trim_start_matches(", ").to_string(),
            format!("{:.4}", row.ms),
            number(row.predicted_ms),
            format!("{:.4}", row.ms_min),
            number(row.gbs()),
            number(row.tflops()),
            share.map_or("-".into(), |(share, of)| format!("{:.0} % of {of}", 100.0 * share)),
            row.peak_bytes.map_or("-".into(), |bytes| (bytes >> 20).to_string()),
        ]);
    }
    table
}

/// Prints what changed; an error where something became slower.
fn changes(before: &[Row], after: &[Row]) -> Result<()> {
    let found = compare(before, after);
    if found.is_empty() {
        return Err(Error::failure("bench compare", "no measurement stands in both files")
            .fix("compare rows of the same device, threads and arguments"));
    }
    let mut table = Table::new(&["what", "before, ms", "after, ms", "times as fast", ""]);
    for c in &found {
        let word = if c.slower {
            "SLOWER"
        } else if c.faster {
            "faster"
        } else {
            "within the noise"
        };
        table.row([
            c.subject.clone(),
            format!("{:.4}", c.before),
            format!("{:.4}", c.after),
            format!("{:.2}", c.ratio()),
            word.to_string(),
        ]);
    }
    out::line(table.to_string().trim_end())?;
    match found.iter().filter(|c| c.slower).count() {
        0 => Ok(()),
        n => Err(Error::failure("bench compare", format!("{n} of {} measurements became slower", found.len()))),
    }
}
