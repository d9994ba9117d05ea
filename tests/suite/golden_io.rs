//! The golden verdicts on whole files: what the readers must accept, and the kind of message they must refuse with.

use std::path::{Path, PathBuf};

use graft_engine::io::torch_zip::TorchFile;
use graft_engine::io::{json, safetensors::TensorFile, weights::open_weights};

fn golden(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(relative)
}

/// Folder and configuration of every case of a family.
fn cases(family: &str) -> Vec<(PathBuf, serde_json::Value)> {
    let mut dirs: Vec<_> = std::fs::read_dir(golden(family)).unwrap().map(|entry| entry.unwrap().path()).collect();
    dirs.sort();
    let config = |dir: &Path| json::read(&dir.join("case.json")).unwrap()["config"].clone();
    dirs.into_iter().map(|dir| (dir.clone(), config(&dir))).collect()
}

/// The message must contain the case's kind and everything the case says it should mention.
fn assert_refused(dir: &Path, config: &serde_json::Value, error: &graft_engine::error::Error) {
    let kind = config["message_kind"].as_str().unwrap_or_else(|| panic!("{dir:?} must be accepted: {error}"));
    assert!(error.problem().contains(kind), "{dir:?}: {error}; must contain {kind}");
    for text in config["message_should_mention"].as_array().into_iter().flatten() {
        assert!(error.to_string().contains(text.as_str().unwrap()), "{dir:?}: {error}; must mention {text}");
    }
    assert_eq!(error.exit_code(), 1, "{dir:?}");
}

#[test]
fn containers() {
    let mut counts = (0, 0);
    for (dir, config) in cases("safetensors_bad").iter().filter(|(_, config)| config["level"] == "container") {
        match TensorFile::open(&dir.join("model/file.safetensors")) {
            Ok(file) => {
                assert_eq!(config["verdict"], "accept", "{dir:?}");
                assert!(file.iter().all(|view| view.to_f32().is_ok()), "{dir:?}");
                counts.0 += 1;
            }
            Err(error) => {
                assert_refused(dir, config, &error);
                counts.1 += 1;
            }
        }
    }
    assert_eq!(counts, (5, 19), "accepted and refused containers");
}

/// The refusals of model folders that need no knowledge of the model.
#[test]
fn folders() {
    let of_this_room = [
        "config.json missing",
        "config.json is not valid json",
        "weights missing",
        "shard file missing",
        "shard path leaves the folder",
    ];
    let mut refused = 0;
    for (dir, config) in cases("safetensors_bad").iter().filter(|(_, config)| config["level"] == "model") {
        let model = dir.join("model");
        let result = json::read(&model.join("config.json")).and_then(|_| open_weights(&model).map(|_| ()));
        let expected = config["message_kind"].as_str().is_some_and(|kind| of_this_room.contains(&kind));
        match result {
            Ok(()) => assert!(!expected, "{dir:?} must be refused"),
            Err(error) => {
                assert_refused(dir, config, &error);
                refused += 1;
            }
        }
    }
    assert_eq!(refused, of_this_room.len());
}

#[test]
fn checkpoint_with_code_is_refused_and_leaves_no_trace() {
    let dir = golden("dit_original/pickle_must_be_refused");
    let config = json::read(&dir.join("case.json")).unwrap()["config"].clone();
    assert_refused(&dir, &config, &TorchFile::open(&dir.join("model/checkpoint.pt")).unwrap_err());
    assert!(!Path::new(config["marker_that_must_not_appear"].as_str().unwrap()).exists());
}

/// The shapes of a checkpoint agree with the same network's safetensors file.
#[test]
fn checkpoint_gives_the_tensors_of_the_safetensors_layout() {
    let torch = TorchFile::open(&golden("dit_original/pickle_checkpoint/model/checkpoint.pt")).unwrap();
    let plain = open_weights(&golden("dit_original/forward_and_gradients/model")).unwrap();
    let state = torch.state_dict().unwrap();
    assert!(state.keys().copied().eq(plain.names()));
    for (name, tensor) in &state {
        let values = tensor.to_f32().unwrap();
        assert_eq!(values.len(), tensor.shape().iter().product::<usize>(), "{name}");
        assert!(values.iter().all(|value| value.is_finite()), "{name}");
    }
}
