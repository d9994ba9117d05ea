//! `graft plan check|show P`.

use crate::backend::Device;
use crate::error::{Error, Result};
use crate::graft::assemble::grafted_config;
use crate::graft::cost::{Counter, ModelCost, percent};
use crate::graft::memory;
use crate::graft::plan::{Assignment, Plan};
use crate::graft::run::RunData;
use crate::models::dit::{self, DitConfig};
use crate::nn::operators::Site;
use serde_json::json;
use std::path::PathBuf;

/// Arguments.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Say whether a plan can be run, and what is wrong where it cannot.
    Check {
        /// Plan file.
        plan: PathBuf,
        /// Also say how much memory the two stages take at most; reads the data set.
        #[arg(long)]
        memory: bool,
    },
    /// Explain the model that results: operators by layer, parameters, FLOPs, and the change against the base.
    Show {
        /// Plan file.
        plan: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let path = match &args.action {
        Action::Check { plan, .. } | Action::Show { plan, .. } => plan,
    };
    let plan = Plan::read(path)?;
    let base = dit::describe(&plan.base).map_err(|e| e.context(path.display()))?;
    let assignments = plan.resolve(&base)?;
    let grafted = grafted_config(&base, &assignments)?;
    let (before, after) = (Counter::new(&base).model()?, Counter::new(&grafted).model()?);
    match args.action {
        Action::Check { memory, .. } => {
            println!("{}: good; {} of {} sites change", path.display(), assignments.len(), 2 * base.depth());
            if memory {
                let needed = memory::plan(&plan, None, &RunData::load(&plan.data)?, &Device::cpu())?;
                println!("memory of stage 1: {}\nmemory of stage 2: {}", needed[0], needed[1]);
            }
        }
        Action::Show { json: true, .. } => println!("{:#}", as_json(&assignments, &grafted, &before, &after)?),
        Action::Show { json: false, .. } => {
            println!("{} on {}\n", path.display(), plan.base.display());
            print_layers(&assignments, &grafted)?;
            println!();
            print_costs(&before, &after);
        }
    }
    Ok(())
}

fn as_json(
    assignments: &[Assignment],
    grafted: &DitConfig,
    before: &ModelCost,
    after: &ModelCost,
) -> Result<serde_json::Value> {
    let changed: Vec<String> = assignments.iter().map(ToString::to_string).collect();
    let layers: Vec<_> = grafted.blocks.iter().map(|b| json!({ "attn": b.attn, "mlp": b.mlp })).collect();
    let costs = serde_json::to_value([before, after]).map_err(|e| Error::failure("plan", e.to_string()))?;
    Ok(json!({ "grafted": changed, "layers": layers, "before": costs[0], "after": costs[1] }))
}

fn print_layers(assignments: &[Assignment], grafted: &DitConfig) -> Result<()> {
    let mut counter = Counter::new(grafted);
    println!("{:>5}  {:<24} {:<24} {:>12} {:>10}   (* grafted)", "layer", "attn", "mlp", "parameters", "MFLOP");
    for (i, block) in grafted.blocks.iter().enumerate() {
        let mark = |site, spec: &dyn std::fmt::Display| {
            let grafted = assignments.iter().any(|a| a.block == i && a.site == site);
            format!("{spec}{}", if grafted { " *" } else { "" })
        };
        let (attn, mlp) = (counter.site(Site::Attn, &block.attn)?, counter.site(Site::Mlp, &block.mlp)?);
        println!(
            "{i:>5}  {:<24} {:<24} {:>12} {:>10.3}",
            mark(Site::Attn, &block.attn),
            mark(Site::Mlp, &block.mlp),
            attn.params + mlp.params,
            (attn.flops() + mlp.flops()) / 1e6
        );
    }
    Ok(())
}

fn print_costs(before: &ModelCost, after: &ModelCost) {
    let million = |flops: f64| format!("{:.3} M", flops / 1e6);
    println!("{:<28} {:>16} {:>16} {:>9}", "for one image", "base", "grafted", "change");
    let row = |what: &str, text: [String; 2], values: [f64; 2]| {
        println!("{what:<28} {:>16} {:>16} {:>+8.2}%", text[0], text[1], percent(values[0], values[1]));
    };
    for (name, b, a) in [("attn", &before.attn, &after.attn), ("mlp", &before.mlp, &after.mlp)] {
        let pairs = [
            ("operator FLOP", b.flops_operator, a.flops_operator),
            ("projection FLOP", b.flops_projections, a.flops_projections),
        ];
        for (what, b, a) in pairs.into_iter().filter(|(_, b, a)| *b > 0.0 || *a > 0.0) {
            row(&format!("{name}: {what}"), [million(b), million(a)], [b, a]);
        }
        row(
            &format!("{name}: parameters"),
            [b.params.to_string(), a.params.to_string()],
            [b.params as f64, a.params as f64],
        );
    }
    row("model: FLOP", [million(before.flops), million(after.flops)], [before.flops, after.flops]);
    row(
        "model: parameters",
        [before.params.to_string(), after.params.to_string()],
        [before.params as f64, after.params as f64],
    );
    println!("{:<28} {:>16} {:>16}", "tokens", before.tokens, after.tokens);
}
