//! Ours beside every peer: rows of the same case, work, working type and axes, made into pairs.

use super::plan::{MODEL_PEERS, MODELS, OPERATOR_PEERS, OPERATORS};
use crate::error::Result;
use crate::io::jsonl::{self, JsonLog};
use serde_json::{Value, json};
use std::path::Path;

/// The pairs, made anew after every run of the battery.
pub const PAIRS: &str = "pairs.jsonl";

/// What a run left in its folder.
#[derive(Default)]
pub struct Rows {
    /// Rows of ours, the last of each subject.
    pub ours: Vec<Value>,
    /// Rows of peers, the last of each subject and peer.
    pub peers: Vec<Value>,
}

impl Rows {
    /// Reads a folder; files that are not there have no rows.
    ///
    /// # Errors
    /// A damaged file.
    pub fn read(folder: &Path) -> Result<Rows> {
        let all = |files: [&str; 2]| -> Result<Vec<Value>> {
            let mut rows = Vec::new();
            for path in files.iter().map(|f| folder.join(f)).filter(|p| p.is_file()) {
                rows.extend(jsonl::read(&path)?);
            }
            Ok(newest(rows))
        };
        let (ours, mut peers) = (all([OPERATORS, MODELS])?, all([OPERATOR_PEERS, MODEL_PEERS])?);
        peers.extend(ours.iter().filter_map(instead_of_fp8));
        Ok(Rows { ours, peers })
    }

    /// A record of ours with each of its peers. `ratio` is the peer's time over ours; a peer that could not run has its
    /// reason instead. `less` names what a peer leaves out of the work.
    pub fn pairs(&self) -> Vec<Value> {
        let mut pairs = Vec::new();
        for ours in self.ours.iter().filter(|row| row["bench"] != "ceiling") {
            for peer in self.peers.iter().filter(|peer| subject(peer) == subject(ours)) {
                pairs.push(pair(ours, peer));
            }
        }
        pairs
    }
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
fn instead_of_fp8(row: &Value) -> Option<Value> {
    let case = row["case"].as_str()?.strip_prefix("gemm/")?;
    let mut peer = row.clone();
    peer["case"] = format!("gemm_fp8/{case}").into();
    peer["peer"] = "gemm, ours in bf16".into();
    (row["element"] == "bf16").then_some(peer)
}

/// What two rows must share to be of the same work on the same device.
pub(super) fn subject(row: &Value) -> [Value; 5] {
    let axes = if row["axes"].is_object() { row["axes"].clone() } else { json!({}) };
    [row["case"].clone(), row["work"].clone(), row["element"].clone(), row["device"].clone(), axes]
}

/// The last row of each subject and peer, in the order of the first.
fn newest(rows: Vec<Value>) -> Vec<Value> {
    let mut found: Vec<Value> = Vec::new();
    for row in rows {
        match found.iter_mut().find(|f| subject(f) == subject(&row) && f["peer"] == row["peer"]) {
            Some(old) => *old = row,
            None => found.push(row),
        }
    }
    found
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
pub(super) mod tests {
    use super::*;

    pub fn row(case: &str, ms: f64, peer: Option<&str>) -> Value {
        let mut row = json!({ "bench": "op", "case": case, "work": "forward", "axes": {}, "backend": "cuda", "element": "bf16",
            "device": "NVIDIA H200", "ms": ms, "flops": 4e12, "bytes": 2e9, "version": "1" });
        if let Some(name) = peer {
            row["peer"] = name.into();
        }
        row
    }

    #[test]
    fn rows_of_the_same_work_become_pairs_and_the_last_counts() {
        let mut cold = row("attention/a", 9.0, Some("SDPA"));
        cold["axes"] = json!({ "cold L2": 1.0 });
        let mut absent = row("attention/a", 0.0, Some("FA3"));
        absent["ms"] = Value::Null;
        absent["could_not_run"] = "no flash_attn_interface".into();
        let rows = Rows {
            ours: newest(vec![row("attention/a", 8.0, None), row("attention/a", 2.0, None), row("gemm/b", 1.0, None)]),
            peers: vec![row("attention/a", 3.0, Some("SDPA")), cold, absent],
        };
        let pairs = rows.pairs();
        assert_eq!(pairs.len(), 2);
        assert_eq!(
            (&pairs[0]["op"], &pairs[0]["case"], &pairs[0]["ratio"]),
            (&"attention".into(), &"a".into(), &1.5.into())
        );
        assert_eq!((&pairs[1]["could_not_run"], &pairs[1]["ratio"]), (&"no flash_attn_interface".into(), &Value::Null));
    }

    #[test]
    fn the_product_in_bf16_is_a_peer_of_fp8() {
        let ours = vec![row("gemm_fp8/fc1", 1.0, None)];
        let pairs = Rows { ours, peers: instead_of_fp8(&row("gemm/fc1", 1.75, None)).into_iter().collect() }.pairs();
        assert_eq!((&pairs[0]["op"], &pairs[0]["ratio"]), (&"gemm_fp8".into(), &1.75.into()));
        assert_eq!(instead_of_fp8(&row("attention/fc1", 1.0, None)), None);
    }

    #[test]
    fn a_model_keeps_its_name_with_a_slash() {
        let mut ours = row("DiT-XL/2", 10.0, None);
        (ours["bench"], ours["axes"]) = ("model".into(), json!({ "batch": 64.0, "tokens": 256.0 }));
        let mut theirs = ours.clone();
        (theirs["peer"], theirs["ms"]) = ("compile".into(), 12.0.into());
        let pairs = Rows { ours: vec![ours], peers: vec![theirs] }.pairs();
        assert_eq!((&pairs[0]["model"], &pairs[0]["shape"]["batch"]), (&"DiT-XL/2".into(), &64.0.into()));
        assert_eq!(pairs[0]["op"], Value::Null);
    }
}
