//! The page of paired rows: who is faster at what, by how much, and how far either is from what it must move and add.

use graft_engine::report::chart::{BarChart, Bars};
use graft_engine::report::format::significant;
use graft_engine::report::html::{self, Html};
use graft_engine::report::ladder;
use graft_engine::report::results::ladders::Ladder;
use serde_json::Value;
use std::collections::BTreeMap;

/// The number of targets that hold, and the rows of those that do not.
pub fn verdicts(rows: &[Value]) -> (usize, Vec<&Value>) {
    let judged: Vec<&Value> = rows.iter().filter(|r| r["target"].is_number()).collect();
    let below: Vec<&Value> = judged.iter().copied().filter(|r| !holds(r)).collect();
    (judged.len() - below.len(), below)
}

fn holds(row: &Value) -> bool {
    row["ratio"].as_f64().unwrap_or(f64::NAN) >= row["target"].as_f64().unwrap_or(0.0)
}

/// A self-contained page of rows; `own` is the page of rows without peers, where there is one. Of the `ladders` those of
/// the operators that were measured.
pub fn page(rows: &[Value], own: Option<&str>, ladders: &[Ladder]) -> String {
    let title = "Ours and peers in turns";
    html::page(title, |h| {
        h.leaf("h1", &[], title);
        let (held, below) = verdicts(rows);
        let text = format!(
            "{held} targets hold, {} do not. A ratio is the peer's time over ours: above 1 we are faster. Both sides ran in turns on the same inputs and threads, outputs and gradients were compared first, and short calls were looped to {} ms on either side.",
            below.len(),
            crate::paired::turns::LEAST_MS
        );
        h.leaf("p", &[], &text);
        if let Some(own) = own {
            h.element("p", &[], |h| h.leaf("a", &[("href", own)], "What has no peer, and how cost grows"));
        }
        for row in rows.iter().filter(|r| !r["could_not_run"].is_null()) {
            let why = row["could_not_run"].as_str().unwrap_or_default();
            h.leaf("p", &[("class", "note")], &format!("{} could not run: {why}", text_of(&row["peer"]["name"])));
        }
        ratios(h, rows);
        if !below.is_empty() {
            h.leaf("h2", &[], "Targets that do not hold");
            table(h, below);
        }
        h.leaf("h2", &[], "Models");
        table(h, rows.iter().filter(|r| !r["model"].is_null()).collect());
        h.leaf("h2", &[], "Operators");
        table(h, rows.iter().filter(|r| r["model"].is_null() && r["ratio"].is_number()).collect());
        beside_ladders(h, rows, ladders);
    })
}

/// The ladders, each below the rows of its operator.
fn beside_ladders(h: &mut Html, rows: &[Value], ladders: &[Ladder]) {
    let mut found: BTreeMap<&str, Vec<Vec<String>>> = BTreeMap::new();
    for row in rows.iter().filter(|r| r["ratio"].is_number()) {
        let Some(op) = row["op"].as_str() else { continue };
        let number = |key: &str| row[key].as_f64().map_or("-".to_string(), significant);
        let words = ["case", "pass", "dtype"].map(|key| text_of(&row[key]).to_string());
        let measured = [number("ours_ms"), number("peer_ms"), number("ratio")];
        found.entry(op).or_default().push([&words[..], &measured].concat());
    }
    ladder::draw(h, ladders, &["case", "pass", "dtype", "ours, ms", "peer, ms", "ratio"], &found);
}

/// Bars of the geometric mean of the ratios of every operator, a series for each peer.
fn ratios(h: &mut Html, rows: &[Value]) {
    let mut found: BTreeMap<&str, BTreeMap<&str, Vec<f64>>> = BTreeMap::new();
    for row in rows {
        if let (Some(op), Some(peer), Some(ratio)) =
            (row["op"].as_str(), row["peer"]["name"].as_str(), row["ratio"].as_f64())
        {
            found.entry(op).or_default().entry(peer).or_default().push(ratio.ln());
        }
    }
    let mut peers: Vec<&str> = found.values().flat_map(|peers| peers.keys().copied()).collect();
    peers.sort_unstable();
    peers.dedup();
    let mean = |logs: &Vec<f64>| (logs.iter().sum::<f64>() / logs.len() as f64).exp();
    let groups = found.iter().map(|(op, by_peer)| Bars {
        label: (*op).to_string(),
        values: peers.iter().map(|peer| by_peer.get(peer).map(mean)).collect(),
    });
    h.leaf("h2", &[], "Peer's time over ours, mean of an operator's cases");
    let title = "ratio by operator".to_string();
    let series = peers.iter().map(|peer| (*peer).to_string()).collect();
    BarChart { title, series, groups: groups.collect(), mark: Some((1.0, "equal".into())) }.draw(h);
}

