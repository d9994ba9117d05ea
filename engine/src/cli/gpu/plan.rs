//! What the battery does, in which order, and for how long at most.

use super::schedule::beside;
use crate::error::{Error, Result};
use crate::io::files;
use crate::ops::contracts;
use std::path::Path;
use std::time::Duration;

/// A part of the battery, in the order of running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    Probes,
    Conformance,
    Operators,
    Models,
    Tune,
    Rest,
    Peers,
}

impl Stage {
    /// Every stage, in order.
    pub const ALL: [Stage; 7] =
        [Stage::Probes, Stage::Conformance, Stage::Operators, Stage::Models, Stage::Tune, Stage::Rest, Stage::Peers];

    /// Name in flags and files.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Probes => "probes",
            Stage::Conformance => "conformance",
            Stage::Operators => "operators",
            Stage::Peers => "peers",
            Stage::Models => "models",
            Stage::Tune => "tune",
            Stage::Rest => "rest",
        }
    }

    /// The stage that a flag names.
    pub fn named(name: &str) -> Result<Stage> {
        Stage::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| {
            let names: Vec<&str> = Stage::ALL.into_iter().map(Stage::name).collect();
            Error::usage("--only", "unknown stage").is(format!("{name:?}")).must(names.join(", "))
        })
    }
}

/// One process of the battery.
#[derive(Clone, Debug)]
pub struct Step {
    /// Name, unique in the battery.
    pub name: String,
    /// Its part.
    pub stage: Stage,
    /// Program and arguments; `graft` is this program, `{out}` the folder. What measures adds its rows to a file of it as
    /// they come.
    pub command: Vec<String>,
    /// Seconds that it is expected to take: a guess, until a GPU has said.
    pub expected: u64,
    /// Longest run.
    pub limit: Duration,
    /// A step that must have passed: a time counts only where the check did.
    pub after: Option<String>,
    /// It may run beside its neighbours: nothing in it is timed.
    pub beside: bool,
    /// Why it cannot run on this machine.
    pub missing: Option<String>,
}

impl Step {
    fn new(stage: Stage, what: &str, expected: u64, command: &[&str]) -> Step {
        Step {
            name: format!("{}/{what}", stage.name()),
            stage,
            command: command.iter().map(|w| w.to_string()).collect(),
            expected,
            // Long enough for a slow start, short enough that one step that hangs does not take all.
            limit: Duration::from_secs((4 * expected).max(30)),
            after: None,
            beside: false,
            missing: None,
        }
    }

    fn after(mut self, name: String) -> Step {
        self.after = Some(name);
        self
    }

    fn beside(mut self) -> Step {
        self.beside = true;
        self
    }

    fn missing(mut self, why: Option<String>) -> Step {
        self.missing = why;
        self
    }

    /// What it is expected to take of the battery's time: of steps that run side by side, its part.
    pub fn cost(&self) -> Duration {
        let expected = Duration::from_secs(self.expected);
        if self.beside { expected / beside() as u32 } else { expected }
    }
}

/// Rows of ours: operators, and whole models.
pub const OPERATORS: &str = "operators.jsonl";
pub const MODELS: &str = "whole_models.jsonl";
/// Rows of peers, in a folder of their own: raw, as they came. What counts are the pairs that are made of both.
pub const RAW: &str = "raw";
pub const OPERATOR_PEERS: &str = "raw/operator_peers.jsonl";
pub const MODEL_PEERS: &str = "raw/model_peers.jsonl";
/// Every way of an operator; the fastest are in `tuned.csv`.
const TUNED: &str = "raw/tune.jsonl";

/// Operators in the order of what their speed is worth: those of the models' longest parts first.
const FIRST: [&str; 9] = [
    "attention",
    "gemm",
    "gated_conv",
    "ln_modulate",
    "window_attention",
    "linear_attention",
    "cross_attention",
    "gemm_fp8",
    "adamw",
];

/// Operators with so many or such large cases that their measurements take longest.
const WITH_LARGE_CASES: [&str; 5] = ["attention", "gemm", "gated_conv", "cross_attention", "conv2d"];

/// Operators that `tools/peers/gpu` has peers of.
const WITH_PEERS: [&str; 27] = [
    "adamw",
    "add_noise",
    "attention",
    "attention_int8",
    "axpy",
    "branch_deltas",
    "conv2d",
    "conv_silu",
    "cross_attention",
    "gate_residual",
    "gated_conv",
    "gated_conv_2d",
    "gemm",
    "gemm_fp8",
    "group_norm_silu",
    "kv_compress",
    "linear_attention",
    "ln_modulate",
    "long_conv",
    "mamba2",
    "neighborhood_attention",
    "norm_silu_conv2d",
    "qk_norm",
    "relative_attention",
    "rms_norm",
    "upsample",
    "window_attention",
];

