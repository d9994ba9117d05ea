//! What plans resolve to, and what is said of those that do not fit.

use super::*;
use crate::models::dit::DitConfig;

/// A plan for tests: `grafts` is the text of its `[[graft]]` tables and of what follows.
pub fn plan(grafts: &str) -> Result<Plan> {
    let text = format!("[base]\nmodel = \"none\"\n[data]\nkind = \"mnist\"\ndir = \"none\"\n{grafts}");
    Plan::parse("plan.toml", text)
}

fn graft(site: &str, layers: &str, operator: &str) -> String {
    format!("[[graft]]\nsite = {site}\nlayers = {layers}\noperator = {operator}\n")
}

fn message(grafts: &str) -> String {
    let resolved = plan(grafts).and_then(|p| p.resolve(&DitConfig::plain(4, 8, 2)));
    resolved.unwrap_err().to_string()
}

#[test]
fn grafts_may_be_mixed_and_come_in_the_order_of_the_model() {
    let text = graft("\"mlp\"", "[2]", "{ kind = \"mlp\", ratio = 3 }")
        + &graft("\"attn\"", "\"every-other\"", "{ kind = \"hyena_x\" }");
    let found = plan(&text).unwrap().resolve(&DitConfig::plain(4, 8, 2)).unwrap();
    let names: Vec<String> = found.iter().map(|a| format!("{a} {}", a.spec)).collect();
    assert_eq!(
        names,
        [
            "blocks.1.attn hyena_x(direction=causal, taps=4)",
            "blocks.2.mlp mlp(ratio=3)",
            "blocks.3.attn hyena_x(direction=causal, taps=4)"
        ]
    );
}

#[test]
fn errors_say_where_and_what() {
    let good = "{ kind = \"hyena_x\" }";
    let rows = [
        (
            graft("\"ffn\"", "\"all\"", good),
            "plan.toml:7:8: no such site; is \"ffn\"; must be \"attn\", \"mlp\" or \"block-pair\"",
        ),
        (graft("\"block-pair\"", "\"all\"", good), "plan.toml:9:12: a pair of blocks takes no operator"),
        ("[[graft]]\nsite = \"attn\"\nlayers = [1]\n".into(), "plan.toml:7:8: the graft has no operator"),
        (
            "[[graft]]\nsite = \"block-pair\"\nlayers = [2]\n".into(),
            "plan.toml:8:11: layer out of range; is 2; must be 0 to 1, as the base has 2 pairs of blocks",
        ),
        (
            "[[graft]]\nsite = \"block-pair\"\nlayers = \"auto:0.5\"\n".into(),
            "plan.toml:8:10: pairs of blocks are not chosen by what the base model does",
        ),
        (graft("\"attn\"", "\"some\"", good), "plan.toml:8:10: unknown layer pattern; is \"some\""),
        (graft("\"attn\"", "[1, 4]", good), "plan.toml:8:14: layer out of range; is 4; must be 0 to 3"),
        (graft("\"attn\"", "[1, 1]", good), "layer listed twice"),
        (
            graft("\"attn\"", "\"all\"", "{ kind = \"hyena_z\" }"),
            "plan.toml:9:21: unknown operator; is \"hyena_z\"; must be for site attn: one of mha, ",
        ),
        (
            graft("\"mlp\"", "\"all\"", good),
            "plan.toml:9:21: operator hyena_x does not fit site mlp; is \"hyena_x\"; must be one of mlp",
        ),
        (
            graft("\"attn\"", "\"all\"", "{ kind = \"hyena_x\", tap = 3 }"),
            "plan.toml:9:32: operator hyena_x has no such option; is tap; must be one of taps, direction",
        ),
        (
            graft("\"attn\"", "\"all\"", "{ kind = \"hyena_x\", taps = \"3\" }"),
            "plan.toml:9:12: hyena_x: taps: not a number; is 3",
        ),
        (
            graft("\"attn\"", "\"all\"", "{ kind = \"hyena_x\", taps = [3] }"),
            "plan.toml:9:39: not an option's value; is [3]; must be a number or a word",
        ),
        (
            graft("\"attn\"", "\"all\"", "{ kind = \"hyena_x\", taps = 0 }"),
            "plan.toml:9:12: hyena_x: taps: not a positive whole number; is 0",
        ),
        (graft("\"attn\"", "\"all\"", "{ taps = 3 }"), "plan.toml:9:12: the operator has no kind"),
        (
            graft("\"attn\"", "\"all\"", "{ kind = \"mha\", heads = 3 }"),
            "plan.toml:9:12: mha: heads: does not divide the width",
        ),
        (
            graft("\"attn\"", "\"all\"", good) + &graft("\"attn\"", "[2]", good),
            "plan.toml:12:11: two grafts claim attn of layer 2",
        ),
        (graft("\"attn\"", "3", good), "plan.toml:8:10: invalid type"),
        (
            graft("\"attn\"", "\"all\"", good) + "start = \"warm\"\n",
            "plan.toml:10:9: unknown variant `warm`; must be `random` or `teacher`",
        ),
        (
            graft("\"attn\"", "\"all\"", good) + "loss = \"l3\"\n",
            "plan.toml:10:8: unknown variant `l3`; must be one of `l1`, `l2`, `huber`",
        ),
        (
            "[[graft]]\nsite = \"block-pair\"\nlayers = \"auto:0.5\"\n".into(),
            "plan.toml:8:10: pairs of blocks are not chosen by what the base model does",
        ),
        (
            "[[graft]]\nsite = \"block-pair\"\nlayers = \"all\"\nstart = \"teacher\"\n".into(),
            "plan.toml:9:9: a pair of blocks starts as its blocks are",
        ),
        (graft("\"attn\"", "\"auto:2\"", good), "plan.toml:8:10: not a number of layers; is \"auto:2\""),
        (graft("\"attn\"", "\"all\"", good) + "[select]\nsteps = 0\n", "plan.toml:10:1: select: steps: nothing to do"),
        (String::new(), "the plan grafts nothing"),
        (
            graft("\"attn\"", "\"all\"", good) + "[distill]\nstep = 3\n",
            "plan.toml:11:1: unknown field `step`; must be one of `steps`",
        ),
        (
            graft("\"attn\"", "\"all\"", good) + "[finetune]\nbatch = 0\n",
            "plan.toml:10:1: finetune: batch: nothing to do",
        ),
        (
            graft("\"attn\"", "\"all\"", good) + "[distill]\noptimizer = { rate = 3 }\n",
            "plan.toml:11:13: unknown field `rate`",
        ),
    ];
    for (text, expected) in rows {
        let found = message(&text);
        assert!(found.contains(expected), "{found}\n  should hold: {expected}");
    }
}

