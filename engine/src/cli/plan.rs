//! `graft plan check|show|import`.

use super::{layers, out, progress, table::Table};
use crate::backend::Device;
use crate::error::{Error, Result};
use crate::graft::assemble::grafted_config;
use crate::graft::cost::{Counter, KindCost, ModelCost, percent};
use crate::graft::gpu::Prediction;
use crate::graft::import;
use crate::graft::memory;
use crate::graft::plan::Plan;
use crate::graft::run::RunData;
use crate::graft::source::{RunSource, reads_text};
use crate::graft::text_source::TextData;
use crate::io::atomic;
use crate::models::sites::{SiteConfig, SiteModel};
use crate::nn::operators::Site;
use crate::report::format::{count, seconds};
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Check a plan and explain the model that results: operators, parameters, FLOPs, predicted times.
    Check(CheckArgs),
    /// Print a plan with every default filled in, as TOML.
    Show {
        /// Plan file.
        plan: PathBuf,
    },
    /// Turn a YAML configuration of the paper's released code into a plan.
    Import {
        /// Configuration for sampling, stage 1 or stage 2.
        config: PathBuf,
        /// Plan file to write; standard output where not given.
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Folder or file of the base model.
        #[arg(long, value_name = "MODEL")]
        base: Option<PathBuf>,
    },
}

#[derive(clap::Args)]
struct CheckArgs {
    /// Plan file.
    plan: PathBuf,
    /// Run folder whose layers are shown where the base model decides them; they are chosen and kept there where it has
    /// none yet.
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// GPU to predict times for: h100, a100 or h200; all where not given.
    #[arg(long, value_name = "NAME")]
    gpu: Option<String>,
    /// Samples of a forward pass in the prediction; an image with guidance is two.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    batch: u64,
    /// Also say how much memory the two stages take at most; reads the data set.
    #[arg(long)]
    memory: bool,
}

/// Runs the command.
pub fn run(args: &Args, json: bool) -> Result<()> {
    match &args.action {
        Action::Check(args) => check(args, json),
        Action::Show { plan } => {
            let text = Plan::read(plan)?.completed()?;
            if json { out::line(format!("{:#}", as_json(&text)?)) } else { out::bytes(text.as_bytes()) }
        }
        Action::Import { config, output, base } => import_plan(config, output.as_deref(), base.as_deref(), json),
    }
}

fn as_json(text: &str) -> Result<Value> {
    let table: toml::Table = text.parse().map_err(|e| Error::failure("plan", format!("{e}")))?;
    serde_json::to_value(table).map_err(|e| Error::failure("plan", e.to_string()))
}

fn check(args: &CheckArgs, as_json: bool) -> Result<()> {
    let plan = Plan::read(&args.plan)?;
    match reads_text(&plan) {
        false => check_on::<RunData>(plan, args, as_json),
        true => check_on::<TextData>(plan, args, as_json),
    }
}

fn check_on<D: RunSource>(plan: Plan, args: &CheckArgs, as_json: bool) -> Result<()> {
    let path = &args.plan;
    let base = D::Model::describe(&plan.base).map_err(|e| e.context(path.display()))?;
    let plan = if plan.needs_choice() { decide::<D>(plan, args.run.as_deref())? } else { plan };
    let assignments = plan.resolve(&base)?;
    let grafted = grafted_config(&base, &assignments)?;
    let memory = match args.memory {
        true => {
            let (data, device) = (D::load(&plan.data)?, Device::cpu());
            Some(memory::plan::<D>(&plan, None, memory::program(&data, &device))?)
        }
        false => None,
    };
    let costs = [Counter::new(&base).model()?, Counter::new(&grafted).model()?];
    let kinds = Counter::new(&grafted).kinds()?;
    let batch = args.batch as usize;
    let predict = |config: &<D::Model as SiteModel>::Config| layers::predictions(config, args.gpu.as_deref(), batch);
    let predicted = [predict(&base)?, predict(&grafted)?];
    let rows = layers::rows(&grafted, &assignments, &predicted[1])?;
    if as_json {
        let changed: Vec<String> = assignments.iter().map(ToString::to_string).collect();
        let record = json!({
            "plan": path.display().to_string(), "base": plan.base.display().to_string(), "grafted": changed,
            "chosen": plan.chosen(), "layers": layers::json(&rows), "pairs": grafted.pairs(), "kinds": kinds, "tokens": costs[1].tokens,
            "before": costs[0], "after": costs[1], "change_percent": change(&costs),
            "memory": memory.as_ref().map(|[one, two]| json!({ "stage1": one, "stage2": two })),
            "predicted": { "batch": batch, "measured": false, "before": predicted[0], "after": predicted[1] },
        });
        return out::line(format!("{record:#}"));
    }
    let depth = match costs.each_ref().map(|c| c.serial_depth) {
        [before, after] if before == after => String::new(),
        [before, after] => format!("; serial depth {before} -> {after}"),
    };
    let operators = assignments.iter().filter(|a| a.site != Site::BlockPair).count();
    let mut text = format!("{}: good; {operators} of {} sites change{depth}\n", path.display(), 2 * base.depth());
    for line in layers::chosen(&plan) {
        text += &format!("{line}\n");
    }
    text += &format!("\n{}{}\n\n", layers::table(&rows), layers::remark(batch));
    text += &format!("{}\n{}\n{}", kind_table(&kinds), cost_table(&costs), time_table(&predicted));
    for (i, needed) in memory.iter().flatten().enumerate() {
        text += &format!("\nmemory of stage {}: {needed}", i + 1);
    }
    if memory.is_some() {
        text.push('\n');
    }
    out::bytes(text.as_bytes())
}