/// Whole models of ours: name of the step, seconds, and the arguments of `graft bench`.
const OURS: [(&str, u64, &str); 6] = [
    ("dit_forward", 15, "model DiT-XL/2 --pixels 256,512 --batch 2,64 --samples 20"),
    ("dit_training", 20, "train DiT-XL/2 --batch 256 --samples 5"),
    ("pixart_forward", 40, "model PixArt-Sigma --pixels 2048 --batch 2 --grafted 0,50,100 --samples 5"),
    ("pixart_sizes", 40, "model PixArt-Sigma --pixels 512,1024,4096 --batch 2 --samples 3"),
    ("pixart_picture", 60, "e2e PixArt-Sigma --pixels 2048 --batch 1 --grafted 0,50,100 --steps 20 --samples 1"),
    ("dit_grafted", 15, "model DiT-XL/2 --pixels 256 --batch 64 --grafted 50,100 --samples 10"),
];

/// The same for `whole.py` of the peers: name of the step, seconds, and its arguments.
const THEIRS: [(&str, u64, &str); 4] = [
    ("dit_forward", 60, "dit --work forward --pixels 256,512 --batch 2,64"),
    ("dit_training", 60, "dit --work training --pixels 256 --batch 256"),
    ("pixart_forward", 90, "pixart --work forward --pixels 2048 --batch 2"),
    ("pixart_sizes", 90, "pixart --work forward --pixels 512,1024,4096 --batch 2"),
];

/// The battery. `probes` is the folder of recorded cases, `peers` that of the programs that measure others.
///
/// # Errors
/// When the folder of probes cannot be read.
pub fn steps(probes: &Path, peers: &Path) -> Result<Vec<Step>> {
    let mut ops: Vec<&str> = contracts::OPS.iter().filter(|o| !o.elements.is_empty()).map(|o| o.name).collect();
    ops.sort_by_key(|op| FIRST.iter().position(|f| f == op).unwrap_or(FIRST.len()));
    let mut steps = Vec::new();
    let folder = probes.display().to_string();
    let replay = Step::new(Stage::Probes, "replay", 15, &["graft", "op", "replay", &folder, "--backend", "cuda"]);
    let none = !probes.is_dir() || files::list(probes)?.is_empty();
    steps.push(replay.missing(none.then(|| format!("no recorded probes in {folder}"))));
    for op in &ops {
        let command = ["graft", "op", "run", op, "--backend", "cuda", "--element", working(op)];
        steps.push(Step::new(Stage::Conformance, op, 3, &command).beside());
    }
    let check = |op: &str| format!("{}/{op}", Stage::Conformance.name());
    let to = |file: &str| format!("{{out}}/{file}");
    for op in &ops {
        let file = to(OPERATORS);
        let command = [
            &["graft", "--json", "bench", "op", op, "--backend", "cuda"][..],
            &["--element", working(op), "--cold", "--gflop", "1e6", "--rows", &file],
        ];
        let seconds = if WITH_LARGE_CASES.contains(op) { 45 } else { 6 };
        steps.push(Step::new(Stage::Operators, op, seconds, &command.concat()).after(check(op)));
    }
    for (name, seconds, words) in OURS {
        let (words, file): (Vec<&str>, _) = (words.split(' ').collect(), to(MODELS));
        let bf16 = ["--backend", "cuda", "--dtype", "bf16", "--rows", &file];
        let command = [&["graft", "--json", "bench"], &words[..], &bf16].concat();
        steps.push(Step::new(Stage::Models, name, seconds, &command));
    }
    let (table, file) = (to("tuned.csv"), to(TUNED));
    let choices = |op: &&&str| contracts::OPS.iter().any(|o| o.name == **op && o.ways.len() > 1);
    for op in ops.iter().filter(choices) {
        let tune = [
            &["graft", "--json", "op", "tune", op, "--element", working(op)][..],
            &["--samples", "10", "--write", &table, "--rows", &file],
        ];
        steps.push(Step::new(Stage::Tune, op, 10, &tune.concat()).after(check(op)));
    }
    let sanitizer = on_path("compute-sanitizer");
    for op in ops.iter().filter(|op| working(op) == "bf16" && computes_in(op, "f32")) {
        let command = ["graft", "op", "run", op, "--backend", "cuda", "--element", "f32"];
        steps.push(Step::new(Stage::Rest, &format!("f32 {op}"), 3, &command).beside());
    }
    for op in ops.iter().take(FIRST.len()) {
        let command = ["compute-sanitizer", "--error-exitcode", "1", "graft", "op", "run", op, "--backend", "cuda"];
        let step = Step::new(Stage::Rest, &format!("sanitizer {op}"), 30, &command).after(check(op));
        steps.push(step.missing((!sanitizer).then(|| "compute-sanitizer is not installed".to_string())));
    }
    let (python, program) = (python(), peers.display().to_string());
    let absent = match (peers.join("__main__.py").is_file(), on_path(&python)) {
        (false, _) => Some(format!("no peers in {program}")),
        (_, false) => Some(format!("{python} is not installed")),
        _ => None,
    };
    let no_models = absent.clone().or_else(|| {
        let models = peers.parent().is_none_or(|p| !p.join("models.py").is_file());
        models.then(|| format!("no models.py beside {program}"))
    });
    let alone = std::iter::once("ceilings").chain(ops.iter().copied().filter(|op| WITH_PEERS.contains(op)));
    for (index, op) in alone.enumerate() {
        // Whole models follow the operators that their time goes to.
        if index == FIRST.len() {
            steps.extend(whole_models(peers, &python, &no_models));
        }
        let seconds = if FIRST.contains(&op) { 25 } else { 15 };
        let (budget, file) = ((3 * seconds).to_string(), to(OPERATOR_PEERS));
        let element = if op == "ceilings" { "bf16" } else { working(op) };
        let command =
            [&python, &program, op, "--element", element, "--cold", "--budget", budget.as_str(), "--out", &file];
        steps.push(Step::new(Stage::Peers, op, seconds, &command).missing(absent.clone()));
    }
    Ok(steps)
}