#[test]
fn pairs_are_counted_apart_and_stand_behind_their_blocks() {
    let text =
        graft("\"attn\"", "[1, 2]", "{ kind = \"hyena_x\" }") + "[[graft]]\nsite = \"block-pair\"\nlayers = \"all\"\n";
    let found = plan(&text).unwrap().resolve(&DitConfig::plain(5, 8, 2)).unwrap();
    let names: Vec<String> = found.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["blocks.1.attn", "pairs.0", "blocks.2.attn", "pairs.1"]);
    assert!(found[3].owns("blocks.2.attn.qkv.bias") && found[3].owns("blocks.3.adaLN_modulation.1.bias"));
    assert!(found[3].owns("pairs.1.merge.weight") && !found[3].owns("blocks.20.attn.qkv.bias"));
    assert!(!found[3].owns("pairs.11.merge.weight") && !found[2].owns("blocks.2.mlp.fc1.bias"));
    let parallel = DitConfig { pairs: vec![1], ..DitConfig::plain(5, 8, 2) };
    let error = plan(&text).unwrap().resolve(&parallel).unwrap_err().to_string();
    assert!(error.contains("pair 1 of the base runs in parallel already"), "{error}");
}

#[test]
fn identity_leaves_out_what_does_not_change_the_result() {
    let of = |rest: &str| plan(&(graft("\"attn\"", "\"all\"", "{ kind = \"hyena_x\" }") + rest)).unwrap().identity();
    assert_eq!(of("[distill]\nsteps = 9\n"), of("[eval]\nsamples = 5\n[distill]\nsteps = 9\ncheckpoint_every = 2\n"));
    assert_ne!(of("[distill]\nsteps = 9\n"), of("[distill]\nsteps = 8\n"));
    // Only measured layers depend on how they are measured.
    assert_eq!(of("[select]\nsteps = 9\n"), of(""));
    let local = |rest: &str| {
        let text = graft("\"attn\"", "\"top-local:2\"", "{ kind = \"hyena_x\" }") + rest;
        plan(&text).unwrap().identity()
    };
    assert_ne!(local("[select]\nsteps = 9\n"), local(""));
    assert_eq!(local("[select]\nsteps = 10\n"), local(""));
}

#[test]
fn identity_does_not_ask_whether_a_default_was_written() {
    let of = |text: String| plan(&text).unwrap().identity();
    let short = graft("\"attn\"", "\"all\"", "{ kind = \"hyena_x\" }");
    let long = graft("\"attn\"", "\"all\"", "{ kind = \"hyena_x\", taps = 4 }");
    assert_eq!(of(short.clone()), of(long.clone() + "start = \"random\"\nloss = \"l1\"\n"));
    for other in ["start = \"teacher\"\n", "loss = \"l2\"\n", "loss = \"huber\"\n"] {
        assert_ne!(of(short.clone()), of(short.clone() + other));
    }
}

#[test]
fn layers_that_the_model_decides_ask_for_it() {
    let text = graft("\"attn\"", "\"top-local:2\"", "{ kind = \"hyena_x\" }");
    let mut plan = plan(&text).unwrap();
    assert!(plan.needs_choice());
    let message = plan.resolve(&DitConfig::plain(4, 8, 2)).unwrap_err().to_string();
    assert!(message.starts_with("plan.toml:8:10: these layers are decided by"), "{message}");
    plan.grafts[0].chosen = Some(vec![0, 3]);
    let found = plan.resolve(&DitConfig::plain(4, 8, 2)).unwrap();
    assert_eq!(found.iter().map(|a| a.block).collect::<Vec<_>>(), [0, 3]);
    assert!(!plan.needs_choice());
}
