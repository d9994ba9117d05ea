//! Grafting from plan to finetuned model, on a model small enough for every test run.

use graft_engine::error::Result;
use graft_engine::graft::assemble::{PLAN_KEY, STAGE_KEY, Stage};
use graft_engine::graft::plan::Plan;
use graft_engine::graft::run::{self, Event, RunData, RunFolder};
use graft_engine::graft::summary::Summary;
use graft_engine::io::datasets::ImageSet;
use graft_engine::io::{jsonl, safetensors};
use graft_engine::models::dit::{self, Dit, DitConfig, SaveAs};
use graft_engine::tensor::Device;
use graft_kernels::rng::Philox;
use graft_tests::scratch::Scratch;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

pub const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

pub fn folder(name: &str) -> Scratch {
    Scratch::new(&format!("suite-{name}"))
}

/// A base with four blocks in which every branch matters: nothing is zero as in a fresh model.
pub fn base(dir: &Path) -> PathBuf {
    base_with(dir, 0.05)
}

/// As [`base`], with the standard deviation of what is added to every weight.
fn base_with(dir: &Path, deviation: f32) -> PathBuf {
    let sizes = DitConfig { patch: 2, input_size: 8, in_channels: 1, classes: 3, ..DitConfig::plain(4, 16, 2) };
    let mut model = Dit::new(sizes, &Device::cpu(), 1).unwrap();
    let ids: Vec<_> = model.params.iter().filter(|(_, p)| p.trainable).map(|(id, _)| id).collect();
    for (i, id) in ids.into_iter().enumerate() {
        let mut value = model.params.get(id).value.copy().unwrap();
        let mut noise = vec![0.0; value.len()];
        Philox::new(2, i as u64).fill_normal(&mut noise);
        value.f32s_mut().unwrap().iter_mut().zip(&noise).for_each(|(v, n)| *v += deviation * n);
        model.params.set(id, value).unwrap();
    }
    let path = dir.join("base");
    dit::save(&model, &path, SaveAs::F32, &BTreeMap::new()).unwrap();
    path
}

/// Images whose brightness runs along rows or columns by class, with noise.
pub fn images(n: usize, seed: u64) -> ImageSet {
    let mut rng = Philox::new(seed, 0);
    let labels: Vec<u8> = (0..n).map(|i| (i % 3) as u8).collect();
    let pixel = |label: u8, x: usize, y: usize, noise: u32| match label {
        0 => 30 * x + noise as usize,
        1 => 30 * y + noise as usize,
        _ => 15 * (x + y) + noise as usize,
    };
    let pixels = labels.iter().flat_map(|&l| (0..64).map(move |i| (l, i % 8, i / 8)));
    let pixels = pixels.map(|(l, x, y)| pixel(l, x, y, rng.below(30)) as u8).collect();
    ImageSet { n, channels: 1, height: 8, width: 8, pixels, labels, class_names: vec!["row", "column", "both"] }
}

pub fn data() -> RunData {
    RunData { train: images(48, 1), held_out: images(24, 2) }
}

pub fn plan(base: &Path, grafts: &str, distill: &str, finetune: &str) -> Plan {
    let text = format!(
        "[base]\nmodel = {:?}\n[data]\nkind = \"mnist\"\ndir = \"none\"\n{grafts}\n\
         [distill]\nbatch = 8\nheld_out = 2\n{distill}\n[finetune]\nbatch = 8\n{finetune}\n\
         [eval]\nsteps = 2\nsampler = \"ddim\"\npicture_guidance = 1.0\n",
        base.display().to_string()
    );
    Plan::parse("plan.toml", text).unwrap()
}

pub const HYENA: &str = "[[graft]]\nsite = \"attn\"\nlayers = \"every-other\"\noperator = { kind = \"hyena_x\" }\n";

pub fn run_all(plan: &Plan, dir: &Path, report: &mut run::Report<'_>) -> Result<Option<Summary>> {
    run::run(&RunFolder::create(plan.clone(), dir)?, &data(), &Device::cpu(), report)
}

