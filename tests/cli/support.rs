//! Running the program, and a small model to run it on.

use crate::scratch::Scratch;
use graft_engine::backend::Device;
use graft_engine::models::dit::{self, Dit, DitConfig, SaveAs};
use graft_kernels::rng::Philox;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What a run of the program gave.
pub struct Ran {
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Ran {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// The program with arguments, in a folder.
pub fn command<S: AsRef<std::ffi::OsStr>>(folder: &Path, args: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_graft"));
    command.args(args).current_dir(folder);
    command
}

fn ran(output: Output) -> Ran {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!stderr.contains("panicked"), "{stderr}");
    Ran { code: output.status.code().unwrap_or(-1), stdout: output.stdout, stderr }
}

/// Runs the program.
pub fn run<S: AsRef<std::ffi::OsStr>>(folder: &Path, args: &[S]) -> Ran {
    ran(command(folder, args).output().unwrap())
}

/// Runs the program, which must succeed.
#[track_caller]
pub fn succeed(folder: &Path, args: &[&str]) -> Ran {
    let ran = run(folder, args);
    assert_eq!(ran.code, 0, "graft {}: {}", args.join(" "), ran.stderr);
    ran
}

/// Runs the program, which must fail with this code and one line that has all of these words.
#[track_caller]
pub fn refuse(folder: &Path, args: &[&str], code: i32, words: &[&str]) {
    let ran = run(folder, args);
    let shown = format!("graft {}: code {}, {}", args.join(" "), ran.code, ran.stderr);
    assert_eq!(ran.code, code, "{shown}");
    let message = ran.stderr.lines().filter(|l| l.starts_with("graft: ")).collect::<Vec<_>>();
    assert_eq!(message.len(), 1, "{shown}");
    for word in words {
        assert!(message[0].contains(word), "{word:?} is not in: {shown}");
    }
}

/// A fresh, empty folder.
pub fn folder(name: &str) -> Scratch {
    Scratch::new(&format!("cli-{name}"))
}

/// A path inside the recorded cases.
pub fn golden(relative: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(relative).display().to_string()
}

/// Writes a random model that works on pixels (8 x 8, grey) or on latents (4 channels) to `folder/model`.
pub fn model(folder: &Path, channels: usize) -> PathBuf {
    let config = DitConfig { patch: 2, input_size: 8, in_channels: channels, classes: 3, ..DitConfig::plain(2, 32, 4) };
    let mut model = Dit::new(config, &Device::cpu(), 7).unwrap();
    let ids: Vec<_> = model.params.iter().filter(|(_, p)| p.trainable).map(|(id, _)| id).collect();
    for id in ids {
        let mut value = model.params.get(id).value.copy().unwrap();
        Philox::new(3, 1000 + id.index() as u64).fill_normal(value.f32s_mut().unwrap());
        value.f32s_mut().unwrap().iter_mut().for_each(|v| *v *= 0.1);
        model.params.set(id, value).unwrap();
    }
    let path = folder.join("model");
    let names = r#"["ankle boot","bag","coat"]"#.to_string();
    dit::save(&model, &path, SaveAs::F32, &BTreeMap::from([("graft.class_names".to_string(), names)])).unwrap();
    path
}

/// Names of the entries of a folder.
pub fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
