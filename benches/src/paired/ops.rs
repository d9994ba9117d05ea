//! Operators: every real case of every contract that a peer has a counterpart for, both passes.

use super::peer::{Peer, Program};
use super::turns::{Turns, idle, loop_of};
use super::{Settings, agree, difference, rows};
use graft_engine::backend::Device;
use graft_engine::error::{Error, Result};
use graft_engine::io::safetensors::{self, TensorFile, TensorRecord};
use graft_engine::ops::check::{CaseRow, Named, Sample, sample_case, time_cases};
use graft_engine::tensor::DType;
use graft_kernels::Tier;
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Long enough for the threads of one side to go to sleep before the other begins.
const PAUSE: Duration = Duration::from_millis(40);

/// How long the machine is watched before a case.
const WATCH: Duration = Duration::from_millis(300);

/// One call this long says how fast a way is.
const LONG_MS: f64 = 100.0;

/// The peer's time over ours that an operator must reach against PyTorch.
const TARGET: f64 = 0.9;
/// The same of the attention family.
const ATTENTION_TARGET: f64 = 1.3;
/// Its members.
const ATTENTION: [&str; 6] = [
    "attention",
    "cross_attention",
    "window_attention",
    "neighborhood_attention",
    "relative_attention",
    "linear_attention",
];

/// The target of an operator.
pub fn target(op: &str) -> f64 {
    if ATTENTION.contains(&op) { ATTENTION_TARGET } else { TARGET }
}

/// Which cases run.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Part of the operator's name, or `=NAME`.
    pub filter: String,
    /// Part of the case's name.
    pub case: String,
    /// `forward`, `backward`, or both where it is empty.
    pub pass: String,
    /// Largest case, in GFLOP of a forward call.
    pub gflop: f64,
    /// Largest case, in megabytes that a forward call moves.
    pub megabytes: f64,
}

impl Choice {
    fn takes(&self, row: &CaseRow) -> bool {
        let op = row.info.name;
        row.tier == Tier::Real
            && self.filter.strip_prefix('=').map_or(op.contains(&self.filter), |exact| op == exact)
            && row.name.contains(&self.case)
            && row.flops as f64 <= self.gflop * 1e9
            && row.bytes as f64 <= self.megabytes * 1e6
    }
}

/// The chosen cases, in the order of the contracts.
fn chosen(choice: &Choice) -> Result<Vec<CaseRow>> {
    let rows = RefCell::new(Vec::new());
    let list = |row: &CaseRow| {
        if choice.takes(row) {
            rows.borrow_mut().push(*row);
        }
        false
    };
    time_cases(&Device::cpu(), Tier::Real, &list, &mut |_, _, _| Ok(()))?;
    let rows = rows.into_inner();
    if rows.is_empty() {
        return Err(Error::usage("paired op", "no case fits")
            .is(format!("operator {:?}, case {:?}, at most {} GFLOP", choice.filter, choice.case, choice.gflop))
            .fix("graft op list names the operators; --gflop and --megabytes set the largest case"));
    }
    Ok(rows)
}

/// What comes of a measurement: a row, or the case and why it has none.
pub type Outcome = std::result::Result<Value, (String, Error)>;

/// Measures the chosen cases against a peer and shows every outcome to `report`. Returns the operators and cases that
/// the peer has no counterpart for, with its reason.
///
/// # Errors
/// The peer cannot start; no case fits; those of `report`.
pub fn measure(
    settings: &Settings,
    choice: &Choice,
    program: &Program,
    report: &mut dyn FnMut(Outcome) -> Result<()>,
) -> Result<BTreeMap<String, String>> {
    let cases = chosen(choice)?;
    let mut peer = Peer::start(program)?;
    let mut without = BTreeMap::new();
    for row in cases {
        let name = format!("{}/{}", row.info.name, row.name);
        // Asked before anything is drawn: large inputs take seconds.
        if let Some(why) = peer.ask(&json!({ "ask": "knows", "op": row.info.name }))?["none"].as_str() {
            without.insert(row.info.name.to_string(), why.to_string());
            continue;
        }
        let busy = match idle(WATCH, settings.dry_run) {
            Ok(busy) => busy,
            Err(e) => {
                report(Err((name, e)))?;
                continue;
            }
        };
        match one(settings, choice, &row, busy, &mut peer, report) {
            Ok(None) => {}
            Ok(Some(why)) => drop(without.insert(name, why)),
            Err(e) => {
                report(Err((name, e)))?;
                // It may have ended over this case; the next one deserves an answer.
                peer = Peer::start(program)?;
            }
        }
    }
    Ok(without)
}

