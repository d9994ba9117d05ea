//! `graft verify`, `inspect`, `op` and `doctor`: tables, JSON, verdicts.

use crate::support::{entries, folder, golden, model, refuse, run, succeed};
use serde_json::Value;
use std::path::Path;

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn verify_counts_and_decides() {
    let here = folder("verify");
    let good = golden("operators");
    let count = entries(Path::new(&good)).len();
    let table = succeed(&here, &["verify", &good]).text();
    let last = |failed: usize| format!("{count} passed, {failed} failed, 0 skipped");
    assert_eq!(table.lines().last(), Some(&last(0)[..]), "{table}");
    assert!(table.contains("operators/mha") && table.contains("grad.qkv.weight"));
    let json = parsed(&succeed(&here, &["verify", "--json", &good, "--dtype", "bf16"]).text());
    assert_eq!((&json["passed"], &json["failed"]), (&count.into(), &0.into()));
    refuse(&here, &["verify", "."], 1, &["no recorded case"]);
    refuse(&here, &["verify", "none"], 1, &["none", "no such folder"]);
    std::fs::create_dir_all(here.join("cases/new")).unwrap();
    std::fs::write(here.join("cases/new/case.json"), r#"{"family": "weather", "case": "rain"}"#).unwrap();
    let ran = run(&here, &["verify", &good, "cases"]);
    assert_eq!(ran.code, 1);
    assert!(ran.text().contains("unknown family"), "{}", ran.text());
    assert_eq!(ran.text().lines().last(), Some(&last(1)[..]));
}

#[test]
fn inspect_shows_models_and_files() {
    let here = folder("inspect");
    model(&here, 1);
    let text = succeed(&here, &["inspect", "model"]).text();
    for word in ["2 blocks", "width 32", "4 heads", "3 classes", "mha(heads=4)", "mlp(ratio=4)", "F32"] {
        assert!(text.contains(word), "{word} is not in {text}");
    }
    let json = parsed(&succeed(&here, &["inspect", "--json", "model"]).text());
    assert_eq!((&json["depth"], &json["tokens"]), (&2.into(), &16.into()));
    // Attention over 16 tokens of width 32 by 4 heads: products, and two operations per score.
    assert_eq!(json["sites"][0]["flops_operator"], 4.0 * 16.0 * 16.0 * 32.0 + 2.0 * 4.0 * 16.0 * 16.0);
    let tensors = succeed(&here, &["inspect", "model/diffusion_pytorch_model.safetensors"]).text();
    assert!(tensors.contains("transformer_blocks.1.attn1.to_q.weight") && tensors.contains("[32, 32]"), "{tensors}");
    let torch = succeed(&here, &["inspect", &golden("dit_original/pickle_checkpoint/model/flat.pt")]).text();
    for word in ["blocks.0.attn.qkv.weight", "blocks, width 24", "mha(heads="] {
        assert!(torch.contains(word), "{word} is not in {torch}");
    }
    refuse(&here, &["inspect", "none"], 1, &["none", "no such file"]);
    std::fs::write(here.join("a.png"), b"no").unwrap();
    refuse(&here, &["inspect", "a.png"], 1, &["a.png", "damaged png"]);
    std::fs::write(here.join("a.txt"), b"no").unwrap();
    refuse(&here, &["inspect", "a.txt"], 1, &["unknown kind of file"]);
}

#[test]
fn models_are_converted_there_and_back() {
    let here = folder("convert");
    model(&here, 1);
    let original = succeed(&here, &["convert", "model", "a", "--to", "original"]).text();
    assert!(original.contains("a: 2 blocks, original names, f32"), "{original}");
    assert_eq!(crate::support::entries(&here.join("a")), ["config.json", "model.safetensors"]);
    succeed(&here, &["convert", "a", "b", "--to", "diffusers"]);
    let bytes = |dir: &str| std::fs::read(here.join(dir).join("diffusion_pytorch_model.safetensors")).unwrap();
    assert!(bytes("model") == bytes("b"));
    // The classes' names came along, and a converted model draws the same picture.
    let draw = |dir: &str, to: &str| {
        succeed(&here, &["sample", "--model", dir, "--class", "bag", "--steps", "2", "--output-latents", to]);
        std::fs::read(here.join(to)).unwrap().len()
    };
    assert_eq!(draw("model", "m.safetensors"), draw("a", "n.safetensors"));
    let json = parsed(&succeed(&here, &["convert", "--json", "a", "c", "--to", "original", "--dtype", "bf16"]).text());
    assert_eq!((&json["layout"], &json["dtype"], &json["depth"]), (&"original".into(), &"bf16".into(), &2.into()));
    refuse(
        &here,
        &["convert", "model", "b", "--to", "original"],
        2,
        &["b", "the folder is not empty", "nothing was overwritten"],
    );
    refuse(
        &here,
        &["convert", "model", "d", "--to", "original", "--window", "3"],
        2,
        &["--window", "does not leave this open"],
    );
    refuse(&here, &["convert", "model", "d", "--to", "original", "--window", "0"], 2, &["--window", "at least 1"]);
    refuse(&here, &["convert", "none", "d", "--to", "original"], 1, &["none", "no such file or folder"]);
    assert!(!here.join("d").exists());
}

#[test]
fn operators_are_listed_and_checked() {
    let here = folder("op");
    let list = succeed(&here, &["op", "list"]).text();
    for name in ["attention", "gated_conv", "solver_step", "hyena_x", "mha"] {
        assert!(list.contains(name), "{name} is not in {list}");
    }
    let table = succeed(&here, &["op", "check", "--filter", "axpy"]).text();
    let last = table.lines().last().unwrap().to_string();
    assert!(last.contains(" passed, 0 failed, ") && !last.starts_with("0 passed"), "{table}");
    let json = parsed(&succeed(&here, &["op", "run", "patchify", "--json"]).text());
    assert!(json["rows"].as_array().unwrap().iter().all(|r| r["op"] == "patchify" && r["verdict"] == "ok"));
    refuse(&here, &["op", "check", "--filter", "telepathy"], 2, &["--filter", "telepathy"]);
    refuse(&here, &["op", "run", "telepathy"], 2, &["telepathy", "axpy"]);
    refuse(&here, &["op", "check", "--filter", "axpy", "--require", "tpu"], 2, &["--require", "tpu"]);
    let ran = run(&here, &["op", "check", "--filter", "axpy", "--require", "cuda"]);
    assert_eq!(ran.code, 1);
    assert!(ran.text().contains("required, but skipped"), "{}", ran.text());
}

#[test]
fn doctor_reports() {
    let here = folder("doctor");
    let text = succeed(&here, &["doctor"]).text();
    for word in ["version", "processor", "threads", "memory", "this folder", "cuda", "data"] {
        assert!(text.lines().any(|l| l.starts_with(word)), "{word} is not in {text}");
    }
    let json = parsed(&succeed(&here, &["doctor", "--json"]).text());
    assert_eq!(json["findings"].as_array().unwrap().len(), 7);
}

#[test]
fn operators_are_timed() {
    let here = folder("op-bench");
    let line =
        succeed(&here, &["--json", "op", "bench", "gate_residual", "--samples", "2", "--pass", "forward"]).text();
    let row = parsed(line.lines().next().unwrap());
    assert_eq!(row["bench"], "ceiling");
    let row = parsed(line.lines().last().unwrap());
    assert!(row["case"].as_str().unwrap().starts_with("gate_residual/") && row["work"] == "forward", "{row}");
    assert!(row["ms"].as_f64().unwrap() > 0.0 && row["bytes"].as_f64().unwrap() > 0.0, "{row}");
    refuse(&here, &["op", "bench", "telepathy"], 2, &["op bench", "telepathy"]);
    refuse(&here, &["op", "bench", "gemm", "--backend", "tpu"], 2, &["tpu", "cuda"]);
}

#[test]
fn recorded_probes_are_replayed_bit_by_bit() {
    let here = folder("replay");
    let recorded = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/probes");
    let ran = run(&here, &["op", "replay", recorded, "--backend", "emu"]);
    if ran.stderr.contains("no C++ compiler") {
        return;
    }
    assert_eq!(ran.code, 0, "{}{}", ran.text(), ran.stderr);
    assert!(ran.text().contains(" cases, 0 failed"), "{}", ran.text());
    // A source that is not there is refused.
    for extension in ["case", "in.gz", "out.gz"] {
        let name = format!("probe_ldmatrix-{}.{extension}", digest(recorded));
        std::fs::copy(std::path::Path::new(recorded).join(&name), here.join(&name)).unwrap();
    }
    let case = here.join(format!("probe_ldmatrix-{}.case", digest(recorded)));
    let text = std::fs::read_to_string(&case).unwrap();
    std::fs::write(&case, text.replace("source probes.cu", "source nothing.cu")).unwrap();
    refuse(&here, &["op", "replay", ".", "--backend", "emu"], 1, &["1 cases failed"]);
    refuse(&here, &["op", "replay", recorded, "--backend", "cpu"], 1, &["cases failed"]);
}

/// The part of the recording's name that follows from its content.
fn digest(folder: &str) -> String {
    let names = std::fs::read_dir(folder).unwrap().filter_map(Result::ok).map(|e| e.file_name());
    let names = names.filter_map(|n| n.into_string().ok());
    names.filter_map(|n| Some(n.strip_prefix("probe_ldmatrix-")?.strip_suffix(".case")?.to_string())).next().unwrap()
}

#[test]
fn tables_of_results_are_written_and_checked() {
    let here = folder("results");
    std::fs::create_dir_all(here.join("benches/results/some-processor")).unwrap();
    std::fs::create_dir_all(here.join("docs")).unwrap();
    std::fs::write(here.join("README.md"), "<!-- generated: results -->\n<!-- end -->\n").unwrap();
    std::fs::write(here.join("docs/results.md"), "<!-- generated: targets -->\n<!-- end -->\n").unwrap();
    let target = "[[target]]\ngroup = \"start\"\nname = \"help\"\ndevice = \"\"\ncases = [\"graft --help\"]\nmeasure = \"ms\"\nat_most = 20\n";
    std::fs::write(here.join("benches/targets.toml"), target).unwrap();
    let rows = here.join("benches/results/some-processor/start.jsonl").display().to_string();
    succeed(&here, &["bench", "start", "--samples", "2", "--rows", &rows]);
    refuse(&here, &["bench", "results", "--check"], 1, &["README.md", "graft bench results"]);
    let text = succeed(&here, &["bench", "results"]).text();
    assert!(text.contains("wrote ./README.md") && text.contains("wrote ./docs/results.md"), "{text}");
    succeed(&here, &["bench", "results", "--check"]);
    let table = std::fs::read_to_string(here.join("docs/results.md")).unwrap();
    assert!(table.contains("| start | help |") && table.contains("| ≤ 20 | ms |"), "{table}");
    std::fs::write(&rows, "{}\nno row\n").unwrap();
    refuse(&here, &["bench", "results"], 1, &["start.jsonl line 2"]);
}
