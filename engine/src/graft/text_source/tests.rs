//! A model that reads text, grafted: identity, the whole path, what does not fit, and the published graft.

use super::*;
use crate::autograd::{Graph, ParamStore, Precision};
use crate::graft::assemble::{self, Stage};
use crate::graft::cost::{Counter, percent};
use crate::graft::distill::Distiller;
use crate::graft::memory;
use crate::graft::run::{self, Event};
use crate::graft::synthesize::tests::{about, make, model};
use crate::io::files::test_dir;
use crate::models::dit::SaveAs;
use crate::models::lora;
use crate::models::pixart::{self, PixArtConfig};
use crate::models::sites::SiteModel;
use crate::nn;
use crate::nn::operators::{Site, Spec};
use crate::sample::schedule::Schedule;
use crate::train::pairs::About;
use crate::train::sites::{Draw, SiteLearner};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;

const HYENA: &str = "[[graft]]\nsite = \"attn\"\nlayers = \"every-other\"\noperator = { kind = \"hyena_x\" }\n";

/// A folder with a base model of four blocks, and 24 pairs that it made.
fn folder(name: &str) -> (PathBuf, PixArt) {
    let (dir, base) = (test_dir(name), model(4));
    pixart::save(&base, &dir.join("base"), SaveAs::F32, &BTreeMap::new()).unwrap();
    make(&dir.join("pairs"), About { shard: 10, ..about(24) }, &base, 99).unwrap();
    (dir, base)
}

fn plan(dir: &Path, rest: &str) -> Plan {
    let text = format!(
        "[base]\nmodel = \"{0}/base\"\n[data]\nkind = \"pairs\"\ndir = \"{0}/pairs\"\n{rest}",
        dir.display().to_string().replace('\\', "/")
    );
    Plan::parse("plan.toml", text).unwrap()
}

fn data(dir: &Path) -> TextData {
    TextData::load(&plan(dir, HYENA).data).unwrap()
}

/// What a model predicts for noised pairs.
fn predict(model: &PixArt, data: &TextData) -> Vec<f32> {
    predict_for(model, &data.train, &[3, 11])
}

fn predict_for(model: &PixArt, pairs: &Pairs, chosen: &[u32]) -> Vec<f32> {
    let schedule = Schedule::default();
    let noised = model.noised(pairs, chosen, &Draw { schedule: &schedule, dropout: 0.0, seed: 1, step: 5 }).unwrap();
    let (g, x) = (Graph::inference(Precision::F32), crate::autograd::Var::constant(noised.x_t.clone()));
    model.predict(&g, &x, &noised.t, &noised.condition, false, None).unwrap().tensor().to_vec().unwrap()
}

fn values(params: &ParamStore, name: &str) -> Vec<f32> {
    params.get(params.find(name).unwrap()).value.to_vec().unwrap()
}

