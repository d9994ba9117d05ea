//! `graft gpu` without a GPU: its steps, its report, and the programs that measure others: their list with any Python,
//! their results where PyTorch is at hand.

use crate::support::{folder, refuse, succeed};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

/// What a peer program prints; None where there is no such Python.
fn printed(python: &str, words: &[&str]) -> Option<String> {
    let ran = Command::new(python).args(words).current_dir(root()).output().ok()?;
    let (text, said) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "{words:?}: {said}");
    Some(text.into_owned())
}

/// A Python with PyTorch: that of `tools/peers/setup_torch_cpu.sh`.
fn torch() -> Option<String> {
    let python = root().join(".venv-torch-cpu/bin/python");
    python.is_file().then(|| python.display().to_string())
}

#[test]
fn the_battery_shows_its_steps_and_runs_nothing() {
    let here = folder("gpu");
    let plan: Value = serde_json::from_str(&succeed(&here, &["--json", "gpu", "--dry-run"]).text()).unwrap();
    let steps = plan.as_array().unwrap();
    let mut stages: Vec<&str> = steps.iter().map(|s| s["stage"].as_str().unwrap()).collect();
    stages.dedup();
    assert_eq!(stages, ["probes", "conformance", "operators", "models", "tune", "rest", "peers"]);
    assert!(steps.iter().all(|s| s["expected_s"].as_u64().unwrap() <= s["limit_s"].as_u64().unwrap()));
    assert!(steps.iter().filter(|s| s["stage"] == "operators").all(|s| s["reached"] == true));
    let short = succeed(&here, &["gpu", "--dry-run", "--minutes", "1"]).text();
    assert!(!short.contains("\n0 would not be reached in 1.0 min"), "{short}");
    // Nothing of the repository is in this folder.
    let peers = steps.iter().find(|s| s["step"] == "peers/attention").unwrap();
    assert!(peers["skip"].as_str().unwrap().contains("tools/peers/gpu"), "{peers}");
    if let Some(none) = steps.iter().find(|s| s["step"] == "conformance/gemm").filter(|s| !s["skip"].is_null()) {
        assert!(none["skip"].as_str().unwrap().contains("driver"), "{none}");
        // Without a GPU nothing runs and nothing is written.
        refuse(&here, &["gpu", "--out", "results"], 1, &["NVIDIA driver", "--backend cpu"]);
        assert!(!here.join("results").exists());
    }
    refuse(&here, &["gpu", "--dry-run", "--only", "everything"], 2, &["--only", "conformance"]);
    refuse(&here, &["gpu", "--dry-run", "--minutes", "0"], 2, &["--minutes"]);
}

