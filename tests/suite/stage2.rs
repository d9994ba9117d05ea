//! Stage 2 by adapters and with distillation terms, on the model of the grafting suite.

use super::graft::{HYENA, WEIGHTS, base, bytes, copy_tree, data, folder, go_on, plan, run_all};
use graft_engine::autograd::{Graph, Precision, Var};
use graft_engine::graft::run::{self, Event, RunFolder};
use graft_engine::io::safetensors::TensorFile;
use graft_engine::io::{json, jsonl};
use graft_engine::models::dit::{self, Run};
use graft_engine::tensor::{Device, Tensor};
use graft_kernels::rng::Philox;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

const LORA: &str = "steps = 10\ncheckpoint_every = 4\noptimizer = { lr = 3e-3, warmup = 2, ema = 0.9 }\nmethod = \"lora\"\n\
                    lora = { rank = 3, alpha = 4.5, modules = [\"qkv\", \"attn.proj\", \"fc1\", \"blocks.0.mlp.fc2\"]";

fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let file = TensorFile::open(path).unwrap();
    file.iter().map(|t| (t.name.to_string(), (t.shape.to_vec(), t.to_f32().unwrap()))).collect()
}

#[test]
fn adapters_and_grafts_train_alone_and_the_merged_model_is_what_the_adapter_file_says() {
    let dir = folder("lora");
    let text = plan(&base(&dir), HYENA, "steps = 5", &format!("{LORA}, keep_adapters = true }}\n"));
    let run_dir = dir.join("run");
    run_all(&text, &run_dir, &mut go_on).unwrap().unwrap();
    // Only what trains is in the checkpoint, with its moments and its average.
    let checkpoint = tensors(&run_dir.join("finetune/checkpoint.safetensors"));
    let trained = |kind: &str| {
        let names = checkpoint.keys().filter_map(|name| name.strip_prefix(kind)).map(str::to_string);
        names.collect::<Vec<_>>()
    };
    let [params, m, v, ema] = ["param.", "m.", "v.", "ema."].map(trained);
    assert!(params == m && params == v && params == ema && !params.is_empty());
    for name in &params {
        let graft = name.starts_with("blocks.1.attn.") || name.starts_with("blocks.3.attn.");
        assert!(graft != (name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight")), "{name}");
    }
    // Two attentions with qkv and proj, four fc1, one fc2.
    assert_eq!(params.iter().filter(|name| name.ends_with("lora_A.weight")).count(), 2 * 2 + 4 + 1);
    // Stage 1 plus the adapter file is stage 2.
    let (before, after) =
        (tensors(&run_dir.join("stage1").join(WEIGHTS)), tensors(&run_dir.join("stage2").join(WEIGHTS)));
    let adapter = tensors(&run_dir.join("stage2-adapter/adapter_model.safetensors"));
    let config = json::read(&run_dir.join("stage2-adapter/adapter_config.json")).unwrap();
    assert_eq!(
        (config["r"].as_u64(), config["lora_alpha"].as_f64(), config["peft_type"].as_str()),
        (Some(3), Some(4.5), Some("LORA"))
    );
    assert_eq!(
        config["modules_to_save"],
        serde_json::json!(["transformer_blocks.1.attn1", "transformer_blocks.3.attn1"])
    );
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    let (mut adapted, mut whole, mut kept) = (0, 0, 0);
    for (name, (shape, new)) in &after {
        let old = &before[name].1;
        let part = |matrix: &str| {
            let module = name.strip_suffix(".weight")?;
            adapter.get(&format!("base_model.model.{module}.lora_{matrix}.weight"))
        };
        if let (Some((_, a)), Some((_, b))) = (part("A"), part("B")) {
            let inputs = shape[1];
            for (i, (new, old)) in new.iter().zip(old).enumerate() {
                let low: f32 = (0..3).map(|r| b[i / inputs * 3 + r] * a[r * inputs + i % inputs]).sum();
                assert!((new - (old + 1.5 * low)).abs() < 1e-6, "{name}");
            }
            assert_ne!(new, old, "{name}");
            adapted += 1;
        } else if let Some((_, values)) = adapter.get(&format!("base_model.model.{name}")) {
            assert!(new == values && new != old, "{name}");
            whole += 1;
        } else {
            assert_eq!(new, old, "{name}");
            kept += 1;
        }
    }
    // q, k and v apart; a Hyena operator has six tensors.
    assert_eq!((adapted, whole), (2 * 4 + 4 + 1, 2 * 6));
    assert!(kept > 30);
}

#[test]
fn adapters_alone_leave_the_grafts_and_a_module_that_fits_nothing_is_refused() {
    let dir = folder("lora-frozen");
    let base = base(&dir);
    let run_dir = dir.join("run");
    let lora = |modules: &str| {
        format!(
            "steps = 2\noptimizer = {{ lr = 1e-2, warmup = 0 }}\nmethod = \"lora\"\nlora = {{ rank = 2, train_grafts = false{modules} }}\n"
        )
    };
    let text = plan(&base, HYENA, "steps = 2", &lora(""));
    run_all(&text, &run_dir, &mut go_on).unwrap().unwrap();
    let names = tensors(&run_dir.join("finetune/checkpoint.safetensors"));
    assert!(names.contains_key("param.blocks.1.attn.in_proj.lora_B.weight"));
    assert!(names.keys().all(|name| name.contains(".lora_")));
    assert!(!run_dir.join("stage2-adapter").exists());
    let wrong = plan(&base, HYENA, "steps = 2", &lora(", modules = [\"qkv\", \"to_q\"]"));
    let error = run_all(&wrong, &dir.join("wrong"), &mut go_on).map(|_| ()).unwrap_err().to_string();
    assert!(
        error.contains("finetune: lora: modules") && error.contains("\"to_q\"") && error.contains("attn.qkv"),
        "{error}"
    );
}

#[test]
fn a_stopped_or_killed_stage_2_with_adapters_and_terms_ends_in_the_same_bytes() {
    let dir = folder("lora-resume");
    let terms = format!("{LORA} }}\noutput_distill = 0.5\nfeature_distill = 0.25\n");
    let text = plan(&base(&dir), HYENA, "steps = 3", &terms);
    let whole = dir.join("whole");
    run_all(&text, &whole, &mut |e| {
        if matches!(e, Event::Finetune(p) if p.step == 7) {
            copy_tree(&whole, &dir.join("killed"));
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    let mut calls = 0;
    loop {
        let mut left = 3;
        let summary = run_all(&text, &dir.join("stopped"), &mut |_| {
            left -= 1;
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        calls += 1;
        if summary.unwrap().is_some() {
            break;
        }
    }
    assert!(calls > 3);
    run_all(&text, &dir.join("killed"), &mut go_on).unwrap().unwrap();
    let losses = |name: &str| {
        let lines = jsonl::read(&dir.join(name).join("finetune/loss.jsonl")).unwrap();
        let part = |key: &str| lines.iter().map(|l| l[key].as_f64().unwrap()).collect::<Vec<_>>();
        ["loss", "diffusion", "output_distill", "feature_distill"].map(part)
    };
    let [loss, diffusion, output, feature] = losses("whole");
    for i in 0..loss.len() {
        let sum = diffusion[i] + 0.5 * output[i] + 0.25 * feature[i];
        assert!((loss[i] - sum).abs() < 1e-5 * sum && output[i] > 0.0 && feature[i] > 0.0);
    }
    for other in ["stopped", "killed"] {
        assert!(bytes(&whole, "stage2") == bytes(&dir.join(other), "stage2"), "{other}");
        assert_eq!(losses("whole"), losses(other), "{other}");
    }
    assert!(bytes(&whole, "stage1") != bytes(&whole, "stage2"));
}

/// Mean squared distance of two models' predictions on fixed noise.
fn gap(a: &Path, b: &Path) -> f64 {
    let device = Device::cpu();
    let mut noise = vec![0.0; 16 * 64];
    Philox::new(77, 0).fill_normal(&mut noise);
    let x = Tensor::from_f32(&device, &[16, 1, 8, 8], &noise).unwrap();
    let t = Tensor::from_f32(&device, &[16], &(0..16).map(|i| 60.0 * i as f32).collect::<Vec<_>>()).unwrap();
    let y = Tensor::from_i32(&device, &[16], &(0..16).map(|i| i % 3).collect::<Vec<_>>()).unwrap();
    let [a, b] = [a, b].map(|path| {
        let model = dit::load(path, &device).unwrap();
        let g = Graph::inference(Precision::F32);
        model.forward(&g, &Var::constant(x.clone()), &t, &y, Run::default()).unwrap().tensor().to_vec().unwrap()
    });
    a.iter().zip(&b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / a.len() as f64
}

#[test]
fn output_distillation_lowers_the_gap_to_the_base_model() {
    let dir = folder("teacher");
    let base = base(&dir);
    let train = |name: &str, terms: &str| {
        let settings = format!("steps = 60\noptimizer = {{ lr = 3e-3, warmup = 5, ema = 0.9 }}\n{terms}");
        let text = plan(&base, HYENA, "steps = 5", &settings);
        run_all(&text, &dir.join(name), &mut go_on).unwrap().unwrap();
        gap(&base, &dir.join(name).join("stage2"))
    };
    // The diffusion loss pulls away from an untrained base; the larger the weight of the term, the less.
    let gaps = ["", "output_distill = 2.0\n", "output_distill = 20.0\n"]
        .map(|terms| train(&format!("run{}", terms.len()), terms));
    assert!(gaps[1] < 0.5 * gaps[0] && gaps[2] < 0.5 * gaps[1], "{gaps:?}");
}

#[test]
fn a_checkpoint_belongs_to_its_teacher() {
    let dir = folder("other-teacher");
    let base = base(&dir);
    let text = plan(&base, HYENA, "steps = 2", "steps = 4\ncheckpoint_every = 2\noutput_distill = 1.0\n");
    let run_dir = dir.join("run");
    run_all(&text, &run_dir, &mut |e| {
        if matches!(e, Event::Finetune(p) if p.step == 2) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .unwrap();
    // Another model where the base was.
    let other = dit::load(&run_dir.join("stage1"), &Device::cpu()).unwrap();
    let plain = dit::load(&base, &Device::cpu()).unwrap();
    let mut changed = plain;
    let id = changed.params.find("final_layer.linear.bias").unwrap();
    let value = other.params.get(other.params.find("pos_embed").unwrap()).value.to_vec().unwrap();
    let shape = changed.params.get(id).value.shape();
    changed.params.set(id, Tensor::from_f32(&Device::cpu(), shape.dims(), &value[..shape.len()]).unwrap()).unwrap();
    dit::save(&changed, &base, dit::SaveAs::F32, &BTreeMap::new()).unwrap();
    let folder = RunFolder::open(&run_dir).unwrap();
    let error = run::finetune(&folder, &data(), &Device::cpu(), &mut go_on).unwrap_err().to_string();
    assert!(error.contains("checkpoint of another run"), "{error}");
}
