//! Stage 1 beyond the plain run: from activations on disk, by several processes, with gates; and what stops it.

use crate::graft::{HYENA, base, bytes, copy_tree, data, folder, go_on, plan, run_all};
use graft_engine::graft::cache::Filling;
use graft_engine::graft::parts::Part;
use graft_engine::graft::plan::Plan;
use graft_engine::graft::run::{self, Event, RunFolder};
use graft_engine::io::{jsonl, safetensors};
use graft_engine::tensor::Device;
use serde_json::Value;
use std::ops::ControlFlow;
use std::path::Path;

/// Three sites of different kinds.
const MIXED: &str = "[[graft]]\nsite = \"attn\"\nlayers = [1, 2]\noperator = { kind = \"hyena_x\" }\n\
                     [[graft]]\nsite = \"mlp\"\nlayers = [0]\noperator = { kind = \"mlp\", ratio = 2 }\n";

fn distill(plan: &Plan, dir: &Path, report: &mut run::Report<'_>) -> graft_engine::error::Result<bool> {
    run::distill(&RunFolder::create(plan.clone(), dir)?, &data(), &Device::cpu(), report)
}

fn part(plan: &Plan, dir: &Path, part: &str, steps: u64) -> graft_engine::error::Result<bool> {
    let folder = RunFolder::share(plan.clone(), dir)?;
    let part: Part = part.parse()?;
    run::distill_part(&folder, part, &data(), &Device::cpu(), &mut |e| match e {
        Event::Distill(p) if p.step == steps => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    })
}

/// Lines of a log without what depends on the clock.
fn lines(path: &Path) -> Vec<Value> {
    let mut lines = jsonl::read(path).unwrap();
    for line in &mut lines {
        line.as_object_mut().unwrap().remove("images_per_second");
    }
    lines
}

/// Tensors of a model of a run; the rest of its file also tells the plan.
fn tensors(dir: &Path, stage: &str) -> Vec<(String, Vec<u8>)> {
    let file = safetensors::TensorFile::open(&dir.join(stage).join(crate::graft::WEIGHTS)).unwrap();
    file.iter().map(|t| (t.name.to_string(), t.bytes.to_vec())).collect()
}

fn message(result: graft_engine::error::Result<bool>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn a_cache_in_f32_changes_nothing_and_a_smaller_one_is_gone_through_again() {
    let dir = folder("cache");
    let base = base(&dir);
    let cached = |samples: usize, dtype: &str, folder: &str| {
        let folder = dir.join(folder).display().to_string();
        let settings = format!(
            "steps = 9\ncheckpoint_every = 3\ncache = {folder:?}\ncache_samples = {samples}\ncache_dtype = \"{dtype}\""
        );
        plan(&base, MIXED, &settings, "steps = 1")
    };
    let plain = plan(&base, MIXED, "steps = 9\ncheckpoint_every = 3", "steps = 1");
    assert!(distill(&plain, &dir.join("plain"), &mut go_on).unwrap());
    // As many images as the updates see.
    let mut seen: Vec<Filling> = Vec::new();
    let whole = distill(&cached(72, "f32", "whole-cache"), &dir.join("whole"), &mut |e| {
        if let Event::Cache(filling) = e {
            seen.push(filling.clone());
        }
        ControlFlow::Continue(())
    });
    assert!(whole.unwrap());
    assert_eq!(seen.iter().map(|f| f.batches).collect::<Vec<_>>(), (0..9).map(|i| [i, 9]).collect::<Vec<_>>());
    // Input and output of 16 tokens and the gate, 16 channels each, at three sites.
    assert_eq!(seen[0].bytes, 72 * (2 * 16 + 1) * 16 * 4 * 3);
    assert!(tensors(&dir.join("plain"), "stage1") == tensors(&dir.join("whole"), "stage1"));
    assert_eq!(lines(&dir.join("plain/distill/loss.jsonl")), lines(&dir.join("whole/distill/loss.jsonl")));
    // Fewer: other bits, the same whether the run is stopped or not, and nothing is filled twice.
    let small = cached(24, "f32", "small-cache");
    assert!(distill(&small, &dir.join("small"), &mut go_on).unwrap());
    let stop = |e: Event<'_>| match e {
        Event::Distill(p) if p.step == 5 => ControlFlow::Break(()),
        Event::Cache(_) => panic!("the cache is there"),
        _ => ControlFlow::Continue(()),
    };
    assert!(!distill(&small, &dir.join("stopped"), &mut { stop }).unwrap());
    assert!(distill(&small, &dir.join("stopped"), &mut go_on).unwrap());
    assert!(tensors(&dir.join("small"), "stage1") == tensors(&dir.join("stopped"), "stage1"));
    assert!(tensors(&dir.join("small"), "stage1") != tensors(&dir.join("plain"), "stage1"));
    // bf16 takes half the space and is near.
    assert!(distill(&cached(72, "bf16", "half-cache"), &dir.join("half"), &mut go_on).unwrap());
    let size =
        |folder: &str| std::fs::metadata(dir.join(folder).join("blocks.1.attn/000008.safetensors")).unwrap().len();
    assert!(size("half-cache") < size("whole-cache") * 6 / 10);
    let last =
        |run: &str| lines(&dir.join(run).join("distill/loss.jsonl"))[8]["losses"]["blocks.1.attn"].as_f64().unwrap();
    let (exact, rounded) = (last("plain"), last("half"));
    assert!(exact != rounded && (exact - rounded).abs() < 0.02 * exact, "{exact} {rounded}");
}

