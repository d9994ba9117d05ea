//! Whole models in turns with PyTorch.

use super::peer::{Peer, Program};
use super::turns::{Turns, idle};
use super::{Settings, agree, difference, rows};
use crate::models::{ModelCase, Prepared, Work};
use graft_engine::autograd::Precision;
use graft_engine::error::{Error, Result};
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

/// Updates after which the losses of both sides are compared.
const COMPARED_STEPS: usize = 3;

/// Long enough for the threads of one side to go to sleep before the other begins.
const PAUSE: Duration = Duration::from_millis(150);

/// The ways in which PyTorch runs a model: as it is written, and compiled.
pub const WAYS: [&str; 2] = ["eager", "compile"];

/// Measures a case against PyTorch running it in `way`, and gives its row.
///
/// # Errors
/// Outputs that disagree, a busy machine, a peer that cannot run.
pub fn measure(settings: &Settings, case: ModelCase, dtype: &str, way: &str, python: &Path) -> Result<Value> {
    let precision = if dtype == "bf16" { Precision::Bf16 } else { Precision::F32 };
    let folder = settings.root.join("target/paired").join(format!("{}-{dtype}", case.name));
    let mut ours = Prepared::new(case, precision)?;
    ours.export(&folder)?;
    let mut peer = Peer::start(&program(settings, case, dtype, way, python, &folder))?;
    let found = compare(&mut ours, &mut peer, case, &folder)?;
    agree(case.name, dtype, found)?;
    let busy = idle(Duration::from_secs(1), settings.dry_run)?;
    let mut run = |calls| {
        let start = Instant::now();
        for _ in 0..calls {
            ours.run()?;
        }
        Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    let turns = Turns::take(settings.pairs.min(case.pairs), PAUSE, &mut run, &mut |calls| {
        peer.milliseconds(&json!({ "ask": "run", "calls": calls }))
    })?;
    // Targets are set against PyTorch as it is written.
    let target = case.targets[usize::from(precision == Precision::Bf16)].filter(|_| way == WAYS[0]);
    let measured = json!({
        "case": case.name, "model": case.network.words(), "pass": case.work.pass(), "work": case.work.words(), "dtype": dtype,
        "shape": { "batch": case.batch, "tokens": ours.tokens() }, "way": way,
        "difference": found, "busy_before": busy, "peer": peer.about,
    });
    let origin = rows::origin(&settings.root, settings.threads);
    Ok(rows::merged(rows::merged(measured, turns.fields(target)), origin))
}

/// The peer of a case.
fn program(settings: &Settings, case: ModelCase, dtype: &str, way: &str, python: &Path, folder: &Path) -> Program {
    let [model, work] = [case.network.loader(), case.work.argument()];
    let words = ["--model", model, "--work", work, "--dtype", dtype, "--way", way, "--threads"];
    let script = settings.root.join("tools/peers/pytorch_cpu.py");
    let mut arguments = vec![script.into_os_string(), folder.as_os_str().to_owned()];
    arguments.extend(words.iter().map(OsString::from));
    arguments.push(settings.threads.to_string().into());
    Program {
        name: "PyTorch",
        program: python.to_owned(),
        arguments,
        environment: Vec::new(),
        setup: "tools/peers/setup_torch_cpu.sh",
    }
}

/// Relative RMS difference of the outputs, or the largest one of the losses of the first steps.
fn compare(ours: &mut Prepared, peer: &mut Peer, case: ModelCase, folder: &Path) -> Result<f64> {
    if case.work == Work::TrainingStep {
        let mut worst = 0.0f64;
        for _ in 0..COMPARED_STEPS {
            let answer = peer.ask(&json!({ "ask": "run", "calls": 1 }))?;
            let (a, b) = (f64::from(ours.run()?[0]), answer["loss"].as_f64().unwrap_or(f64::NAN));
            let relative = (a - b).abs() / b.abs();
            worst = if relative > worst || relative.is_nan() { relative } else { worst };
        }
        return Ok(worst);
    }
    peer.ask(&json!({ "ask": "output" }))?;
    let path = folder.join("peer_output.f32");
    let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, "read the peer's output", &e))?;
    let theirs: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let mine = ours.run()?;
    if theirs.len() != mine.len() {
        return Err(Error::failure(path.display().to_string(), "wrong size").is(theirs.len()).must(mine.len()));
    }
    Ok(difference(&mine, &theirs))
}
