//! `graft plan`, `locality`, and the predictions of `inspect`.

use crate::support::{entries, folder, model, refuse, run, succeed};
use serde_json::Value;
use std::path::Path;

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// A plan on the small model that grafts the layers given.
fn plan(here: &Path, layers: &str, more: &str) {
    let text = format!(
        "[base]\nmodel = \"model\"\n[[graft]]\nsite = \"attn\"\nlayers = {layers}\noperator = {{ kind = \"hyena_x\" }}\n\
         {more}[data]\nkind = \"mnist\"\ndir = \"none\"\n[select]\nsamples = 2\nsteps = 2\n"
    );
    std::fs::write(here.join("plan.toml"), text).unwrap();
}

#[test]
fn check_explains_the_model_that_results() {
    let here = folder("plan-check");
    model(&here, 1);
    plan(&here, "[1]", "");
    let text = succeed(&here, &["plan", "check", "plan.toml"]).text();
    for word in [
        "1 of 4 sites change",
        "hyena_x(direction=causal, taps=4) (grafted)",
        "mha(heads=4)",
        "tokens",
        "predicted, not measured",
    ] {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
    for gpu in ["h100: forward pass", "a100: forward pass", "h200: forward pass"] {
        assert!(text.contains(gpu), "{gpu} is not in\n{text}");
    }
    let json = parsed(&succeed(&here, &["plan", "check", "plan.toml", "--json", "--gpu", "a100"]).text());
    assert_eq!((&json["grafted"][0], &json["tokens"]), (&"blocks.1.attn".into(), &16.into()));
    // Half of the attention goes from 4·N²·D + 2·H·N² to 2·N·D, with N = 16, D = 32 and H = 4.
    let change = 100.0 * (1024.0 - 34_816.0) / (2.0 * 34_816.0);
    let found = json["change_percent"]["attn"]["flops_operator"].as_f64().unwrap();
    assert!((found - change).abs() < 1e-9, "{found} against {change}");
    let predicted = json["predicted"]["after"].as_array().unwrap();
    assert_eq!(
        (predicted.len(), &predicted[0]["gpu"], &json["predicted"]["measured"]),
        (1, &"a100".into(), &false.into())
    );
    assert_eq!(json["kinds"].as_array().unwrap().len(), 3);
    refuse(&here, &["plan", "check", "plan.toml", "--gpu", "b200"], 2, &["--gpu", "h100, a100, h200"]);
    plan(&here, "[2]", "");
    refuse(&here, &["plan", "check", "plan.toml"], 2, &["plan.toml:5:11", "layer out of range; is 2"]);
}

#[test]
fn check_measures_layers_that_the_base_decides() {
    let here = folder("plan-measure");
    model(&here, 1);
    plan(&here, "\"low-local:1\"", "");
    let first = succeed(&here, &["plan", "check", "plan.toml", "--json"]).text();
    let chosen = parsed(&first)["chosen"].clone();
    assert_eq!((&chosen[0][0], &chosen[0][1]), (&"attn".into(), &"low-local:1".into()));
    assert_eq!(chosen[0][2].as_array().unwrap().len(), 1);
    // The measurement stays beside the model, which can still be read.
    assert!(entries(&here.join("model")).contains(&"locality.json".to_string()));
    assert_eq!(first, succeed(&here, &["plan", "check", "plan.toml", "--json"]).text());
    let text = succeed(&here, &["plan", "check", "plan.toml"]).text();
    assert!(text.contains("attn, low-local:1: layers "), "{text}");
    plan(&here, "\"top-local:3\"", "");
    refuse(&here, &["plan", "check", "plan.toml"], 2, &["plan.toml:5:10", "more layers than there are", "at most 2"]);
    plan(&here, "\"auto:0.5\"", "");
    refuse(&here, &["plan", "check", "plan.toml"], 2, &["plan.toml:5:10", "short stage 1", "--run DIR"]);
}

#[test]
fn show_fills_in_every_default() {
    let here = folder("plan-show");
    plan(&here, "\"every-other\"", "loss = \"huber\"\n");
    let shown = succeed(&here, &["plan", "show", "plan.toml"]).text();
    for part in ["taps = 4", "start = \"random\"", "loss = \"huber\"", "[finetune.optimizer]", "held_out = 8"] {
        assert!(shown.contains(part), "{part} is not in\n{shown}");
    }
    std::fs::write(here.join("again.toml"), &shown).unwrap();
    assert_eq!(succeed(&here, &["plan", "show", "again.toml"]).text(), shown);
    let json = parsed(&succeed(&here, &["plan", "show", "plan.toml", "--json"]).text());
    assert_eq!((&json["graft"][0]["loss"], &json["distill"]["batch"]), (&"huber".into(), &64.into()));
}

#[test]
fn import_writes_a_plan_and_warns() {
    let here = folder("plan-import");
    let config = "operator:\n  type: mha\n  name: hyena_x\n  config_filepath: configs/hyena_x.yaml\nsample_config:\n  \
                  dit_model_name: DiT-XL/2\n  graft_indexes: [1, 3]\n  graft_weights:\n    - 1: a/block_1/b.pt\n    \
                  - 3: a/block_0/b.pt\n";
    std::fs::create_dir_all(here.join("configs")).unwrap();
    std::fs::write(here.join("configs/hyena_x.yaml"), "d_model: 1152\nshort_filter_order: 4\n").unwrap();
    std::fs::write(here.join("c.yaml"), config).unwrap();
    let ran = run(&here, &["plan", "import", "c.yaml", "-o", "plan.toml", "--base", "model"]);
    assert_eq!((ran.code, ran.text().trim()), (0, "plan.toml"), "{}", ran.stderr);
    for part in
        ["warning: c.yaml:9:5: graft_weights is a list", "c.yaml:10:10: layer 3 is given the weights of block 0"]
    {
        assert!(ran.stderr.contains(part), "{part} is not in\n{}", ran.stderr);
    }
    let shown = succeed(&here, &["plan", "show", "plan.toml"]).text();
    assert!(shown.contains("layers = [1, 3]") && shown.contains("model = \"model\""), "{shown}");
    let json = parsed(&succeed(&here, &["plan", "import", "c.yaml", "--json"]).text());
    assert!(json["warnings"].as_array().unwrap().len() >= 4 && json["plan"].as_str().unwrap().contains("hyena_x"));
    std::fs::write(here.join("bad.yaml"), "a: [1\n").unwrap();
    refuse(&here, &["plan", "import", "bad.yaml"], 2, &["bad.yaml:", "not a YAML configuration"]);
    refuse(&here, &["plan", "import", "none.yaml"], 1, &["none.yaml"]);
}

#[test]
fn locality_as_table_json_and_picture() {
    let here = folder("locality");
    model(&here, 1);
    let small = ["locality", "model", "--samples", "3", "--steps", "2"];
    let with = |more: &[&str]| succeed(&here, &[&small[..], more].concat()).text();
    let table = with(&["-o", "heat.png"]);
    assert!(
        table.contains("attention within k tokens, of 16; 3 images, 2 DDIM steps, guidance 1.5, seed 0"),
        "{table}"
    );
    let head: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(head, ["layer", "k=1", "k=2", "k=4", "k=8"]);
    assert_eq!(table.lines().count(), 4);
    let inspected = parsed(&succeed(&here, &["inspect", "heat.png", "--json"]).text());
    assert_eq!(inspected["metadata"]["graft"]["tokens"], 16);
    let json = parsed(&with(&["--json", "-k", "0,3,15"]));
    let band = |k: usize, layer: usize| json["bands"][k]["layers"][layer].as_f64().unwrap();
    for layer in 0..2 {
        assert!(band(0, layer) > 0.0 && band(0, layer) < band(1, layer) && band(1, layer) < band(2, layer));
        assert!((band(2, layer) - 1.0).abs() < 1e-6);
    }
    // The same numbers whatever the threads.
    std::fs::remove_file(here.join("model/locality.json")).unwrap();
    assert_eq!(json, parsed(&with(&["--json", "-k", "0,3,15", "--threads", "1"])));
    assert_ne!(json["bands"], parsed(&with(&["--json", "-k", "0,3,15", "--classes", "bag"]))["bands"]);
    refuse(&here, &["locality", "model", "--samples", "0"], 2, &["--samples"]);
    refuse(&here, &["locality", "model", "--classes", "hat"], 2, &["unknown class"]);
    refuse(&here, &["locality", "none"], 1, &["none"]);
}

#[test]
fn inspect_predicts_the_time_of_every_layer() {
    let here = folder("inspect-gpu");
    model(&here, 1);
    let text = succeed(&here, &["inspect", "model", "--gpu", "h200", "--batch", "8"]).text();
    assert!(text.contains("h200*") && text.contains("predicted, not measured: batch of 8"), "{text}");
    let json = parsed(&succeed(&here, &["inspect", "model", "--json", "--gpu", "h200"]).text());
    assert!(json["sites"][0]["predicted_seconds"]["h200"].as_f64().unwrap() > 0.0);
    assert!(json["predicted"][0]["attn"].as_array().unwrap().len() == 2 && json["flops"].as_f64().unwrap() > 0.0);
    refuse(&here, &["inspect", "model", "--gpu", "tpu"], 2, &["--gpu", "unknown GPU"]);
}