fn quiet(_: Event<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn an_identity_graft_gives_the_bits_of_the_base() {
    let (dir, base) = folder("text_identity");
    let (data, text) = (data(&dir), HYENA.replace("hyena_x", "mha") + "start = \"teacher\"\n");
    let same = plan(&dir, &text.replace("every-other", "all"));
    let assignments = same.resolve(&base.config).unwrap();
    assert_eq!(assignments.len(), 4);
    let distiller = Distiller::homeless(&base, &assignments, &same.distill).unwrap();
    let grafted = distiller.initial_model().unwrap();
    let want = predict(&base, &data);
    assert_eq!(predict(&grafted, &data), want);
    // Saved and read again as well, and another operator does change them.
    assemble::save(&grafted, &dir.join("same"), &same, Stage::Random).unwrap();
    assert_eq!(predict(&PixArt::load(&dir.join("same"), &Device::cpu()).unwrap(), &data), want);
    let other = plan(&dir, HYENA);
    let assignments = other.resolve(&base.config).unwrap();
    let distiller = Distiller::homeless(&base, &assignments, &other.distill).unwrap();
    assert_ne!(predict(&distiller.initial_model().unwrap(), &data), want);
}

#[test]
fn what_the_tensors_do_not_tell_survives_saving() {
    let (dir, base) = folder("text_operators");
    let text = "[[graft]]\nsite = \"attn\"\nlayers = [0, 2]\noperator = { kind = \"swa\", window = 2 }\n\
                [[graft]]\nsite = \"attn\"\nlayers = [3]\noperator = { kind = \"hyena_x\", direction = \"centred\" }\n\
                [[graft]]\nsite = \"mlp\"\nlayers = [1]\noperator = { kind = \"mlp\", ratio = 2 }\n";
    let plan = plan(&dir, text);
    let assignments = plan.resolve(&base.config).unwrap();
    let grafted = Distiller::homeless(&base, &assignments, &plan.distill).unwrap().initial_model().unwrap();
    assemble::save(&grafted, &dir.join("grafted"), &plan, Stage::Random).unwrap();
    let loaded = PixArt::load(&dir.join("grafted"), &Device::cpu()).unwrap();
    assert_eq!(loaded.config, grafted.config);
    assert_eq!(loaded.config.blocks[2].attn.number("window", 0.0).unwrap(), 2.0);
    assert_eq!(predict(&loaded, &data(&dir)), predict(&grafted, &data(&dir)));
}

/// Everything from the plan to the report, broken off once in each stage.
#[test]
fn the_whole_path() {
    let (dir, base) = folder("text_run");
    let settings = "[distill]\nsteps = 60\nbatch = 6\nheld_out = 1\noptimizer = { lr = 5e-3, clip = 1.0 }\n\
                    [finetune]\nsteps = 12\nbatch = 6\nmethod = \"lora\"\n\
                    lora = { rank = 4, keep_adapters = true }\noutput_distill = 1.0\n\
                    optimizer = { lr = 1e-3, warmup = 0, ema = 0.5 }\n\
                    [eval]\nsamples = 2\nsteps = 2\nsampler = \"ddim\"\nguidance = 2.0\n";
    let (data, device) = (data(&dir), Device::cpu());
    let open = |name: &str| RunFolder::create(plan(&dir, &(HYENA.to_string() + settings)), &dir.join(name)).unwrap();
    let run = open("run");
    for stop in [7, 65] {
        let mut stopping = |event: Event<'_>| match event {
            Event::Distill(p) if p.step == stop => ControlFlow::Break(()),
            Event::Finetune(p) if p.step + 60 == stop => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        };
        assert!(run::run(&run, &data, &device, &mut stopping).unwrap().is_none());
    }
    let summary = run::run(&run, &data, &device, &mut quiet).unwrap().unwrap();
    assert_eq!(summary.sites.iter().map(|s| s.site.as_str()).collect::<Vec<_>>(), ["blocks.1.attn", "blocks.3.attn"]);
    for site in &summary.sites {
        let (before, after) = (site.residual_initial.unwrap(), site.residual_distilled.unwrap());
        assert!(after.relative < 0.8 * before.relative && after.loss < 0.8 * before.loss, "{before:?} {after:?}");
    }
    let stages = summary.evaluation.as_ref().unwrap().stages.iter();
    let stages: Vec<_> = stages.map(|s| (s.name.as_str(), s.fidelity.unwrap(), s.sheet.len())).collect();
    assert_eq!(stages.iter().map(|s| s.0).collect::<Vec<_>>(), ["original", "random", "distilled", "finetuned"]);
    assert_eq!((stages[0].1.prediction, stages[0].1.sample), (0.0, 0.0));
    assert!(stages[1].1.prediction > 1.2 * stages[2].1.prediction && stages[2].1.prediction > 0.0, "{stages:?}");
    assert!(stages.iter().all(|s| s.2 > 0 && s.1.samples == 2));
    let page = crate::io::files::read_text(&run.dir.join(run::REPORT)).unwrap();
    assert!(page.contains("Nearness to the base model") && page.contains("held-out loss"));
    // The same without breaking off gives the same model.
    let whole = open("whole");
    run::run(&whole, &data, &device, &mut quiet).unwrap().unwrap();
    let load = |run: &RunFolder, stage| PixArt::load(&run.model_folder(stage), &device).unwrap();
    let (distilled, tuned) = (load(&run, Stage::Distilled), load(&run, Stage::Finetuned));
    assert_eq!(assemble::digest(&tuned).unwrap(), assemble::digest(&load(&whole, Stage::Finetuned)).unwrap());
    // Adapters and grafted operators change, nothing else.
    let mut changed = 0;
    for (_, p) in distilled.params.iter() {
        let adapted = PixArt::ADAPTED.iter().any(|end| p.name.ends_with(&format!(".{end}.weight")));
        let grafted = p.name.starts_with("blocks.1.attn.") || p.name.starts_with("blocks.3.attn.");
        let same = values(&tuned.params, &p.name) == p.value.to_vec().unwrap();
        assert_eq!(same, !(adapted || grafted), "{}", p.name);
        changed += usize::from(!same);
        if !grafted {
            assert_eq!(values(&base.params, &p.name), p.value.to_vec().unwrap(), "{}", p.name);
        }
    }
    assert!(changed > 30, "{changed}");
    // The adapters that were kept, on the distilled model: beside its weights, and merged into them.
    let mut beside = load(&run, Stage::Distilled);
    assert!(lora::attach(&mut beside, &run.adapter_folder(), 1.0).unwrap() > 20);
    let (want, unmerged) = (predict(&tuned, &data), predict(&beside, &data));
    nn::lora::merge(&mut beside.params).unwrap();
    for found in [unmerged, predict(&beside, &data)] {
        let size = want.iter().map(|v| v.abs()).fold(0.0, f32::max);
        let error = found.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(error <= 2e-5 * size, "{error} of {size}");
    }
}