pub fn go_on(_: Event<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

pub fn bytes(dir: &Path, stage: &str) -> Vec<u8> {
    std::fs::read(dir.join(stage).join(WEIGHTS)).unwrap()
}

pub fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn mixed_operators_and_the_self_graft_control_come_nearer_to_the_teacher() {
    let dir = folder("falls");
    let grafts = "[[graft]]\nsite = \"attn\"\nlayers = [1]\noperator = { kind = \"mha\" }\n\
                  [[graft]]\nsite = \"attn\"\nlayers = [3]\noperator = { kind = \"hyena_x\", taps = 3 }\n\
                  [[graft]]\nsite = \"mlp\"\nlayers = [0]\noperator = { kind = \"mlp\", ratio = 2 }\n";
    let plan = plan(&base(&dir), grafts, "steps = 150\noptimizer = { lr = 1e-2 }", "steps = 2");
    let summary = run_all(&plan, &dir.join("run"), &mut go_on).unwrap().unwrap();
    assert_eq!(summary.sites.len(), 3);
    for site in &summary.sites {
        let (before, after) = (site.residual_initial.unwrap(), site.residual_distilled.unwrap());
        assert!(after.relative < 0.7 * before.relative && after.loss < 0.7 * before.loss, "{site:?}");
    }
    assert!(summary.distill.loss_last < 0.7 * summary.distill.loss_first, "{:?}", summary.distill);
    assert_eq!((summary.distill.steps, summary.finetune.unwrap().steps), (150, 2));
}

#[test]
fn finetuning_lowers_the_diffusion_loss_and_folders_describe_themselves() {
    let dir = folder("finetune");
    let base = base(&dir);
    let text = plan(
        &base,
        HYENA,
        "steps = 20\noptimizer = { lr = 1e-2 }",
        "steps = 60\noptimizer = { lr = 3e-3, warmup = 5, ema = 0.9 }",
    );
    let summary = run_all(&text, &dir.join("run"), &mut go_on).unwrap().unwrap();
    let finetune = summary.finetune.unwrap();
    assert!(finetune.loss_last < 0.9 * finetune.loss_first, "{finetune:?}");
    for stage in [Stage::Random, Stage::Distilled, Stage::Finetuned] {
        let name = if stage == Stage::Random {
            "random"
        } else if stage == Stage::Distilled {
            "stage1"
        } else {
            "stage2"
        };
        let folder = dir.join("run").join(name);
        let file = safetensors::TensorFile::open(&folder.join(WEIGHTS)).unwrap();
        assert_eq!(file.metadata()[STAGE_KEY], stage.name());
        let described = Plan::parse("metadata", file.metadata()[PLAN_KEY].clone()).unwrap();
        assert_eq!(described.identity(), text.identity());
        let config = dit::describe(&folder).unwrap();
        let kinds: Vec<&str> = config.blocks.iter().map(|b| b.attn.kind.as_str()).collect();
        assert_eq!(kinds, ["mha", "hyena_x", "mha", "hyena_x"]);
    }
    // Outside the grafted sites the distilled model is the base, to the bit.
    let device = Device::cpu();
    let (base, distilled) = (dit::load(&base, &device).unwrap(), dit::load(&dir.join("run/stage1"), &device).unwrap());
    let mut kept = 0;
    for (id, p) in
        base.params.iter().filter(|(_, p)| !p.name.starts_with("blocks.1.attn") && !p.name.starts_with("blocks.3.attn"))
    {
        let other = distilled.params.get(distilled.params.find(&p.name).unwrap());
        assert_eq!(base.params.get(id).value.to_vec().unwrap(), other.value.to_vec().unwrap(), "{}", p.name);
        kept += 1;
    }
    assert!(kept > 30);
}

#[test]
fn a_run_stopped_or_killed_anywhere_ends_in_the_same_bytes() {
    let dir = folder("resume");
    let text = plan(&base(&dir), HYENA, "steps = 11\ncheckpoint_every = 4", "steps = 10\ncheckpoint_every = 4");
    // The folder as a kill would leave it, taken while an unbroken run goes by: between two checkpoints of each stage.
    let whole = dir.join("whole");
    run_all(&text, &whole, &mut |e| {
        match e {
            Event::Distill(p) if p.step == 6 => copy_tree(&whole, &dir.join("killed1")),
            Event::Finetune(p) if p.step == 7 => copy_tree(&whole, &dir.join("killed2")),
            _ => {}
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    // Stopped by its user after every third update, until it is done.
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
    assert!(calls > 5);
    for broken in ["killed1", "killed2"] {
        let mut first = None;
        let summary = run_all(&text, &dir.join(broken), &mut |e| {
            first.get_or_insert(match e {
                Event::Distill(p) => ("distill", p.step),
                Event::Finetune(p) => ("finetune", p.step),
                _ => return ControlFlow::Continue(()),
            });
            ControlFlow::Continue(())
        });
        assert!(summary.unwrap().is_some());
        assert_eq!(first, Some((if broken == "killed1" { "distill" } else { "finetune" }, 5)));
    }
    for other in ["stopped", "killed1", "killed2"] {
        for stage in ["random", "stage1", "stage2"] {
            assert!(bytes(&whole, stage) == bytes(&dir.join(other), stage), "{other}/{stage} differs");
        }
        for log in ["distill/loss.jsonl", "distill/held_out.jsonl", "finetune/loss.jsonl"] {
            let losses = |dir: &Path| -> Vec<_> {
                let lines = jsonl::read(&dir.join(log)).unwrap();
                lines
                    .into_iter()
                    .map(|l| (l["step"].clone(), l["loss"].clone(), l["losses"].clone(), l["sites"].clone()))
                    .collect()
            };
            assert_eq!(losses(&whole), losses(&dir.join(other)), "{other}/{log}");
        }
    }
    assert!(bytes(&whole, "random") != bytes(&whole, "stage1") && bytes(&whole, "stage1") != bytes(&whole, "stage2"));
}

#[test]
fn a_site_becomes_the_same_whatever_else_is_grafted() {
    let dir = folder("independent");
    let base = base(&dir);
    let one = "[[graft]]\nsite = \"attn\"\nlayers = [3]\noperator = { kind = \"hyena_x\" }\n";
    let read = |grafts: &str, name: &str| {
        let text = plan(&base, grafts, "steps = 5", "steps = 1");
        run_all(&text, &dir.join(name), &mut go_on).unwrap();
        let model = dit::load(&dir.join(name).join("stage1"), &Device::cpu()).unwrap();
        let site = model.params.iter().filter(|(_, p)| p.name.starts_with("blocks.3.attn."));
        site.map(|(_, p)| p.value.to_vec().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(read(HYENA, "two"), read(one, "one"));
}

#[test]
fn what_cannot_be_run_is_refused_before_anything_changes() {
    let dir = folder("refused");
    let base = base(&dir);
    let run_dir = dir.join("run");
    let text = plan(&base, HYENA, "steps = 3", "steps = 2");
    let message = |result: Result<Option<Summary>>| result.map(|_| ()).unwrap_err().to_string();
    // Stage 2 before stage 1.
    let folder = RunFolder::create(text.clone(), &run_dir).unwrap();
    let early = run::finetune(&folder, &data(), &Device::cpu(), &mut go_on).unwrap_err().to_string();
    assert!(early.contains("stage 1 is not finished"), "{early}");
    // Two processes in one folder.
    assert!(message(run_all(&text, &run_dir, &mut go_on)).contains("run folder is in use"));
    drop(folder);
    run_all(&text, &run_dir, &mut go_on).unwrap().unwrap();
    let before = bytes(&run_dir, "stage2");
    // Another plan in the same folder.
    let other = plan(&base, HYENA, "steps = 4", "steps = 2");
    assert!(message(run_all(&other, &run_dir, &mut go_on)).contains("the run folder belongs to another plan"));
    // Images of another size.
    let wrong = RunData { train: images(48, 1), held_out: ImageSet { height: 4, width: 16, ..images(24, 2) } };
    let fresh = RunFolder::create(text.clone(), &dir.join("images")).unwrap();
    let refused = run::distill(&fresh, &wrong, &Device::cpu(), &mut go_on).unwrap_err().to_string();
    assert!(refused.contains("data: the images do not fit the model"), "{refused}");
    // A layer that the base lacks, and a folder without a plan.
    let deep = plan(&base, &HYENA.replace("\"every-other\"", "[1, 4]"), "steps = 3", "steps = 2");
    assert!(
        message(run_all(&deep, &dir.join("deep"), &mut go_on)).contains("layer out of range; is 4; must be 0 to 3")
    );
    // Another base at the same place, after stage 1 has begun; and a distilled model of another plan.
    let begun = dir.join("begun");
    run_all(&text, &begun, &mut |_| ControlFlow::Break(())).unwrap();
    let kept = dir.join("kept");
    std::fs::rename(&base, &kept).unwrap();
    base_with(&dir, 0.06);
    assert!(message(run_all(&text, &begun, &mut go_on)).contains("checkpoint of another run (another base)"));
    std::fs::remove_dir_all(&base).unwrap();
    std::fs::rename(&kept, &base).unwrap();
    let foreign = dir.join("foreign");
    run_all(&plan(&base, HYENA, "steps = 1", "steps = 2"), &foreign, &mut go_on).unwrap().unwrap();
    let mixed = dir.join("mixed");
    copy_tree(&foreign.join("stage1"), &mixed.join("stage1"));
    let folder = RunFolder::create(text.clone(), &mixed).unwrap();
    let other = run::finetune(&folder, &data(), &Device::cpu(), &mut go_on).unwrap_err().to_string();
    assert!(other.contains("the model comes from another plan; is other grafts or settings of stage 1"), "{other}");
    assert!(RunFolder::open(&dir.join("nothing")).map(|_| ()).unwrap_err().to_string().contains("not a run folder"));
    assert!(before == bytes(&run_dir, "stage2"));
}

#[test]
fn a_diverging_site_is_named_and_the_last_good_checkpoint_stays() {
    let dir = folder("diverge");
    let base = base(&dir);
    let text =
        plan(&base, HYENA, "steps = 400\ncheckpoint_every = 1\noptimizer = { lr = 1e30, clip = 1e30 }", "steps = 1");
    let error = run_all(&text, &dir.join("run"), &mut go_on).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("blocks.1.attn: step ") && error.contains("is not finite"), "{error}");
    let file = safetensors::TensorFile::open(&dir.join("run/distill/checkpoint.safetensors")).unwrap();
    assert!(file.iter().all(|t| t.to_f32().unwrap().iter().all(|v| v.is_finite())));
    assert!(!dir.join("run/stage1/config.json").exists());
}

const PAIRS: &str = "[[graft]]\nsite = \"block-pair\"\nlayers = \"all\"\n\
                     [[graft]]\nsite = \"attn\"\nlayers = [3]\noperator = { kind = \"hyena_x\" }\n";

#[test]
fn blocks_learn_to_run_in_parallel() {
    let dir = folder("pairs");
    // Branches so strong that running blocks side by side changes the result.
    let base = base_with(&dir, 0.2);
    let text = plan(
        &base,
        PAIRS,
        "steps = 80\ncheckpoint_every = 15\noptimizer = { lr = 2e-3, schedule = \"cosine\" }",
        "steps = 20\noptimizer = { lr = 1e-3, warmup = 2 }",
    );
    let mut killed = false;
    let whole = dir.join("whole");
    let summary = run_all(&text, &whole, &mut |e| {
        if let Event::Distill(p) = e
            && p.step == 22
        {
            copy_tree(&whole, &dir.join("killed"));
            killed = true;
        }
        ControlFlow::Continue(())
    });
    let summary = summary.unwrap().unwrap();
    let names: Vec<&str> = summary.sites.iter().map(|s| s.site.as_str()).collect();
    assert_eq!(names, ["pairs.0", "blocks.3.attn", "pairs.1"]);
    for site in summary.sites.iter().filter(|s| s.site.starts_with("pairs")) {
        let (before, after) = (site.residual_initial.unwrap(), site.residual_distilled.unwrap());
        assert!(after.loss < 0.9 * before.loss && after.relative < before.relative, "{site:?}");
    }
    // The operator inside a pair learns through the pair.
    assert!(summary.sites[1].residual_initial.is_none());
    assert_eq!((summary.cost_before.serial_depth, summary.cost_after.serial_depth), (4, 2));
    let merges = 2 * (2 * 16 * 16 + 16);
    let hyena = 3 * 16 * 5;
    assert_eq!(summary.cost_after.params, summary.cost_before.params + merges + hyena);
    // The control starts from the base's blocks; both stages change blocks and merge.
    let device = Device::cpu();
    let load = |stage: &str| dit::load(&whole.join(stage), &device).unwrap();
    let (start, distilled, tuned) = (load("random"), load("stage1"), load("stage2"));
    let base = dit::load(&base, &device).unwrap();
    assert_eq!((&tuned.config.pairs, tuned.config.blocks[3].attn.kind.as_str()), (&vec![0, 1], "hyena_x"));
    for name in
        ["blocks.0.attn.qkv.weight", "blocks.3.mlp.fc2.bias", "pairs.1.merge.weight", "blocks.3.attn.in_proj.bias"]
    {
        let value = |model: &Dit| model.params.get(model.params.find(name).unwrap()).value.to_vec().unwrap();
        assert!(base.params.find(name).is_none() || value(&base) == value(&start), "{name}");
        assert!(value(&start) != value(&distilled) && value(&distilled) != value(&tuned), "{name}");
    }
    assert_eq!(tuned.params.elements() - start.params.elements(), 0);
    // Killed and resumed, the run ends in the same bytes.
    assert!(killed);
    run_all(&text, &dir.join("killed"), &mut go_on).unwrap().unwrap();
    for stage in ["stage1", "stage2"] {
        assert!(bytes(&whole, stage) == bytes(&dir.join("killed"), stage), "{stage} differs");
    }
}