/// One case: inputs travel, outputs of every way are compared, the fastest way takes turns with ours. Returns why the
/// peer has no counterpart, where it has none.
fn one(
    settings: &Settings,
    choice: &Choice,
    row: &CaseRow,
    busy: f64,
    peer: &mut Peer,
    report: &mut dyn FnMut(Outcome) -> Result<()>,
) -> Result<Option<String>> {
    let (op, name) = (row.info.name, format!("{}/{}", row.info.name, row.name));
    let device = Device::cpu();
    let folder = settings.root.join("target/paired").join(format!("{op}-{}", row.name));
    std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, "make the folder", &e))?;
    let sample = sample_case(&device, op, row.name)?;
    let dtype = if row.bf16 || sample.params.contains(&("bf16", 1.0)) { "bf16" } else { "f32" };
    let answer = peer.ask(&request(row, &sample, &folder, dtype)?)?;
    if let Some(why) = answer["none"].as_str() {
        return Ok(Some(why.to_string()));
    }
    let choose = |r: &CaseRow| r.tier == Tier::Real && r.info.name == op && r.name == row.name;
    time_cases(&device, Tier::Real, &choose, &mut |_, pass, call| {
        if !choice.pass.is_empty() && choice.pass != pass {
            return Ok(());
        }
        let mut timed = || -> Result<Option<Value>> {
            let Some((way, found)) = fastest(peer, &answer, pass, &sample, &name, dtype)? else { return Ok(None) };
            let ask = |calls: usize| json!({ "ask": "run", "pass": pass, "way": way, "calls": calls });
            let turns = Turns::take(settings.pairs, PAUSE, &mut |calls| loop_of(call, calls), &mut |calls| {
                peer.milliseconds(&ask(calls))
            })?;
            // Only PyTorch sets targets: the others are there to be read.
            let target = (peer.about["name"] == "PyTorch").then(|| target(op));
            let measured = json!({
                "op": op, "case": name, "pass": pass, "work": pass, "dtype": dtype, "shape": row.shape, "way": way,
                "difference": found, "busy_before": busy, "peer": peer.about,
                "flops": (pass == "forward").then_some(row.flops), "bytes": (pass == "forward").then_some(row.bytes),
            });
            let origin = rows::origin(&settings.root, settings.threads);
            Ok(Some(rows::merged(rows::merged(measured, turns.fields(target)), origin)))
        };
        match timed() {
            Ok(None) => Ok(()),
            Ok(Some(measured)) => report(Ok(measured)),
            Err(e) => report(Err((format!("{name} {pass}"), e))),
        }
    })?;
    // Inputs of large cases are hundreds of megabytes.
    std::fs::remove_dir_all(&folder).map_err(|e| Error::io(&folder, "remove the folder", &e))?;
    Ok(None)
}

/// Writes the inputs below `folder` and words the request that tells the peer of the case.
fn request(row: &CaseRow, sample: &Sample, folder: &Path, dtype: &str) -> Result<Value> {
    let path = folder.join("inputs.safetensors");
    let records = sample.inputs.iter().map(|t| TensorRecord::f32(&t.name, &t.shape, t.values.as_slice()));
    safetensors::write(&path, records, &BTreeMap::new())?;
    let of = |dtype| sample.inputs.iter().filter(|t| t.dtype == dtype).map(|t| t.name.as_str()).collect::<Vec<_>>();
    let number = |text: &str| text.parse::<u64>().ok();
    let dims: Map<String, Value> = row
        .shape
        .split_whitespace()
        .filter_map(|word| word.split_once('=').and_then(|(name, size)| Some((name.to_string(), number(size)?.into()))))
        .collect();
    let params: Map<String, Value> =
        sample.params.iter().map(|(name, value)| ((*name).to_string(), json!(value))).collect();
    let (outputs, grads) = names(sample);
    Ok(json!({
        "ask": "case", "op": row.info.name, "case": row.name, "dims": dims, "params": params, "dtype": dtype,
        "folder": folder, "i32": of(DType::I32), "bf16": of(DType::BF16), "outputs": outputs, "grads": grads,
    }))
}

/// Names of the outputs of the forward pass, and of the inputs that the backward pass gives gradients of.
fn names(sample: &Sample) -> (Vec<&str>, Vec<&str>) {
    let input_of = |result: &'_ Named| {
        let input = result.name.strip_prefix('d')?;
        sample.inputs.iter().find(|t| t.name == input).map(|t| t.name.as_str())
    };
    let outputs = sample.results.iter().filter(|r| input_of(r).is_none()).map(|r| r.name.as_str()).collect();
    (outputs, sample.results.iter().filter_map(input_of).collect())
}