#[test]
fn a_cache_that_is_another_damaged_or_too_large_is_refused() {
    let dir = folder("bad_cache");
    let base = base(&dir);
    let with = |settings: &str| {
        let cache = dir.join("cache").display().to_string();
        plan(&base, HYENA, &format!("steps = 4\ncache = {cache:?}\n{settings}"), "steps = 1")
    };
    assert!(distill(&with("cache_samples = 16"), &dir.join("good"), &mut go_on).unwrap());
    let refused = |settings: &str, name: &str| message(distill(&with(settings), &dir.join(name), &mut go_on));
    let other = refused("cache_samples = 16\nseed = 1", "seed");
    assert!(other.contains("cache of something else (graft.cache.seed); is 0; must be 1"), "{other}");
    let dtype = refused("cache_samples = 16\ncache_dtype = \"bf16\"", "dtype");
    assert!(dtype.contains("000000.safetensors: input: does not fit the cache; must be BF16 [8, 16, 16]"), "{dtype}");
    let large = refused("cache_samples = 4000000000", "large");
    assert!(large.contains("cache: the disk is too small for the cache") && large.contains("MiB free"), "{large}");
    // Another process fills it.
    let lock = graft_engine::io::atomic::RunLock::acquire(&dir.join("cache/blocks.3.attn")).unwrap();
    assert!(refused("cache_samples = 16", "locked").contains("blocks.3.attn: run folder is in use"));
    drop(lock);
    let shard = dir.join("cache/blocks.1.attn/000001.safetensors");
    let whole = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &whole[..whole.len() - 9]).unwrap();
    let damaged = refused("cache_samples = 16", "damaged");
    assert!(damaged.contains("000001.safetensors: output: data truncated"), "{damaged}");
    // A full disk under one shard: what is there stays, and the next call goes on.
    std::fs::remove_file(&shard).unwrap();
    std::os::unix::fs::symlink("/dev/full", &shard).unwrap();
    let full = refused("cache_samples = 16", "full");
    assert!(full.contains("000001.safetensors: cannot write") && full.contains("free disk space"), "{full}");
    std::fs::remove_file(&shard).unwrap();
    assert!(distill(&with("cache_samples = 16"), &dir.join("full"), &mut go_on).unwrap());
    assert!(std::fs::read(&shard).unwrap() == whole);
    assert!(tensors(&dir.join("full"), "stage1") == tensors(&dir.join("good"), "stage1"));
}

