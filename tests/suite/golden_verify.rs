//! Every recorded case passes, in f32 and, where it has a tolerance for it, in bf16.

use graft_engine::autograd::Precision;
use graft_engine::verify;
use std::path::Path;

fn all_pass(precision: Precision) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let outcomes = verify::run(&[folder], precision, &mut |_| {}).unwrap();
    // Losing cases must not go unnoticed.
    assert!(outcomes.len() >= 89, "{} cases", outcomes.len());
    for outcome in &outcomes {
        if let Some(why) = outcome.skipped() {
            // The one network whose weights are no part of the repository.
            assert_eq!(outcome.name, "metrics/inception_features");
            eprintln!("skipped: {}: {why}", outcome.name);
            continue;
        }
        assert!(outcome.passed(), "{}: {:#?}", outcome.name, outcome.rows);
    }
}

#[test]
fn in_f32() {
    all_pass(Precision::F32);
}

#[test]
fn in_bf16() {
    all_pass(Precision::Bf16);
}