/// The plan with the layers that the base model decides.
fn decide<D: RunSource>(plan: Plan, run: Option<&Path>) -> Result<Plan> {
    let base = D::Model::load(&plan.base, &Device::cpu())?;
    if let Some(run) = run {
        atomic::ensure_writable_dir(run)?;
    }
    let data = match run {
        Some(_) => Some(D::load(&plan.data)?),
        None => None,
    };
    let bar = progress::bar(1, "layers");
    let decided = D::choose(&plan, &base, run, data.as_ref(), &mut |p| {
        bar.set_message(p.what);
        bar.set_length(p.total);
        bar.set_position(p.done);
        ControlFlow::Continue(())
    })?;
    bar.finish();
    // Nothing breaks off above, so that there is a decision.
    Ok(decided.unwrap_or(plan))
}

/// Changes as the paper's table 4 counts them, in per cent.
fn change([before, after]: &[ModelCost; 2]) -> Value {
    let site = |b: &crate::graft::cost::SiteCost, a: &crate::graft::cost::SiteCost| {
        json!({
            "flops_operator": percent(b.flops_operator, a.flops_operator),
            "flops_projections": percent(b.flops_projections, a.flops_projections),
            "parameters": percent(b.params as f64, a.params as f64),
        })
    };
    json!({
        "attn": site(&before.attn, &after.attn), "mlp": site(&before.mlp, &after.mlp),
        "flops": percent(before.flops, after.flops),
        "parameters": percent(before.params as f64, after.params as f64),
    })
}

fn kind_table(kinds: &[KindCost]) -> Table {
    let all: f64 = kinds.iter().map(|k| k.cost.flops()).sum();
    let mut table = Table::new(&["operator", "site", "sites", "parameters", "FLOP of an image", "share of all sites"]);
    for k in kinds {
        table.row([
            k.kind.clone(),
            k.site.to_string(),
            k.sites.to_string(),
            k.cost.params.to_string(),
            count(k.cost.flops()),
            format!("{:.1} %", 100.0 * k.cost.flops() / all),
        ]);
    }
    table
}

fn cost_table([before, after]: &[ModelCost; 2]) -> Table {
    let mut table = Table::new(&["for one image", "base", "grafted", "change"]);
    let mut row = |what: String, b: f64, a: f64, write: fn(f64) -> String| {
        table.row([what, write(b), write(a), format!("{:+.2} %", percent(b, a))]);
    };
    let whole: fn(f64) -> String = |v| format!("{v:.0}");
    for (name, b, a) in
        [("attn", &before.attn, &after.attn), ("mlp", &before.mlp, &after.mlp), ("merge", &before.merge, &after.merge)]
    {
        if a.params == 0 && b.params == 0 {
            continue;
        }
        row(format!("{name}: operator FLOP"), b.flops_operator, a.flops_operator, count);
        if b.flops_projections > 0.0 || a.flops_projections > 0.0 {
            row(format!("{name}: projection FLOP"), b.flops_projections, a.flops_projections, count);
        }
        row(format!("{name}: parameters"), b.params as f64, a.params as f64, whole);
    }
    row("model: FLOP".into(), before.flops, after.flops, count);
    row("model: parameters".into(), before.params as f64, after.params as f64, whole);
    row("tokens".into(), before.tokens as f64, after.tokens as f64, whole);
    row("serial depth".into(), before.serial_depth as f64, after.serial_depth as f64, whole);
    table
}

fn time_table([before, after]: &[Vec<Prediction>; 2]) -> Table {
    let mut table = Table::new(&["predicted, not measured", "base", "grafted", "speed"]);
    for (b, a) in before.iter().zip(after) {
        let (b, gpu, a) = (b.total(), a.gpu, a.total());
        table.row([format!("{gpu}: forward pass"), seconds(b), seconds(a), format!("{:.2} x", b / a)]);
    }
    table
}

fn import_plan(config: &Path, output: Option<&Path>, base: Option<&Path>, as_json: bool) -> Result<()> {
    let imported = import::read(config, base)?;
    for warning in imported.warnings.iter().filter(|_| !as_json) {
        eprintln!("warning: {warning}");
    }
    if let Some(output) = output {
        atomic::write_bytes(output, imported.plan.as_bytes())?;
    }
    match (as_json, output) {
        (true, _) => out::line(format!("{:#}", json!({ "plan": imported.plan, "warnings": imported.warnings }))),
        (false, Some(output)) => out::line(output.display()),
        (false, None) => out::bytes(imported.plan.as_bytes()),
    }
}