#[test]
fn parts_make_what_one_process_makes() {
    let dir = folder("parts");
    let text = plan(&base(&dir), MIXED, "steps = 7\ncheckpoint_every = 2\nheld_out_every = 3", "steps = 2");
    let whole = dir.join("whole");
    assert!(distill(&text, &whole, &mut go_on).unwrap());
    for of in [2, 3] {
        let run = dir.join(format!("in-{of}"));
        // The last part is stopped on its way: neither can the parts be gathered then, nor is what it did lost.
        for index in 0..of {
            let steps = if index + 1 == of { 3 } else { 0 };
            assert_eq!(part(&text, &run, &format!("{index}/{of}"), steps).unwrap(), steps == 0);
        }
        let early = message(distill(&text, &run, &mut go_on));
        let last =
            format!("part-{}-of-{of}: a part of stage 1 is not finished; is at step 3; must be at step 7", of - 1);
        assert!(early.contains(&last), "{early}");
        assert!(part(&text, &run, &format!("{}/{of}", of - 1), 0).unwrap());
        // Gathering trains nothing.
        let gathered = distill(&text, &run, &mut |e| match e {
            Event::Distill(_) => panic!("nothing is left to train"),
            _ => ControlFlow::Continue(()),
        });
        assert!(gathered.unwrap());
        for stage in ["random", "stage1"] {
            assert!(bytes(&whole, stage) == bytes(&run, stage), "{stage} in {of} parts");
        }
        let checkpoint = |dir: &Path| std::fs::read(dir.join("distill/checkpoint.safetensors")).unwrap();
        assert!(checkpoint(&whole) == checkpoint(&run));
        let log = |dir: &Path, name: &str| lines(&dir.join("distill").join(name));
        assert_eq!(log(&whole, "loss.jsonl").len(), 7);
        let close = |a: &Value, b: &Value| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-12;
        for (a, b) in log(&whole, "loss.jsonl").iter().zip(log(&run, "loss.jsonl")) {
            assert_eq!((&a["step"], a["losses"].as_object().unwrap().len()), (&b["step"], 3));
            assert!(a["losses"].as_object().unwrap().iter().all(|(site, loss)| close(loss, &b["losses"][site])));
        }
        let steps = |dir: &Path| log(dir, "held_out.jsonl").iter().map(|l| l["step"].clone()).collect::<Vec<_>>();
        assert_eq!((steps(&run), steps(&whole)), (vec![0.into(), 3.into(), 6.into(), 7.into()], steps(&run)));
        assert!(message(part(&text, &run, &format!("0/{of}"), 0)).contains("stage 1 of this run is not split"));
        assert!(run_all(&text, &run, &mut go_on).unwrap().is_some());
    }
}

/// A pair with an operator inside, and one outside: two things to train.
const PAIR: &str = "[[graft]]\nsite = \"block-pair\"\nlayers = [1]\n\
                    [[graft]]\nsite = \"attn\"\nlayers = [0, 2]\noperator = { kind = \"hyena_x\" }\n";

#[test]
fn pairs_of_blocks_are_kept_and_shared_out_too() {
    let dir = folder("pairs");
    let base = base(&dir);
    let settings = "steps = 4\ngate_scaled = true\ncheckpoint_every = 2";
    let plain = plan(&base, PAIR, settings, "steps = 1");
    assert!(distill(&plain, &dir.join("plain"), &mut go_on).unwrap());
    let cache = dir.join("cache").display().to_string();
    let kept = plan(&base, PAIR, &format!("{settings}\ncache = {cache:?}\ncache_samples = 32"), "steps = 1");
    assert!(distill(&kept, &dir.join("kept"), &mut go_on).unwrap());
    assert!(tensors(&dir.join("plain"), "stage1") == tensors(&dir.join("kept"), "stage1"));
    let shard = safetensors::TensorFile::open(&dir.join("cache/pairs.1/000003.safetensors")).unwrap();
    assert_eq!(shard.names().collect::<Vec<_>>(), ["condition", "input", "output"]);
    for index in 0..2 {
        assert!(part(&plain, &dir.join("parts"), &format!("{index}/2"), 0).unwrap());
    }
    assert!(message(part(&plain, &dir.join("parts"), "0/3", 0)).contains("must be at most 2 parts"));
    std::fs::remove_dir_all(dir.join("parts/distill/part-0-of-3")).ok();
    assert!(distill(&plain, &dir.join("parts"), &mut go_on).unwrap());
    assert!(bytes(&dir.join("plain"), "stage1") == bytes(&dir.join("parts"), "stage1"));
}

#[test]
fn one_process_for_each_part() {
    let dir = folder("part_locks");
    let text = plan(&base(&dir), MIXED, "steps = 3", "steps = 1");
    let run_dir = dir.join("run");
    let folder = RunFolder::share(text.clone(), &run_dir).unwrap();
    let mut inside = Vec::new();
    let first = run::distill_part(&folder, "0/2".parse().unwrap(), &data(), &Device::cpu(), &mut |e| {
        if matches!(e, Event::Distill(p) if p.step == 2) {
            inside = vec![
                message(part(&text, &run_dir, "0/2", 0)),
                message(distill(&text, &run_dir, &mut go_on)),
                format!("{:?}", part(&text, &run_dir, "1/2", 0).unwrap()),
            ];
        }
        ControlFlow::Continue(())
    });
    assert!(first.unwrap());
    assert!(inside[0].contains("part-0-of-2: run folder is in use"), "{inside:?}");
    assert!(inside[1].contains("run folder is in use; is locked by a process that trains a part of it"), "{inside:?}");
    assert_eq!(inside[2], "true");
    drop(folder);
    assert!(
        message(part(&text, &run_dir, "3/4", 0)).contains("more parts than sites; is 3/4; must be at most 3 parts")
    );
    assert!(part(&text, &run_dir, "0/3", 0).unwrap());
    let mixed = message(distill(&text, &run_dir, &mut go_on));
    assert!(mixed.contains("begun in different numbers of parts; is 2 and 3"), "{mixed}");
}

