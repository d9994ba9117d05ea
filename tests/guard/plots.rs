//! The committed plots follow from the committed rows.

use super::root;
use graft_engine::report::bench::{plots, read};
use std::collections::BTreeMap;
use std::path::PathBuf;

fn files(folder: PathBuf, extension: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    let mut found: Vec<PathBuf> = entries.map(|e| e.path()).collect();
    found.retain(|path| path.extension().is_some_and(|e| e == extension));
    found.sort();
    found
}

#[test]
fn committed_plots_follow_from_the_rows() {
    let machines = std::fs::read_dir(root().join("benches/results")).unwrap().filter_map(Result::ok);
    let mut rows = Vec::new();
    for file in machines.map(|m| m.path().join("growth.jsonl")).filter(|path| path.is_file()) {
        rows.extend(read(&file).unwrap());
    }
    let committed: BTreeMap<String, String> = files(root().join("docs/results"), "svg")
        .into_iter()
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read_to_string(&path).unwrap()))
        .collect();
    let fresh = plots(&rows);
    let fix = "graft bench plots benches/results/*/growth.jsonl -o docs/results, and commit it";
    assert!(fresh.keys().eq(committed.keys()), "{:?} and {:?}: {fix}", fresh.keys(), committed.keys());
    for (name, text) in &fresh {
        assert!(committed[name] == *text, "{name} is stale: {fix}");
    }
    assert!(fresh.len() >= 4, "tokens, batch, grafting and threads are varied");
}