/// The way of the peer that is the fastest of those whose outputs agree, with its difference; none where the peer does
/// not do this pass.
fn fastest(
    peer: &mut Peer,
    answer: &Value,
    pass: &str,
    sample: &Sample,
    name: &str,
    dtype: &str,
) -> Result<Option<(String, f64)>> {
    let ways: Vec<&str> = answer["ways"][pass].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let (mut best, mut refused): (Option<(f64, String, f64)>, _) = (None, None);
    for way in &ways {
        let judged = compare(peer, pass, way, sample).and_then(|found| {
            agree(&format!("{name} {pass}, {way}"), dtype, found)?;
            let mut ms = |calls| peer.milliseconds(&json!({ "ask": "run", "pass": pass, "way": way, "calls": calls }));
            // The first call of a way may compile or pack something.
            let first = ms(1)?;
            let once = if first < LONG_MS { first.min(ms(1)?) } else { first };
            if once > LONG_MS {
                return Ok((once, found));
            }
            let calls = ((5.0 / once).ceil() as usize).clamp(1, 1000);
            Ok((ms(calls)?.min(ms(calls)?) / calls as f64, found))
        });
        match judged {
            Ok((ms, found)) if best.as_ref().is_none_or(|(least, ..)| ms < *least) => {
                best = Some((ms, (*way).to_string(), found));
            }
            Ok(_) => {}
            Err(e) => refused = Some(e),
        }
    }
    match (best, refused) {
        (Some((_, way, found)), _) => Ok(Some((way, found))),
        (None, Some(e)) => Err(e),
        (None, None) => Ok(None),
    }
}

/// The largest relative difference of what the peer gives in one pass.
fn compare(peer: &mut Peer, pass: &str, way: &str, sample: &Sample) -> Result<f64> {
    let answer = peer.ask(&json!({ "ask": "output", "pass": pass, "way": way }))?;
    let path = PathBuf::from(answer["file"].as_str().unwrap_or_default());
    let file = TensorFile::open(&path)?;
    let (outputs, grads) = names(sample);
    let missing = match pass {
        "forward" => outputs.first().filter(|name| file.get(name).is_none()).map(|name| (*name).to_string()),
        _ => grads.iter().map(|name| format!("d{name}")).find(|name| file.get(name).is_none()),
    };
    if let Some(name) = missing {
        return Err(Error::failure(path.display().to_string(), format!("the peer gave no {name}")));
    }
    let mut worst = 0.0;
    for theirs in file.iter() {
        let ours = sample.results.iter().find(|ours| ours.name == theirs.name);
        let Some(ours) = ours else {
            return Err(Error::failure(theirs.place(), "no such output of ours"));
        };
        let found = difference(&ours.values, &theirs.to_f32()?);
        worst = if found > worst || found.is_nan() { found } else { worst };
    }
    Ok(worst)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(filter: &str) -> Choice {
        Choice { filter: filter.into(), case: String::new(), pass: String::new(), gflop: 1.0, megabytes: 100.0 }
    }

    #[test]
    fn cases_are_chosen_by_name_and_size() {
        let rows = chosen(&choice("=ln_modulate")).unwrap();
        assert!(rows.iter().all(|r| r.info.name == "ln_modulate" && r.bytes <= 100_000_000));
        assert!(rows.iter().any(|r| r.name == "dit_xl_256") && rows.iter().all(|r| r.name != "pixart_2k"));
        assert!(chosen(&choice("nothing")).is_err());
    }

    #[test]
    fn the_attention_family_has_the_higher_target() {
        assert_eq!((target("window_attention"), target("gemm")), (1.3, 0.9));
        let known: Vec<&str> = chosen(&choice("attention")).unwrap().iter().map(|r| r.info.name).collect();
        assert!(ATTENTION.iter().all(|name| known.contains(name)), "{known:?}");
    }

    #[test]
    fn a_peer_that_repeats_our_outputs_agrees_and_another_does_not() {
        let row = chosen(&Choice { case: "fashion".into(), ..choice("=embed") }).unwrap()[0];
        let folder = std::env::temp_dir().join(format!("graft-paired-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let sample = sample_case(&Device::cpu(), "embed", "fashion").unwrap();
        let told = request(&row, &sample, &folder, "f32").unwrap();
        assert_eq!(
            (&told["dims"]["B"], &told["i32"], &told["grads"]),
            (&json!(128), &json!(["index"]), &json!(["table", "addend"]))
        );
        for scale in [1.0, 1.1] {
            let path = folder.join("peer.safetensors");
            let values: Vec<f32> = sample.results[0].values.iter().map(|v| v * scale).collect();
            safetensors::write(&path, [TensorRecord::f32("y", &[values.len()], &values)], &BTreeMap::new()).unwrap();
            let line = format!("echo '{{}}'; read l; echo '{{\"file\":\"{}\"}}'; read l", path.display());
            let arguments = vec!["-c".into(), line.into()];
            let program = Program { name: "sh", program: "sh".into(), arguments, environment: Vec::new(), setup: "" };
            let found = compare(&mut Peer::start(&program).unwrap(), "forward", "way", &sample).unwrap();
            assert_eq!(agree("embed", "f32", found).is_ok(), scale == 1.0, "{found}");
        }
        std::fs::remove_dir_all(folder).unwrap();
    }
}