#[test]
fn gates_and_regular_measurements() {
    let dir = folder("gates");
    let base = base(&dir);
    let settings = "steps = 60\noptimizer = { lr = 1e-2 }\nheld_out_every = 20\n";
    let read = |name: &str, more: &str| {
        distill(&plan(&base, HYENA, &format!("{settings}{more}"), "steps = 1"), &dir.join(name), &mut go_on).unwrap();
        lines(&dir.join(name).join("distill/held_out.jsonl"))
    };
    let (plain, gated) = (read("plain", ""), read("gated", "gate_scaled = true"));
    for log in [&plain, &gated] {
        assert_eq!(log.iter().map(|l| l["step"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 20, 40, 60]);
        let losses: Vec<f64> = log.iter().map(|l| l["sites"]["blocks.1.attn"]["loss"].as_f64().unwrap()).collect();
        assert!(losses[3] < 0.8 * losses[0], "{losses:?}");
    }
    // The same operators at the start: only the loss is scaled, the relative error is not.
    let first = |log: &[Value], what: &str| log[0]["sites"]["blocks.3.attn"][what].as_f64().unwrap();
    assert_eq!(first(&plain, "relative"), first(&gated, "relative"));
    assert!(first(&plain, "loss") != first(&gated, "loss"));
    assert!(tensors(&dir.join("plain"), "stage1") != tensors(&dir.join("gated"), "stage1"));
}

#[test]
fn checkpoints_of_another_plan_or_base_are_refused() {
    let dir = folder("strangers");
    let base = base(&dir);
    let text = plan(&base, HYENA, "steps = 4", "steps = 2");
    run_all(&text, &dir.join("run"), &mut go_on).unwrap().unwrap();
    // Another base in the place of the first, of the same sizes.
    let changed = folder("strangers_base");
    copy_tree(&base, &changed.join("base"));
    let weights = changed.join("base").join(crate::graft::WEIGHTS);
    let mut values = std::fs::read(&weights).unwrap();
    let last = values.len() - 1;
    values[last] ^= 1;
    std::fs::write(&weights, values).unwrap();
    let other_base = plan(&changed.join("base"), HYENA, "steps = 4", "steps = 2");
    copy_tree(&dir.join("run"), &dir.join("other-base"));
    let error = message(distill(&other_base, &dir.join("other-base"), &mut go_on));
    assert!(error.contains("distill/checkpoint.safetensors: checkpoint of another run (another base)"), "{error}");
    // A checkpoint that came from another plan.
    let longer = plan(&base, HYENA, "steps = 5", "steps = 3");
    for (stage, step) in [("distill", 1), ("finetune", 2)] {
        let strange = dir.join(format!("strange-{stage}"));
        if step == 2 {
            assert!(distill(&longer, &strange, &mut go_on).unwrap());
        }
        std::fs::create_dir_all(strange.join(stage)).unwrap();
        let name = format!("{stage}/checkpoint.safetensors");
        std::fs::copy(dir.join("run").join(&name), strange.join(&name)).unwrap();
        let error = run_all(&longer, &strange, &mut go_on).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(&format!("{name}: checkpoint of another run (another plan)")), "{error}");
    }
    // A damaged one.
    let path = dir.join("run/finetune/checkpoint.safetensors");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let error = run_all(&text, &dir.join("run"), &mut go_on).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("finetune/checkpoint.safetensors: ") && error.contains("data truncated"), "{error}");
}

#[test]
fn a_diverging_stage_2_names_its_step_and_keeps_the_last_good_checkpoint() {
    let dir = folder("diverge2");
    let settings = "steps = 400\ncheckpoint_every = 1\noptimizer = { lr = 1e30, clip = 1e30, warmup = 0 }";
    let text = plan(&base(&dir), HYENA, "steps = 2", settings);
    let error = run_all(&text, &dir.join("run"), &mut go_on).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("step ") && error.contains("not finite"), "{error}");
    let file = safetensors::TensorFile::open(&dir.join("run/finetune/checkpoint.safetensors")).unwrap();
    assert!(file.iter().all(|t| t.to_f32().unwrap().iter().all(|v| v.is_finite())));
    assert!(!dir.join("run/stage2/config.json").exists());
}