/// The peers of whole models.
fn whole_models(peers: &Path, python: &str, missing: &Option<String>) -> Vec<Step> {
    let (whole, file) = (peers.join("whole.py").display().to_string(), format!("{{out}}/{MODEL_PEERS}"));
    let step = |(name, seconds, words): (&str, u64, &str)| {
        let words: Vec<&str> = words.split(' ').collect();
        let command = [&[python, &whole], &words[..], &["--graft", "graft", "--out", &file]].concat();
        Step::new(Stage::Peers, &format!("whole {name}"), seconds, &command).missing(missing.clone())
    };
    THEIRS.into_iter().map(step).collect()
}

/// The type that an operator's kernels are for: bf16 where they have it.
fn working(op: &str) -> &'static str {
    if computes_in(op, "bf16") { "bf16" } else { "f32" }
}

/// Whether an operator has kernels of a type.
fn computes_in(op: &str, element: &str) -> bool {
    contracts::OPS.iter().any(|o| o.name == op && o.elements.iter().any(|e| e.name() == element))
}

/// The Python of the peers: that of `GRAFT_PYTHON`, else the machine's own.
fn python() -> String {
    std::env::var("GRAFT_PYTHON").unwrap_or_else(|_| "python3".to_string())
}

/// Whether a program is there: a path, or a name in a folder of `PATH`.
fn on_path(program: &str) -> bool {
    Path::new(program).is_absolute() && Path::new(program).is_file()
        || std::env::var_os("PATH").is_some_and(|p| std::env::split_paths(&p).any(|f| f.join(program).is_file()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_is_taken_before_its_check() {
        let steps = steps(Path::new("nowhere"), Path::new("none")).unwrap();
        assert!(steps[0].missing.as_deref().is_some_and(|why| why.contains("nowhere")));
        let mut names = Vec::new();
        for step in &steps {
            assert!(!names.contains(&step.name), "{}", step.name);
            assert!(step.after.as_ref().is_none_or(|after| names.contains(after)), "{}", step.name);
            names.push(step.name.clone());
        }
        let timed = steps.iter().filter(|s| s.stage == Stage::Operators);
        assert!(timed.clone().count() > 10 && timed.clone().all(|s| s.after.is_some()));
        assert_eq!(timed.clone().next().map(|s| s.name.as_str()), Some("operators/attention"));
        assert!(steps.iter().filter(|s| s.stage == Stage::Peers).all(|s| s.missing.is_some()));
    }

    #[test]
    fn stages_come_in_their_order_and_peers_are_of_known_operators() {
        let steps = steps(Path::new("nowhere"), Path::new("none")).unwrap();
        let mut seen: Vec<Stage> = steps.iter().map(|s| s.stage).collect();
        seen.dedup();
        assert_eq!(seen, Stage::ALL);
        for op in WITH_PEERS {
            assert!(contracts::OPS.iter().any(|o| o.name == op), "{op}");
        }
        let adamw = steps.iter().find(|s| s.name == "conformance/adamw").unwrap();
        assert!(adamw.command.ends_with(&["--element".to_string(), "f32".to_string()]));
    }
}