fn table(h: &mut Html, rows: Vec<&Value>) {
    h.element("table", &[], |h| {
        h.element("tr", &[], |h| {
            for head in [
                "case",
                "pass",
                "dtype",
                "ours, ms",
                "peer, ms",
                "ratio",
                "target",
                "peer and its way",
                "ours / peer, GB/s",
                "ours / peer, GFLOP/s",
                "spread of ours, of the peer",
            ] {
                h.leaf("th", &[], head);
            }
        });
        for row in rows {
            let number = |key: &str| row[key].as_f64();
            let shown = |key: &str| number(key).map_or("-".to_string(), significant);
            // Bytes and operations of a call over the milliseconds of either side.
            let rate = |count: &str| match (number(count), number("ours_ms"), number("peer_ms")) {
                (Some(count), Some(ours), Some(peer)) if count > 0.0 => {
                    format!("{} / {}", significant(count / ours / 1e6), significant(count / peer / 1e6))
                }
                _ => "-".to_string(),
            };
            let target = match number("target") {
                Some(target) if holds(row) => format!("{target} holds"),
                Some(target) => format!("{target} missed"),
                None => "-".to_string(),
            };
            let spread = |key: &str| number(key).map_or("-".to_string(), |s| format!("{:.0} %", 100.0 * s));
            let name = row["model"].as_str().or(row["case"].as_str()).unwrap_or("-");
            let way = format!(
                "{} {}: {}",
                text_of(&row["peer"]["name"]),
                text_of(&row["peer"]["version"]),
                text_of(&row["way"])
            );
            let cells = [
                name.to_string(),
                text_of(&row["pass"]).to_string(),
                text_of(&row["dtype"]).to_string(),
                shown("ours_ms"),
                shown("peer_ms"),
                shown("ratio"),
                target,
                way,
                rate("bytes"),
                rate("flops"),
                format!("{}, {}", spread("ours_spread"), spread("peer_spread")),
            ];
            h.element("tr", &[], |h| cells.iter().for_each(|cell| h.leaf("td", &[], cell)));
        }
    });
}

fn text_of(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_page_names_what_is_missed_and_who_could_not_run() {
        let row = |case: &str, ratio: f64| {
            json!({ "op": "gemm", "case": case, "pass": "forward", "dtype": "f32", "ours_ms": 2.0, "peer_ms": 2.0 * ratio,
                "ratio": ratio, "target": 0.9, "peer": { "name": "PyTorch", "version": "2" }, "way": "linear <x>", "flops": 4e6 })
        };
        let absent = json!({ "peer": { "name": "candle" }, "could_not_run": "no compiler" });
        let rows = [row("gemm/a", 1.5), row("gemm/b", 0.5), absent];
        let (held, below) = verdicts(&rows);
        assert_eq!((held, below.len(), &below[0]["case"]), (1, 1, &json!("gemm/b")));
        let ladder = Ladder { op: "gemm".into(), title: " (CPU)".into(), text: "tiles of 14×32".into() };
        let page = page(&rows, Some("own.html"), &[ladder]);
        for words in [
            "1 targets hold, 1 do not",
            "candle could not run: no compiler",
            "linear &lt;x&gt;",
            "0.9 missed",
            "href=\"own.html\"",
            "Ladder of gemm (CPU)",
            "tiles of 14×32",
            &format!("{} / {}", significant(2.0), significant(4.0)),
        ] {
            assert!(page.contains(words), "{words}");
        }
    }
}
