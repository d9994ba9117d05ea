//! A study from its file to its report, on a model small enough for every test run.

use crate::graft::{base, data, folder, go_on};
use graft_engine::graft::run::Event;
use graft_engine::graft::science::{self, Runner, Study, Tier};
use graft_engine::tensor::Device;
use std::ops::ControlFlow;

const ROWS: &str = r#"
[[row]]
name = "base"
group = "Controls"
control = "base"

[[row]]
name = "longer"
group = "Controls"
control = "longer"

[[row]]
name = "hyena"
group = "Mixers"
seeds = [0, 1]
score = ["distilled", "finetuned"]
graft = [{ site = "attn", layers = "all", operator = { kind = "hyena_x" } }]

[[row]]
name = "narrow"
group = "MLPs"
tier = "full"
graft = [{ site = "mlp", layers = "all", operator = { kind = "mlp", ratio = 3 } }]
"#;

#[test]
fn every_job_runs_once_and_the_report_has_a_line_for_each() {
    let dir = folder("science");
    let text = format!(
        "title = \"Small\"\n[base]\nmodel = {:?}\n[data]\nkind = \"mnist\"\ndir = \"none\"\n[distill]\nsteps = 6\nbatch = 8\n\
         held_out = 1\n[finetune]\nsteps = 4\nbatch = 8\n[eval]\nsteps = 2\nsampler = \"ddim\"\n{ROWS}",
        base(&dir).display().to_string()
    );
    let study = Study::parse("study.toml", &text).unwrap();
    let (run, device) = (dir.join("run"), Device::cpu());
    let names: Vec<String> = study.jobs(Tier::Core).iter().map(|j| format!("{} {}", j.row.name, j.seed)).collect();
    assert_eq!(names, ["base 0", "longer 0", "hyena 0", "hyena 1"]);
    assert_eq!(study.jobs(Tier::Full).len(), 5);

    let runner = Runner::open(&study, &run, data(), &device).unwrap();
    // Broken off in stage 2 of a graft, a job leaves no result and goes on where it was.
    let hyena = study.jobs(Tier::Core)[2];
    let mut left = 8;
    let stopped = runner.run(hyena, &mut |e| {
        left -= i32::from(matches!(e, Event::Distill(_) | Event::Finetune(_)));
        if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(stopped.unwrap().is_none() && hyena.result(&run).unwrap().is_none());
    for job in study.jobs(Tier::Core) {
        let result = runner.run(job, &mut go_on).unwrap().unwrap();
        assert_eq!((result.row.as_str(), result.seed), (job.row.name.as_str(), job.seed));
        // What is done is not done again.
        let again = runner.run(job, &mut |_| panic!("a job that is done runs again")).unwrap().unwrap();
        assert_eq!(again.identity, result.identity);
    }
    let graft = hyena.result(&run).unwrap().unwrap();
    assert_eq!(
        (graft.attention_replaced, graft.operators["hyena_x(direction=causal, taps=4)"], graft.stages.len()),
        (1.0, 4, 2)
    );
    assert_eq!((graft.distill.unwrap().steps, graft.finetune.unwrap().steps), (6, 4));
    assert!(!hyena.folder(&run).join("finetune/checkpoint.safetensors").exists());

    // Other settings are another job: its folder is not taken over.
    let other = Study::parse("study.toml", &text.replace("steps = 4", "steps = 5")).unwrap();
    let error = Runner::open(&other, &run, data(), &device).unwrap().run(other.jobs(Tier::Core)[1], &mut go_on);
    assert!(error.unwrap_err().to_string().contains("holds the result of another job"));

    let report = science::report(&study, &run).unwrap();
    let lines: Vec<(&str, &str, usize)> =
        report.sections.iter().flat_map(|s| &s.lines).map(|l| (l.row.as_str(), l.stage.as_str(), l.seeds)).collect();
    let expected =
        [("base", "", 1), ("longer", "", 1), ("hyena", "distilled", 2), ("hyena", "finetuned", 2), ("narrow", "", 0)];
    assert_eq!(lines, expected);
    assert!(report.markdown().contains("| narrow | not run |") && report.render().contains("not run"));
}