#[test]
fn a_report_sets_ours_beside_the_best_peer_and_says_what_was_not_measured() {
    let here = folder("gpu-report");
    std::fs::create_dir_all(here.join("results/raw")).unwrap();
    let row = |ms: f64, more: &str| {
        format!(
            r#"{{"bench":"op","case":"attention/pixart_2k","work":"forward","axes":{{}},"backend":"cuda","element":"bf16","device":"NVIDIA H200","ms":{ms},"flops":1.2e12,"version":"v"{more}}}"#
        )
    };
    std::fs::write(here.join("results/operators.jsonl"), row(2.4, "") + "\n").unwrap();
    let peers = [
        row(3.0, r#","peer":"SDPA cuDNN""#),
        row(3.6, r#","peer":"SDPA flash""#),
        row(0.0, r#","peer":"FlashAttention 3","could_not_run":"no flash_attn_interface""#).replace("\"ms\":0,", ""),
    ];
    std::fs::write(here.join("results/raw/operator_peers.jsonl"), peers.join("\n") + "\n").unwrap();
    let targets = root().join("benches/targets.toml").display().to_string();
    let text = succeed(&here, &["gpu", "--report", "--out", "results", "--targets", &targets]).text();
    let line = |name: &str| text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{name}: {text}"));
    let attention = line("attention, forward ");
    for word in ["4.8", "gate reached", "SDPA cuDNN, 3.0000 ms", "1.25"] {
        assert!(attention.contains(word), "{word} is not in {attention}");
    }
    assert!(line("attention, backward").contains("not measured"));
    assert!(line("could not run: FlashAttention 3").contains("no flash_attn_interface"));
    let pairs = lines(&std::fs::read_to_string(here.join("results/pairs.jsonl")).unwrap());
    assert_eq!(pairs.len(), 3);
    let cudnn = pairs.iter().find(|p| p["peer"]["name"] == "SDPA cuDNN").unwrap();
    assert_eq!((&cudnn["ratio"], &cudnn["op"]), (&Value::from(1.25), &Value::from("attention")));
}

#[test]
fn the_list_of_peers_needs_no_library_and_is_that_of_the_battery() {
    let Some(text) = printed("python3", &["tools/peers/gpu", "--list"]) else {
        return eprintln!("SKIP: this machine has no python3");
    };
    let listed: BTreeSet<&str> = text.lines().filter_map(|line| line.split('/').next()).collect();
    let plan: Value =
        serde_json::from_str(&succeed(&root(), &["--json", "gpu", "--dry-run", "--only", "peers"]).text()).unwrap();
    let steps = plan.as_array().unwrap().iter().filter_map(|s| s["step"].as_str()?.strip_prefix("peers/"));
    assert_eq!(listed, steps.filter(|op| *op != "ceilings" && !op.starts_with("whole ")).collect());
    let flash = "attention/pixart_2k  forward, backward  SDPA flash";
    assert!(text.lines().any(|line| line == flash), "{text}");
}

#[test]
fn peers_agree_with_the_formulas_of_the_contracts() {
    let Some(python) = torch() else {
        return eprintln!("SKIP: no .venv-torch-cpu; tools/peers/setup_torch_cpu.sh makes it");
    };
    // One of each kind; without names the program goes through all.
    let ops = ["attention", "window_attention", "gemm", "gated_conv", "mamba2", "linear_attention", "adamw", "conv2d"];
    let words =
        [&["tools/peers/gpu", "--device", "cpu", "--tiny", "--element", "f32", "--first", "1"], &ops[..]].concat();
    let text = printed(&python, &words).unwrap_or_default();
    let mut good = BTreeSet::new();
    for row in lines(&text).iter().filter(|row| row["bench"] == "op") {
        let (case, peer) = (row["case"].as_str().unwrap(), row["peer"].as_str().unwrap());
        let why = row["could_not_run"].as_str().unwrap_or_default();
        assert!(!why.starts_with("wrong"), "{case}, {peer}: {why}");
        if row["ms"].is_number() {
            good.insert(format!("{} {peer} {}", case.split('/').next().unwrap(), row["work"].as_str().unwrap()));
        }
    }
    for must in [
        "attention SDPA flash backward",
        "window_attention FlexAttention forward",
        "gemm cuBLASLt alone forward",
        "gated_conv shifts, compile backward",
        "mamba2 chunked, compile backward",
        "linear_attention eager backward",
        "adamw fused AdamW forward",
        "conv2d cuDNN channels last, eager forward",
    ] {
        assert!(good.contains(must), "{must} is not among {good:?}");
    }
}

#[test]
fn whole_models_of_pytorch_agree_with_ours() {
    let (Some(python), true) = (torch(), root().join("tools/peers/models.py").is_file()) else {
        return eprintln!("SKIP: no .venv-torch-cpu; tools/peers/setup_torch_cpu.sh makes it");
    };
    for kind in ["dit", "pixart"] {
        let program = ["tools/peers/gpu/whole.py", kind, "--graft", env!("CARGO_BIN_EXE_graft")];
        let words = [&program[..], &["--device", "cpu", "--tiny", "--element", "f32"]].concat();
        let rows = lines(&printed(&python, &words).unwrap_or_default());
        assert_eq!(rows.len(), 2);
        for row in rows {
            assert!(row["ms"].is_number() && row["ours_error"].as_f64().is_some_and(|e| e < 1e-3), "{row}");
        }
    }
}
