//! Help, version, and how fast the program starts.

use crate::support::{folder, run, succeed};
use std::time::{Duration, Instant};

const COMMANDS: [&str; 11] =
    ["pretrain", "plan", "locality", "ablate", "sample", "synthesize", "forward", "inspect", "op", "doctor", "verify"];

#[test]
fn every_command_explains_itself() {
    let here = folder("help");
    let all = succeed(&here, &["--help"]).text();
    for command in COMMANDS {
        assert!(all.lines().any(|l| l.trim_start().starts_with(command)), "{command} is not in:\n{all}");
        let own = succeed(&here, &[command, "--help"]).text();
        assert!(own.contains("Usage: graft") && own.contains("--threads"), "{own}");
    }
    assert!(succeed(&here, &["--version"]).text().starts_with("graft "));
}

#[test]
fn wrong_usage_is_code_two() {
    let here = folder("usage");
    for args in [&[][..], &["dance"], &["sample", "--steps", "many"], &["verify"], &["sample", "--dtype", "f8"]] {
        let ran = run(&here, args);
        assert_eq!(ran.code, 2, "{args:?}: {}", ran.stderr);
    }
}

#[test]
fn it_starts_at_once() {
    let here = folder("start");
    let fastest = (0..5)
        .map(|_| {
            let start = Instant::now();
            succeed(&here, &["--help"]);
            start.elapsed()
        })
        .min()
        .unwrap();
    println!("graft --help: {fastest:?}");
    assert!(fastest < Duration::from_millis(200), "{fastest:?}");
}
