//! The demonstration, cut to about a minute: on the shipped model and real images, a graft whose new operators are
//! random is worse than a distilled one, and that is worse than a finetuned one.

use graft_engine::backend::Device;
use graft_engine::graft::plan::Plan;
use graft_engine::graft::run::{self, RunData, RunFolder};
use graft_tests::scratch::Scratch;
use std::ops::ControlFlow;
use std::path::Path;

/// Demo plan with fewer updates and samples, and paths that do not depend on the working directory.
fn shortened() -> Plan {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("assets/fashion-dit/demo.toml")).unwrap();
    let mut plan: toml::Table = text.parse().unwrap();
    let mut set = |section: &str, key: &str, value: toml::Value| {
        plan[section].as_table_mut().unwrap().insert(key.to_string(), value);
    };
    set("distill", "steps", 120.into());
    set("finetune", "steps", 60.into());
    set("finetune", "batch", 32.into());
    set("eval", "samples", 200.into());
    set("eval", "steps", 10.into());
    for (section, key) in [("base", "model"), ("data", "dir"), ("eval", "classifier")] {
        let relative = text.parse::<toml::Table>().unwrap()[section][key].as_str().unwrap().to_string();
        set(section, key, root.join(relative).display().to_string().into());
    }
    Plan::parse("demo.toml", plan.to_string()).unwrap()
}

#[test]
fn random_is_worse_than_distilled_is_worse_than_finetuned() {
    let dir = Scratch::new("demo");
    let device = Device::cpu();
    let folder = RunFolder::create(shortened(), &dir).unwrap();
    let data = RunData::load(&folder.plan.data).unwrap();
    let summary = run::run(&folder, &data, &device, &mut |_| ControlFlow::Continue(())).unwrap().unwrap();
    let evaluation = summary.evaluation.unwrap();
    let frechet = |name: &str| evaluation.stages.iter().find(|s| s.name == name).and_then(|s| s.score).unwrap().frechet;
    let scores = ["original", "random", "distilled", "finetuned"].map(frechet);
    println!(
        "Fréchet: original {:.2}, random {:.2}, distilled {:.2}, finetuned {:.2}",
        scores[0], scores[1], scores[2], scores[3]
    );
    let [original, random, distilled, finetuned] = scores;
    assert!(random > distilled && distilled > finetuned && random > 2.0 * original, "{scores:?}");
    for site in &summary.sites {
        let (before, after) = (site.residual_initial.unwrap(), site.residual_distilled.unwrap());
        assert!(after.relative < 0.8 * before.relative, "{}: {before:?} {after:?}", site.site);
    }
    let page = std::fs::read_to_string(dir.join(run::REPORT)).unwrap();
    assert!(page.contains("<svg") && page.contains("data:image/png;base64,") && page.contains("hyena_x"));
    drop(folder);
}
