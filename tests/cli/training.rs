//! Runs from the outside: killed at any moment, out of disk space, in parts, and within the memory that was planned.

use crate::support::{command, entries, folder, refuse, run, succeed};
use graft_engine::backend::Device;
use graft_engine::io::safetensors::TensorFile;
use graft_engine::models::dit::{self, Dit, DitConfig, SaveAs};
use graft_kernels::rng::Philox;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Images of noise in the files of MNIST.
fn images(folder: &Path, train: usize, test: usize) {
    std::fs::create_dir_all(folder).unwrap();
    for (stem, n) in [("train", train), ("t10k", test)] {
        let mut rng = Philox::new(n as u64, 0);
        let count = (n as u32).to_be_bytes();
        let mut pixels = [&[0, 0, 8, 3], &count[..], &28u32.to_be_bytes(), &28u32.to_be_bytes()].concat();
        pixels.extend((0..n * 784).map(|i| (rng.below(100) + 5 * (i as u32 % 28)) as u8));
        let labels = (0..n).map(|i| (i % 10) as u8);
        let labels: Vec<u8> = [0, 0, 8, 1].into_iter().chain(count).chain(labels).collect();
        std::fs::write(folder.join(format!("{stem}-images-idx3-ubyte")), pixels).unwrap();
        std::fs::write(folder.join(format!("{stem}-labels-idx1-ubyte")), labels).unwrap();
    }
}

/// A model of grey images of 28 x 28 in which every branch matters.
fn base(folder: &Path, patch: usize, sizes: DitConfig) {
    let config = DitConfig { patch, input_size: 28, in_channels: 1, classes: 10, ..sizes };
    let mut model = Dit::new(config, &Device::cpu(), 7).unwrap();
    let ids: Vec<_> = model.params.iter().filter(|(_, p)| p.trainable).map(|(id, _)| id).collect();
    for id in ids {
        let mut value = model.params.get(id).value.copy().unwrap();
        let mut rng = Philox::new(3, 1000 + id.index() as u64);
        value.f32s_mut().unwrap().iter_mut().for_each(|v| *v += 0.05 * rng.uniform());
        model.params.set(id, value).unwrap();
    }
    dit::save(&model, folder, SaveAs::F32, &BTreeMap::new()).unwrap();
}

/// A plan for half of the attention of `here/base`.
fn plan(here: &Path, distill: &str, finetune: &str) {
    let text = format!(
        "[base]\nmodel = \"base\"\n[[graft]]\nsite = \"attn\"\nlayers = \"every-other\"\n\
         operator = {{ kind = \"hyena_x\" }}\n[data]\nkind = \"mnist\"\ndir = \"data\"\n\
         [distill]\nbatch = 8\nheld_out = 1\n{distill}\n[finetune]\nbatch = 8\n{finetune}\n\
         [eval]\nsteps = 1\nsampler = \"ddim\"\npicture_guidance = 1.0\n"
    );
    std::fs::write(here.join("plan.toml"), text).unwrap();
}

fn tiny(name: &str, distill: &str, finetune: &str) -> crate::scratch::Scratch {
    let here = folder(name);
    images(&here.join("data"), 48, 24);
    base(&here.join("base"), 7, DitConfig::plain(4, 16, 2));
    plan(&here, distill, finetune);
    here
}

fn start(here: &Path, args: &[&str]) -> Child {
    command(here, args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Every file below a folder, by its path in it.
fn files(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(root).unwrap().display().to_string();
                // A file may go between the listing and the reading.
                found.insert(name, std::fs::read(path).unwrap_or_default());
            }
        }
    }
    found
}

fn half_written(root: &Path) -> bool {
    ["distill", "finetune", "random", "stage1", "stage2", "."].iter().any(|sub| {
        let Ok(list) = std::fs::read_dir(root.join(sub)) else { return false };
        list.flatten().any(|e| {
            let name = e.file_name();
            let name = name.to_string_lossy();
            name.starts_with('.') && name.ends_with(".tmp") && !name.contains("probe")
        })
    })
}

/// A value without what depends on the clock.
fn timeless(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|key, _| !key.contains("second"));
            fields.values_mut().for_each(timeless);
        }
        Value::Array(items) => items.iter_mut().for_each(timeless),
        _ => {}
    }
}

/// The files of a finished run as they must be whatever happened on the way.
fn outcome(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = files(root);
    // The page shows times.
    assert!(found.remove("report.html").is_some_and(|page| !page.is_empty()));
    found.retain(|name, _| !name.ends_with(".lock"));
    for (name, bytes) in &mut found {
        assert!(!name.ends_with(".tmp"), "{name} was left");
        if name.ends_with(".jsonl") || name == "summary.json" {
            let parts: Vec<&[u8]> = match name.as_str() {
                "summary.json" => vec![&bytes[..]],
                _ => bytes.split_inclusive(|&b| b == b'\n').collect(),
            };
            let mut values: Vec<Value> = parts.iter().map(|part| serde_json::from_slice(part).unwrap()).collect();
            values.iter_mut().for_each(timeless);
            *bytes = values.iter().map(Value::to_string).collect::<Vec<_>>().join("\n").into_bytes();
        }
    }
    found
}

