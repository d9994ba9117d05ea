//! Ours beside every peer: rows of the same case, work, working type and axes, made into pairs.

use super::plan::{MODEL_PEERS, MODELS, OPERATOR_PEERS, OPERATORS};
use crate::error::Result;
use crate::io::jsonl::JsonLog;
use crate::report::bench::CEILING;
use crate::report::results::rows::{Row, newest, of_file};
use serde_json::{Value, json};
use std::path::Path;

/// The pairs, made anew after every run of the battery.
const PAIRS: &str = "pairs.jsonl";

/// What a run left in its folder, made into the rows of [`PAIRS`]; files that are not there have none.
///
/// # Errors
/// A damaged file.
pub fn of(folder: &Path) -> Result<Vec<Value>> {
    let all = |files: [&str; 2]| -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for path in files.iter().map(|f| folder.join(f)).filter(|p| p.is_file()) {
            rows.extend(of_file(&path)?);
        }
        Ok(rows)
    };
    Ok(pairs(&all([OPERATORS, MODELS])?, all([OPERATOR_PEERS, MODEL_PEERS])?))
}

/// A record of ours with each of its peers, the last row of each. `ratio` is the peer's time over ours; a peer that could
/// not run has its reason instead. `less` names what a peer leaves out of the work. What a peer's program found to be the
/// best of the device is kept as it is.
fn pairs(ours: &[Row], mut peers: Vec<Row>) -> Vec<Value> {
    let ours = newest(ours.iter(), Row::measured);
    peers.extend(ours.iter().filter_map(|row| instead_of_fp8(row)));
    let peers = newest(peers.iter(), |row| (row.measured(), row.peer_name().to_string()));
    let of = |row: &Row| row.maybe("bench") == Some(CEILING);
    let mut pairs: Vec<Value> = peers.iter().filter(|row| of(row)).map(|row| row.value.clone()).collect();
    for ours in ours.iter().filter(|row| !of(row)) {
        let same = peers.iter().filter(|peer| peer.measured() == ours.measured());
        pairs.extend(same.map(|peer| pair(&ours.value, &peer.value)));
    }
    pairs
}

/// Writes the pairs of a folder.
///
/// # Errors
/// Those of the file.
pub fn write(folder: &Path, pairs: &[Value]) -> Result<()> {
    let mut log = JsonLog::create(&folder.join(PAIRS))?;
    pairs.iter().try_for_each(|pair| log.append(pair))
}

/// Our product in bf16 as a peer of the one in fp8, of the same case.
fn instead_of_fp8(row: &Row) -> Option<Row> {
    let case = row.maybe("case")?.strip_prefix("gemm/")?;
    let mut peer = row.clone();
    peer.value["case"] = format!("gemm_fp8/{case}").into();
    peer.value["peer"] = "gemm, ours in bf16".into();
    (row.element() == "bf16").then_some(peer)
}

fn pair(ours: &Value, peer: &Value) -> Value {
    let mut pair = json!({
        "bench": ours["bench"],
        "work": ours["work"],
        "backend": "cuda",
        "dtype": ours["element"],
        "device": ours["device"],
        "axes": ours["axes"],
        "threads": Value::Null,
        "ours_ms": ours["ms"],
        "peer": { "name": peer["peer"], "version": peer["version"] },
        "commit": ours["version"],
    });
    let case = ours["case"].as_str().unwrap_or_default();
    match case.split_once('/').filter(|_| ours["bench"] == "op") {
        Some((op, name)) => {
            pair["op"] = op.into();
            pair["case"] = name.into();
            pair["pass"] = ours["work"].clone();
        }
        None => {
            pair["model"] = case.into();
            pair["case"] = case.into();
            pair["shape"] = json!({ "batch": ours["axes"]["batch"], "tokens": ours["axes"]["tokens"] });
        }
    }
    for key in ["flops", "bytes"] {
        if ours[key].is_number() {
            pair[key] = ours[key].clone();
        }
    }
    for key in ["less", "could_not_run"] {
        if let Some(words) = peer[key].as_str() {
            pair[key] = words.into();
        }
    }
    if let (Some(mine), Some(theirs)) = (ours["ms"].as_f64(), peer["ms"].as_f64()) {
        pair["peer_ms"] = theirs.into();
        pair["ratio"] = (theirs / mine).into();
    }
    pair
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::results::rows::tests::row as of;

    fn row(case: &str, ms: f64, peer: Option<&str>) -> Row {
        of(json!({ "bench": "op", "case": case, "work": "forward", "axes": {}, "backend": "cuda", "element": "bf16",
            "device": "NVIDIA H200", "ms": ms, "flops": 4e12, "bytes": 2e9, "version": "1", "peer": peer }))
    }

    #[test]
    fn rows_of_the_same_work_become_pairs_and_the_last_counts() {
        let mut cold = row("attention/a", 9.0, Some("SDPA"));
        cold.value["axes"] = json!({ "cold L2": 1.0 });
        let mut absent = row("attention/a", 0.0, Some("FA3"));
        (absent.value["ms"], absent.value["could_not_run"]) = (Value::Null, "no flash_attn_interface".into());
        let mut ceiling = row("copy", 1.0, Some("PyTorch"));
        ceiling.value["bench"] = CEILING.into();
        let ours = [row("attention/a", 8.0, None), row("attention/a", 2.0, None), row("gemm/b", 1.0, None)];
        let pairs = pairs(&ours, vec![row("attention/a", 3.0, Some("SDPA")), cold, absent, ceiling.clone()]);
        assert_eq!(pairs.len(), 3);
        assert_eq!(pairs[0], ceiling.value);
        assert_eq!((&pairs[1]["could_not_run"], &pairs[1]["ratio"]), (&"no flash_attn_interface".into(), &Value::Null));
        assert_eq!(
            (&pairs[2]["op"], &pairs[2]["case"], &pairs[2]["ratio"]),
            (&"attention".into(), &"a".into(), &1.5.into())
        );
    }

    #[test]
    fn the_product_in_bf16_is_a_peer_of_fp8() {
        let pairs = pairs(&[row("gemm_fp8/fc1", 1.0, None), row("gemm/fc1", 1.75, None)], Vec::new());
        assert_eq!((&pairs[0]["op"], &pairs[0]["ratio"]), (&"gemm_fp8".into(), &1.75.into()));
        assert!(instead_of_fp8(&row("attention/fc1", 1.0, None)).is_none());
    }

    #[test]
    fn a_model_keeps_its_name_with_a_slash() {
        let mut ours = row("DiT-XL/2", 10.0, None);
        (ours.value["bench"], ours.value["axes"]) = ("model".into(), json!({ "batch": 64.0, "tokens": 256.0 }));
        let mut theirs = ours.clone();
        (theirs.value["peer"], theirs.value["ms"]) = ("compile".into(), 12.0.into());
        let pairs = pairs(&[ours], vec![theirs]);
        assert_eq!((&pairs[0]["model"], &pairs[0]["shape"]["batch"]), (&"DiT-XL/2".into(), &64.0.into()));
        assert_eq!(pairs[0]["op"], Value::Null);
    }
}