#[test]
fn plans_that_do_not_fit_are_named() {
    let (dir, base) = folder("text_plans");
    let message = |rest: &str| plan(&dir, rest).resolve(&base.config).unwrap_err().to_string();
    let found = message("[[graft]]\nsite = \"block-pair\"\nlayers = [1]\n");
    assert!(found.contains("blocks of a PixArt cannot run in parallel"), "{found}");
    let found = message(&HYENA.replace("every-other", "paper-pixart"));
    assert!(found.contains("must be a base of 28 blocks; this one has 4"), "{found}");
    let local = plan(&dir, &HYENA.replace("every-other", "top-local:2"));
    let found = TextData::choose(&local, &base, None, None, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert!(found.to_string().contains("layers that the base model decides are not measured in a PixArt"), "{found}");
    let mut images = plan(&dir, HYENA).data;
    images.kind = "mnist".into();
    let found = TextData::load(&images).map(|_| ()).unwrap_err().to_string();
    assert!(found.starts_with("data: kind: not for a model that reads text; is mnist; must be \"pairs\""), "{found}");
    // Pairs of a model with other features.
    let config = PixArtConfig { caption_channels: 16, ..base.config.clone() };
    let other = PixArt::new(config, &Device::cpu(), 1).unwrap();
    let found = other.check(&data(&dir).train).unwrap_err().to_string();
    assert!(found.contains("the pairs do not fit the model; is latents [3, 8, 8], features of 12"), "{found}");
}

#[test]
fn the_published_graft_of_the_published_model() {
    let base = PixArtConfig::sigma_xl(2048).unwrap();
    let graft = plan(Path::new("none"), &HYENA.replace("every-other", "paper-pixart"));
    let assignments = graft.resolve(&base).unwrap();
    let blocks: Vec<usize> = assignments.iter().map(|a| a.block).collect();
    assert_eq!(blocks, [8, 10, 12, 14, 16, 18, 20, 21, 22, 23, 24, 25, 26, 27]);
    assert!(assignments.iter().all(|a| a.site == Site::Attn && a.spec.kind == "hyena_x"));
    let after = assemble::grafted_config(&base, &assignments).unwrap();
    assert_eq!(after.blocks[8].attn.kind, Spec::new("hyena_x").kind);
    let [before, after] = [&base, &after].map(|config| Counter::new(config).model().unwrap());
    assert_eq!((before.params, before.tokens), (610_856_096, 16_384));
    assert!((before.flops / 52e12 - 1.0).abs() < 0.03, "{}", before.flops);
    assert!((percent(before.attn.flops_operator, after.attn.flops_operator) + 50.0).abs() < 0.1);
    assert_eq!(after.params - before.params, 14 * (4 + 1) * 3 * 1152);
}

#[test]
fn memory_is_rehearsed() {
    let (dir, base) = folder("text_memory");
    let settings = "[distill]\nbatch = 4\n[finetune]\nbatch = 4\nmethod = \"lora\"\nlora = { rank = 2 }\n";
    let graft = plan(&dir, &(HYENA.to_string() + settings));
    let [one, two] = memory::plan::<TextData>(&graft, None, 1000).unwrap();
    let weights = 4 * base.params.elements();
    assert!(one.total() > weights + 1000 && two.total() > weights + 1000, "{one} {two}");
    // Twice the batch takes more, but not twice: the weights stay.
    let wide = plan(&dir, &(HYENA.to_string() + &settings.replace("batch = 4", "batch = 8")));
    let [one_wide, two_wide] = memory::plan::<TextData>(&wide, None, 1000).unwrap();
    assert!(one_wide.total() > one.total() && one_wide.total() < 2 * one.total());
    assert!(two_wide.total() > two.total() && two_wide.total() < 2 * two.total());
}

#[test]
fn a_model_that_is_told_the_size_hears_that_of_the_pairs() {
    let dir = test_dir("text_alpha");
    let config = PixArtConfig { micro_conditions: true, ..model(2).config.clone() };
    let base = PixArt::random(config, &Device::cpu(), 6).unwrap();
    make(&dir.join("pairs"), about(6), &base, 99).unwrap();
    let mut pairs = data(&dir).train;
    let small = predict_for(&base, &pairs, &[0, 3]);
    pairs.about.factor = 8;
    let large = predict_for(&base, &pairs, &[0, 3]);
    assert!(small.iter().all(|v| v.is_finite()) && small != large);
}