/// Kills that are wanted in each stage, and while something is being written.
const KILLS: usize = 12;

#[test]
fn killed_at_any_moment_a_run_ends_in_the_same_bytes() {
    let settings = "steps = 18\ncheckpoint_every = 2";
    let here = tiny("kills", &format!("{settings}\nheld_out_every = 5"), settings);
    let began = Instant::now();
    succeed(&here, &["run", "plan.toml", "--run", "whole"]);
    let usual = began.elapsed();
    let whole = outcome(&here.join("whole"));
    assert!(whole.len() > 12 && whole.contains_key("stage2/config.json"), "{:?}", whole.keys());
    let mut rng = Philox::new(20, 0);
    let (mut kills, mut writing, mut starts) = ([0usize; 2], 0, 0);
    for round in 0.. {
        let name = format!("run-{round}");
        let dir = here.join(&name);
        loop {
            starts += 1;
            assert!(starts < 400, "{kills:?} {writing}");
            let mut child = start(&here, &["run", "plan.toml", "--run", &name]);
            let patience = usual.mul_f64(0.9 * f64::from(rng.uniform()));
            // Every second kill waits for a file that is being written.
            let watch = starts % 2 == 0;
            let began = Instant::now();
            let status = loop {
                let status = child.try_wait().unwrap();
                let due = began.elapsed() > patience && (!watch || half_written(&dir));
                if status.is_some() || due {
                    break status;
                }
                std::thread::sleep(Duration::from_micros(200));
            };
            if let Some(status) = status {
                assert!(status.success(), "round {round}");
                break;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            kills[usize::from(dir.join("finetune").exists())] += 1;
            writing += usize::from(half_written(&dir));
        }
        let found = outcome(&dir);
        assert_eq!(found.keys().collect::<Vec<_>>(), whole.keys().collect::<Vec<_>>(), "round {round}");
        for (file, bytes) in &found {
            assert!(*bytes == whole[file], "round {round}: {file} differs");
        }
        std::fs::remove_dir_all(&dir).unwrap();
        if kills.iter().all(|&n| n >= KILLS) && writing >= KILLS / 2 {
            break;
        }
    }
    println!("{} kills in stage 1, {} in stage 2, {writing} while writing, {starts} starts", kills[0], kills[1]);
}

#[test]
#[cfg(unix)]
fn a_full_disk_ends_a_run_with_one_line_and_nothing_is_lost() {
    let settings = "steps = 8\ncheckpoint_every = 2";
    let here = tiny("full", settings, settings);
    succeed(&here, &["run", "plan.toml", "--run", "whole"]);
    let whole = outcome(&here.join("whole"));
    let run_args = ["run", "plan.toml", "--run", "run"];
    // The shell limits files to a few KiB: less than a checkpoint, more than a log.
    let limited = || {
        let program = env!("CARGO_BIN_EXE_graft");
        let script = format!("trap '' XFSZ; ulimit -f 4; exec {program} {}", run_args.join(" "));
        let ran = Command::new("sh").args(["-c", &script]).current_dir(&here).output().unwrap();
        (ran.status.code(), String::from_utf8_lossy(&ran.stderr).into_owned())
    };
    for (stage, stop) in [("distill", "3"), ("finetune", "8")] {
        succeed(&here, &[&run_args[..], &["--stop-after", stop]].concat());
        let checkpoint = here.join("run").join(stage).join("checkpoint.safetensors");
        let before = std::fs::read(&checkpoint).unwrap();
        let (code, stderr) = limited();
        let message = format!("graft: run/{stage}/checkpoint.safetensors: cannot write");
        assert!(
            code == Some(1) && stderr.contains(&message) && stderr.contains("free disk space"),
            "{code:?} {stderr}"
        );
        assert!(std::fs::read(&checkpoint).unwrap() == before && !half_written(&here.join("run")));
    }
    succeed(&here, &run_args);
    assert!(outcome(&here.join("run")) == whole);
    // A log on a disk without space.
    for stage in ["distill", "finetune"] {
        let name = format!("log-{stage}");
        if stage == "finetune" {
            succeed(&here, &["distill", "plan.toml", "--run", &name]);
        }
        std::fs::create_dir_all(here.join(&name).join(stage)).unwrap();
        let log = here.join(&name).join(stage).join("loss.jsonl");
        std::os::unix::fs::symlink("/dev/full", &log).unwrap();
        let words = [&format!("{stage}/loss.jsonl: cannot append to")[..], "free disk space"];
        refuse(&here, &["run", "plan.toml", "--run", &name], 1, &words);
        std::fs::remove_file(&log).unwrap();
        succeed(&here, &["run", "plan.toml", "--run", &name]);
        assert!(outcome(&here.join(&name)) == whole, "{name}");
    }
}

#[test]
fn stage_1_in_parts_and_two_processes_on_one_folder() {
    let here = tiny("parts", "steps = 6\ncheckpoint_every = 2", "steps = 2");
    succeed(&here, &["run", "plan.toml", "--run", "whole"]);
    let distill = |more: &[&'static str]| [&["distill", "plan.toml", "--run", "run"], more].concat();
    // Both at once.
    let mut children = ["0/2", "1/2"].map(|part| start(&here, &distill(&["--sites", part])));
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    assert!(entries(&here.join("run/distill")).iter().any(|name| name == "part-1-of-2"));
    succeed(&here, &distill(&["--sites", "merge"]));
    for file in [
        "random/diffusion_pytorch_model.safetensors",
        "stage1/diffusion_pytorch_model.safetensors",
        "distill/checkpoint.safetensors",
    ] {
        assert!(
            std::fs::read(here.join("whole").join(file)).unwrap()
                == std::fs::read(here.join("run").join(file)).unwrap(),
            "{file}"
        );
    }
    refuse(&here, &distill(&["--sites", "2/2"]), 2, &["--sites: no such part", "\"2/2\"", "i/n"]);
    refuse(&here, &distill(&["--sites", "0/2"]), 2, &["stage 1 of this run is not split"]);
    refuse(
        &here,
        &["distill", "plan.toml", "--run", "many", "--sites", "0/3"],
        2,
        &["more parts than sites", "at most 2"],
    );
    let lock = graft_engine::io::atomic::RunLock::acquire(&here.join("run")).unwrap();
    for args in
        [&["run", "plan.toml", "--run", "run"][..], &["finetune", "--run", "run"], &distill(&["--sites", "0/2"])]
    {
        refuse(&here, args, 1, &["run: run folder is in use", &std::process::id().to_string()]);
    }
    drop(lock);
    let ran = run(&here, &["run", "plan.toml", "--run", "run"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let stage2 = |run: &str| std::fs::read(here.join(run).join("stage2/diffusion_pytorch_model.safetensors")).unwrap();
    assert!(stage2("run") == stage2("whole"));
}

/// Planned and real peak of a stage in MiB: the first number of the line that it prints, and what the system saw.
#[cfg(target_os = "linux")]
fn planned_and_peak(here: &Path, args: &[&str], stage: usize) -> (f64, f64, String) {
    let errors = here.join("stderr");
    let mut child =
        command(here, args).stdout(Stdio::null()).stderr(std::fs::File::create(&errors).unwrap()).spawn().unwrap();
    let mut peak = 0.0f64;
    let status = loop {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<f64>().ok());
        peak = peak.max(kib.unwrap_or(0.0) / 1024.0);
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let text = std::fs::read_to_string(&errors).unwrap();
    assert!(status.success(), "{text}");
    let line = text.lines().find(|l| l.starts_with(&format!("memory of stage {stage}: "))).unwrap().to_string();
    let planned = line.split(' ').nth(4).unwrap().parse().unwrap();
    (planned, peak, line)
}

#[cfg(target_os = "linux")]
fn hold_to_the_plan(here: &Path) {
    let checked = succeed(here, &["plan", "check", "plan.toml", "--memory"]).text();
    for (stage, args) in [(1, &["distill", "plan.toml", "--run", "run"][..]), (2, &["finetune", "--run", "run"])] {
        let (planned, peak, line) = planned_and_peak(here, args, stage);
        println!("{line}; the process took {peak:.1} MiB");
        assert!((peak - planned).abs() <= 0.1 * planned, "{line}; the process took {peak:.1} MiB");
        let said = checked.lines().find(|l| l.starts_with(&format!("memory of stage {stage}: "))).unwrap();
        let said: f64 = said.split(' ').nth(4).unwrap().parse().unwrap();
        assert!((said - planned).abs() <= 0.02 * planned, "{checked} against {line}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn memory_of_the_demonstration_is_as_planned() {
    let here = folder("memory-demo");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut plan: toml::Table =
        std::fs::read_to_string(root.join("assets/fashion-dit/demo.toml")).unwrap().parse().unwrap();
    for (section, key, value) in [
        ("base", "model", toml::Value::from(root.join("assets/fashion-dit/model").display().to_string())),
        ("data", "dir", root.join("assets/fashion-mnist").display().to_string().into()),
        ("distill", "steps", 3.into()),
        ("distill", "held_out", 1.into()),
        ("finetune", "steps", 3.into()),
    ] {
        plan[section].as_table_mut().unwrap().insert(key.into(), value);
    }
    std::fs::write(here.join("plan.toml"), plan.to_string()).unwrap();
    hold_to_the_plan(&here);
}

#[test]
#[cfg(target_os = "linux")]
fn memory_of_a_model_of_the_size_of_dit_s_2_is_as_planned() {
    let here = folder("memory-s2");
    images(&here.join("data"), 16, 8);
    base(&here.join("base"), 2, DitConfig::plain(12, 384, 6));
    plan(&here, "steps = 2\nbatch = 4", "steps = 2\nbatch = 4");
    let text = std::fs::read_to_string(here.join("plan.toml")).unwrap().replace("batch = 8\n", "");
    std::fs::write(here.join("plan.toml"), text).unwrap();
    hold_to_the_plan(&here);
    let stage1 = TensorFile::open(&here.join("run/stage1/diffusion_pytorch_model.safetensors")).unwrap();
    assert!(stage1.names().len() > 100);
}
