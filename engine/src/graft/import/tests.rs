//! Configurations of every kind, as the released code has them, and the mistakes that they contain.

use super::*;
use crate::graft::settings::Start;
use crate::io::files::test_dir;

const HYENA: &str = "d_model: 1152\nl_max: 1000000\norder: 2\ninner_factor: 1\nnum_heads: 1\nnum_blocks: 1\n\
                     short_filter_order: 3\n";

/// A folder as the authors' repository has it, with the operator files named.
fn repository(name: &str, operators: &[(&str, &str)]) -> std::path::PathBuf {
    let root = test_dir(name);
    for (path, text) in operators {
        let path = root.join("configs").join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    root.join("configs/sampling/mha_swaps")
}

fn operator(site: &str, name: &str, file: &str) -> String {
    format!("operator:\n  type: '{site}'\n  name: \"{name}\"\n  config_filepath: configs/{file}\n")
}

fn parsed(text: &str, folder: &Path) -> (Plan, Vec<String>) {
    let found = import("c.yaml", text, folder, Some(Path::new("base"))).unwrap();
    (Plan::parse("plan.toml", found.plan).unwrap(), found.warnings)
}

fn has(warnings: &[String], parts: &[&str]) {
    for part in parts {
        assert!(warnings.iter().any(|w| w.contains(part)), "{part} is not in {warnings:#?}");
    }
}

#[test]
fn a_configuration_for_sampling() {
    let folder = repository("import-sample", &[("sequence_mixers/hyena_x.yaml", HYENA)]);
    let text = operator("mha", "hyena_x", "sequence_mixers/hyena_x.yaml")
        + "sample_config:\n  init_type: graft\n  global_seed: 100\n  dit_model_name: DiT-XL/2\n  \
           grafted_dit_ckpt_path: ../m/model.pt\n  samples_save_dir: r\n  image_size: 256\n  graft_indexes:\n    - 1\n    \
           - 3\n  graft_weights:\n  colour: blue\n";
    let (plan, warnings) = parsed(&text, &folder);
    let sites = plan.resolve(&DitConfig::named("DiT-XL/2").unwrap()).unwrap();
    let names: Vec<String> = sites.iter().map(|a| format!("{a} {}", a.spec)).collect();
    assert_eq!(
        names,
        ["blocks.1.attn hyena_x(direction=causal, taps=3)", "blocks.3.attn hyena_x(direction=causal, taps=3)"]
    );
    assert_eq!((plan.base.as_path(), plan.eval.seed, sites[0].start), (Path::new("base"), 100, Start::Random));
    has(&warnings, &["c.yaml:9:26: the grafted checkpoint is no part", "c.yaml:16:3: unknown key colour is left out"]);
    assert_eq!(warnings.len(), 3, "{warnings:#?}");
}

const STAGE2: &str = "train:\n  tar_dir: /data\n  num_workers: 8\n  num_samples: 128000\n  batch_size: 32\n  shuffle: \
                      True\ntrain_config:\n  initial_learning_rate: 1e-4\n  wd: 0\n  epochs: 100\n  global_seed: 5\n  \
                      dit_model_name: DiT-XL/2\n  dit_ckpt_path: None\n  image_size: 256\n  graft_indexes: [6, 16, 27]\n";

#[test]
fn stage_two_with_weights_that_contradict_themselves() {
    let folder = repository("import-stage2", &[("sequence_mixers/hyena_x.yaml", HYENA)]);
    let head = operator("mha", "hyena_x", "sequence_mixers/hyena_x.yaml") + STAGE2;
    let list = "  graft_weights:\n    - 6: \"./s/block_6/best.pt\"\n    - 16: \"./s/block_16/best.pt\"\n    \
                - 27: \"./s/block_27/best.pt\"\n";
    let (plan, warnings) = parsed(&(head.clone() + list), &folder);
    let f = &plan.finetune;
    assert_eq!((f.steps, f.batch, f.seed, f.optimizer.lr), (50_000, 256, 5, 1e-4));
    has(&warnings, &["graft_weights is a list of one-key maps", "batch_size times num_workers"]);
    assert!(!warnings.iter().any(|w| w.contains("weights of block")), "{warnings:#?}");
    let map = "  graft_weights:\n    6: ./s/block_0/l1/seed=0/best.pt\n    16: ./s/block_16/best.pt\n    9: ./s/block_9/b.pt\n";
    let (_, warnings) = parsed(&(head + map), &folder);
    has(
        &warnings,
        &[
            "c.yaml:21:8: layer 6 is given the weights of block 0",
            "c.yaml:23:5: graft_weights names layer 9, which graft_indexes does not",
            "graft_indexes names layer 27, for which graft_weights has nothing",
        ],
    );
    assert!(!warnings.iter().any(|w| w.contains("one-key maps")));
}

#[test]
fn stage_one_of_a_perceptron_with_a_missing_operator_file() {
    let folder = repository("import-stage1", &[]);
    let text = "operator:\n  name: \"mlp\"\n  config_filepath: configs/operators/mha/mha_timm.yaml\ntrain_config:\n  \
                initial_learning_rate: 1e-3\n  min_learning_rate: 1e-6\n  wd: 1e-5\n  epochs: 200\n  global_seed: 0\n  \
                clip_norm_val: 10.0\ntrain:\n  tar_dir: /d\n  num_workers: 8\n  num_samples: 8000\n  batch_size: 8\n  \
                return_tuple_keys:\n  - __key__\n  sha_key: None\nval:\n  batch_size: 64\n";
    let (plan, warnings) = parsed(text, &folder);
    let d = &plan.distill;
    assert_eq!(
        (d.steps, d.batch, d.optimizer.lr, d.optimizer.weight_decay, d.optimizer.clip),
        (25_000, 64, 1e-3, 1e-5, 10.0)
    );
    let sites = plan.resolve(&DitConfig::named("DiT-XL/2").unwrap()).unwrap();
    assert_eq!((sites.len(), sites[0].to_string()), (28, "blocks.0.mlp".to_string()));
    has(
        &warnings,
        &[
            "c.yaml:3:20: there is no operator file configs/operators/mha/mha_timm.yaml",
            "c.yaml:3:20: the file is for operators of the other site",
            "names no layers",
            "halves the rate",
        ],
    );
}

#[test]
fn operator_files_are_read_key_by_key() {
    let mlp = "d_model: 768\nexpansion_ratio: 3\ndropout: 0.1\nwings: 2\n";
    let folder = repository("import-mlp", &[("channel_mixers/mlp_ratio_3.yaml", mlp)]);
    let text = operator("mha", "mlp", "channel_mixers/mlp_ratio_3.yaml")
        + "sample_config:\n  dit_model_name: DiT-XL/2\n  graft_indexes: [0]\n";
    let (plan, warnings) = parsed(&text, &folder);
    let sites = plan.resolve(&DitConfig::named("DiT-XL/2").unwrap()).unwrap();
    assert_eq!(sites[0].spec.to_string(), "mlp(ratio=3)");
    has(
        &warnings,
        &[
            "mlp_ratio_3.yaml:1:10: d_model is not the model's width of 1152",
            "mlp_ratio_3.yaml:3:10: dropout is left out",
            "mlp_ratio_3.yaml:4:1: unknown key wings",
            "c.yaml:2:9: type does not fit operator mlp, which replaces mlp",
        ],
    );
    let mha = "dim: 1152\nqkv_bias: True\nnum_heads: 16\n";
    let folder = repository("import-mha", &[("sequence_mixers/mha_timm.yaml", mha)]);
    let text = operator("mha", "mha", "sequence_mixers/mha_timm.yaml") + "sample_config:\n  graft_indexes: [0, 0]\n";
    let (plan, warnings) = parsed(&text, &folder);
    assert_eq!(plan.resolve(&DitConfig::named("DiT-XL/2").unwrap()).unwrap()[0].spec.to_string(), "mha(heads=16)");
    has(&warnings, &["layer 0 stands twice"]);
}

#[test]
fn windowed_attention_goes_by_either_name() {
    let swa = "embed_dim: 1152\nnum_heads: 16\nnum_heads_kv: null\nqkv_proj_bias: True\ncausal: False\nwindow_size:\n  \
               - 4\n  - 4\nuse_flash_attn: True\n";
    let folder = repository("import-swa", &[("sequence_mixers/swa.yaml", swa)]);
    for name in ["mha", "swa"] {
        let text = operator("mha", name, "sequence_mixers/swa.yaml") + "sample_config:\n  graft_indexes: [1]\n";
        let found = import("c.yaml", &text, &folder, None).unwrap();
        assert!(found.plan.contains("operator = { kind = \"swa\", window = 4 }"), "{}", found.plan);
    }
}

#[test]
fn every_published_operator_is_known() {
    let files = [
        ("mha", "hyena_se", HYENA, "{ kind = \"hyena_se\", taps = 3 }"),
        ("mha", "hyena_y", HYENA, "{ kind = \"hyena_y\", taps = 3 }"),
        (
            "mha",
            "mamba2",
            "d_model: 1152\nd_state: 32\nd_conv: 3\nexpand: 2\nheaddim: 48\n",
            "{ kind = \"mamba2\", state = 32, taps = 3, expand = 2, head_width = 48 }",
        ),
        (
            "mlp",
            "mlp_hyena_x",
            "d_model: 1152\nl_max: 256\nexpansion_ratio: 2\norder: 2\nfused_bias_fc: True\nshort_filter_order: 4\n",
            "{ kind = \"mlp_hyena_x\", ratio = 2, taps = 4 }",
        ),
    ];
    for (site, name, text, want) in files {
        let file = format!("mixers/{name}.yaml");
        let folder = repository(&format!("import-{name}"), &[(&file, text)]);
        let text = operator(site, name, &file) + "sample_config:\n  graft_indexes: [1]\n";
        let found = import("c.yaml", &text, &folder, Some(Path::new("base"))).unwrap();
        assert!(found.plan.contains(&format!("operator = {want}\n")), "{}", found.plan);
        // Nothing to say but that the data must be named.
        assert_eq!(found.warnings.len(), 1, "{:#?}", found.warnings);
    }
}

#[test]
fn what_is_no_configuration_is_refused_with_its_place() {
    let folder = repository("import-bad", &[("sequence_mixers/hyena_x.yaml", HYENA)]);
    let good = operator("mha", "hyena_x", "sequence_mixers/hyena_x.yaml");
    let rows = [
        ("a: 1\n".to_string(), "c.yaml:1:1: train_config is missing"),
        (good.clone() + "sample_config: 3\n", "c.yaml:5:16: sample_config is not a map"),
        (
            good.replace("hyena_x\"", "hyena_q\"") + "sample_config:\n  graft_indexes: [1]\n",
            "c.yaml:3:9: this version has no such operator; is \"hyena_q\"",
        ),
        (
            good.clone() + "sample_config:\n  graft_indexes: [one]\n",
            "c.yaml:6:19: a layer that is not a whole number; is \"one\"",
        ),
        (good.clone() + "sample_config:\n  graft_indexes: [28]\n", "layer out of range; is 28"),
        (good.clone() + "sample_config:\n  dit_model_name: DiT-Q/2\n", "c.yaml:6:19: model: unknown size"),
        (
            good + "sample_config:\n  graft_indexes: [1]\n  global_seed: x\n",
            "c.yaml:7:16: global_seed is not a whole number",
        ),
    ];
    for (text, want) in rows {
        let message = import("c.yaml", &text, &folder, None).unwrap_err().to_string();
        assert!(message.contains(want), "{message}\nwithout {want}");
    }
}
