//! What plans can say beyond lists of layers, and the ablation of the stages, on a model small enough for every run.

use crate::graft::{HYENA, WEIGHTS, base, bytes, data, folder, go_on, plan, run_all};
use graft_engine::graft::ablate;
use graft_engine::graft::assemble::LAYERS_KEY;
use graft_engine::graft::choose;
use graft_engine::graft::run::Event;
use graft_engine::io::safetensors::TensorFile;
use graft_engine::models::dit;
use graft_engine::tensor::Device;
use std::ops::ControlFlow;

#[test]
fn a_self_graft_that_starts_from_the_teacher_is_the_teacher() {
    let dir = folder("teacher");
    let base = base(&dir);
    let grafts = "[[graft]]\nsite = \"attn\"\nlayers = \"all\"\noperator = { kind = \"mha\" }\nstart = \"teacher\"\n\
                  [[graft]]\nsite = \"mlp\"\nlayers = [2]\noperator = { kind = \"mlp\" }\nstart = \"teacher\"\n";
    let summary = run_all(&plan(&base, grafts, "steps = 1", "steps = 1"), &dir.join("run"), &mut go_on);
    for site in summary.unwrap().unwrap().sites {
        // The teacher's pass may sum in another order than the operator alone.
        assert!(site.residual_initial.unwrap().relative < 1e-5, "{site:?}");
    }
    let values = |folder: &std::path::Path| {
        let model = dit::load(folder, &Device::cpu()).unwrap();
        model.params.iter().map(|(_, p)| p.value.to_vec().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(values(&base), values(&dir.join("run/random")));
    // Hyena-X takes the projections over and is nearer to the teacher than from random values.
    let start = |start: &str| {
        let grafts = format!("{HYENA}start = \"{start}\"\n");
        let text = plan(&base, &grafts, "steps = 1", "steps = 1");
        let summary = run_all(&text, &dir.join(start), &mut go_on).unwrap().unwrap();
        summary.sites.iter().map(|s| s.residual_initial.unwrap().relative).collect::<Vec<_>>()
    };
    assert_ne!(start("teacher"), start("random"));
}

#[test]
fn layers_that_the_base_decides_are_kept_in_the_run_and_in_its_models() {
    let dir = folder("decided");
    let grafts = HYENA.replace("every-other", "top-local:2") + "[select]\nsamples = 2\nsteps = 2\n";
    let text = plan(&base(&dir), &grafts, "steps = 2", "steps = 1");
    let run = dir.join("run");
    let summary = run_all(&text, &run, &mut go_on).unwrap().unwrap();
    let kept: serde_json::Value = serde_json::from_slice(&std::fs::read(run.join(choose::FILE)).unwrap()).unwrap();
    let layers: Vec<u64> =
        kept["choices"][0]["layers"].as_array().unwrap().iter().map(|l| l.as_u64().unwrap()).collect();
    assert_eq!(layers.len(), 2);
    let sites: Vec<String> = summary.sites.iter().map(|s| s.site.clone()).collect();
    assert_eq!(sites, layers.iter().map(|l| format!("blocks.{l}.attn")).collect::<Vec<_>>());
    for stage in ["random", "stage1", "stage2"] {
        let file = TensorFile::open(&run.join(stage).join(WEIGHTS)).unwrap();
        let listed: serde_json::Value = serde_json::from_str(&file.metadata()[LAYERS_KEY]).unwrap();
        assert_eq!(listed, serde_json::json!([["attn", "top-local:2", layers]]));
        let config = dit::describe(&run.join(stage)).unwrap();
        let grafted: Vec<u64> = (0..4).filter(|l| config.blocks[*l as usize].attn.kind == "hyena_x").collect();
        assert_eq!(grafted, layers);
    }
    // Again from nothing: the same layers, the same bytes.
    run_all(&text, &dir.join("again"), &mut go_on).unwrap().unwrap();
    assert!(bytes(&run, "stage2") == bytes(&dir.join("again"), "stage2"));
}

#[test]
fn an_ablation_has_every_row_and_resumes() {
    let dir = folder("ablate");
    let text = plan(&base(&dir), HYENA, "steps = 4", "steps = 3");
    let (whole, parts) = (dir.join("whole"), dir.join("parts"));
    let device = Device::cpu();
    let found = ablate::ablate(&text, &whole, true, &data(), &device, &mut go_on).unwrap().unwrap();
    let rows: Vec<(bool, &str, Option<[u64; 2]>)> =
        found.rows.iter().map(|r| (r.control, r.evaluated.name.as_str(), r.updates)).collect();
    assert_eq!(
        rows,
        [
            (false, "original", None),
            (false, "random", Some([0, 0])),
            (false, "stage 1 only", Some([4, 0])),
            (false, "stage 2 only", Some([0, 3])),
            (false, "both stages", Some([4, 3])),
            (true, "random", Some([0, 0])),
            (true, "stage 1 only", Some([4, 0])),
            (true, "both stages", Some([4, 3])),
        ]
    );
    let residual = |i: usize| found.rows[i].residual.unwrap();
    assert!(residual(2) < residual(1) && residual(6) < residual(5), "{:?}", found.rows);
    let page = std::fs::read_to_string(whole.join(ablate::REPORT)).unwrap();
    assert!(page.contains("self-graft, both stages") && page.contains("stage 2 only"));
    let result: serde_json::Value =
        serde_json::from_slice(&std::fs::read(whole.join("ablation.json")).unwrap()).unwrap();
    assert_eq!((result["rows"].as_array().unwrap().len(), &result["rows"][3]["name"]), (8, &"stage 2 only".into()));
    let control = dit::describe(&whole.join("control/stage2")).unwrap();
    assert_eq!(control, dit::describe(&text.base).unwrap());
    // Stopped after every second update until it is done.
    let mut calls = 0;
    while {
        let mut left = 2;
        calls += 1;
        let found = ablate::ablate(&text, &parts, true, &data(), &device, &mut |e| {
            left -= i32::from(matches!(e, Event::Distill(_) | Event::Finetune(_)));
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        found.unwrap().is_none()
    } {}
    assert!(calls > 5, "{calls}");
    for model in ["graft/stage1", "graft/stage2", "direct/model", "control/stage2"] {
        assert!(bytes(&whole, model) == bytes(&parts, model), "{model}");
    }
    assert!(bytes(&whole, "direct/model") != bytes(&whole, "graft/stage2"));
}
