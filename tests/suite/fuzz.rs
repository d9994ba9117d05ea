//! Mutational fuzzing of every reader of untrusted bytes: no input may panic, hang or ask for absurd memory.
//!
//! Each target runs for `GRAFT_FUZZ_SECONDS` (default 20) from the golden files. A failure prints the seed;
//! `GRAFT_FUZZ_SEED` starts there again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use graft_engine::io::safetensors::TensorFile;
use graft_engine::io::torch_zip::TorchFile;
use graft_engine::io::{archive, json, pickle, png};
use graft_tests::mutate::mutate;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

fn number_from_env(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}; must be a whole number")),
        Err(_) => default,
    }
}

/// All files below `dir` whose name ends in `ending`, small ones only: mutation should hit the structure.
fn corpus(dir: &Path, ending: &str) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        for path in paths {
            if path.is_dir() {
                folders.push(path);
            } else if path.to_string_lossy().ends_with(ending) {
                found.push(std::fs::read(&path).unwrap());
            }
        }
    }
    found.retain(|bytes| bytes.len() <= 300_000);
    assert!(!found.is_empty(), "no *{ending} below {}", dir.display());
    found
}

/// Runs `target` on mutated inputs; `target` says whether it accepted the input.
fn fuzz(name: &str, corpus: &[Vec<u8>], target: impl Fn(&[u8]) -> bool) {
    for bytes in corpus {
        target(bytes);
    }
    let limit = Duration::from_secs(number_from_env("GRAFT_FUZZ_SECONDS", 20));
    let first = number_from_env("GRAFT_FUZZ_SEED", 1);
    let start = Instant::now();
    let (mut executed, mut accepted) = (0u64, 0u64);
    while executed == 0 || start.elapsed() < limit {
        let seed = first + executed;
        let input = mutate(corpus, seed);
        let one = Instant::now();
        match catch_unwind(AssertUnwindSafe(|| target(&input))) {
            Ok(ok) => accepted += u64::from(ok),
            Err(_) => {
                panic!("{name}: panicked on seed {seed} ({} bytes); GRAFT_FUZZ_SEED={seed} repeats it", input.len())
            }
        }
        assert!(one.elapsed() < Duration::from_secs(10), "{name}: seed {seed} took {:?}", one.elapsed());
        executed += 1;
    }
    println!("{name}: {executed} inputs executed, {accepted} accepted, none panicked");
}

#[test]
fn safetensors() {
    fuzz("safetensors", &corpus(&golden().join("safetensors_bad"), ".safetensors"), |bytes| {
        let Ok(file) = TensorFile::parse("fuzz", bytes) else { return false };
        for view in file.iter() {
            // Decoding may refuse the dtype but must not panic either.
            let _ = (view.to_f32(), view.to_i64());
        }
        true
    });
}

#[test]
fn json_config() {
    fuzz("json config", &corpus(&golden(), ".json"), |bytes| json::parse("fuzz", "config.json", bytes).is_ok());
}

#[test]
fn unpickler() {
    let checkpoints = corpus(&golden().join("dit_original"), ".pt");
    let read_pickle = |zip: &Vec<u8>| {
        let zip = archive::StoredZip::parse("golden", &zip[..]).unwrap();
        let name = zip.names().find(|name| name.ends_with("data.pkl")).unwrap().to_owned();
        zip.get(&name).unwrap().to_vec()
    };
    let mut pickles: Vec<_> = checkpoints.iter().map(read_pickle).collect();
    // A namespace, protocol 4 framing, a list, text, a long integer, bytes the old way.
    pickles.push(b"\x80\x02cargparse\nNamespace\n)\x81}X\x02\0\0\0lrG\x3f\xf8\0\0\0\0\0\0sb.".to_vec());
    pickles.push(b"\x80\x04\x95\x15\0\0\0\0\0\0\0}\x94(\x8c\x01a\x94]\x94(K\x01M\x02\x03eu.".to_vec());
    pickles.push(b"\x80\x02c_codecs\nencode\nX\x02\0\0\0abX\x06\0\0\0latin1\x86R\x8a\x03\x01\x02\x03\x86.".to_vec());
    fuzz("unpickler", &pickles, |bytes| pickle::parse("fuzz", bytes).is_ok());
}

#[test]
fn torch_archive() {
    fuzz("torch archive", &corpus(&golden().join("dit_original"), ".pt"), |bytes| {
        let Ok(file) = TorchFile::parse("fuzz", bytes) else { return false };
        let Ok(weights) = file.state_dict() else { return false };
        weights.values().filter(|tensor| tensor.to_f32().is_ok()).count() == weights.len()
    });
}

#[test]
fn png_picture() {
    let picture = png::Image::new(16, 16, 3, (0..768).map(|i| i as u8).collect()).unwrap();
    let metadata = |text: &str| [(png::RECORD_KEY.to_owned(), text.to_owned())].into();
    let corpus: Vec<_> =
        ["{}", "{\"prompt\": \"🦊\"}"].map(|text| png::encode(&picture, &metadata(text)).unwrap()).into();
    fuzz("png", &corpus, |bytes| png::decode("fuzz", bytes).is_ok());
}

#[test]
fn a_panic_fails_with_its_seed() {
    let original = b"unharmed".to_vec();
    let control = || {
        fuzz("control", std::slice::from_ref(&original), |bytes| {
            assert_eq!(bytes, b"unharmed");
            true
        });
    };
    let failure = catch_unwind(control).expect_err("the harness must notice a panic");
    let message = failure.downcast_ref::<String>().expect("a formatted message");
    assert!(message.contains("GRAFT_FUZZ_SEED="), "{message}");
}

#[test]
fn equal_seeds_give_equal_inputs_and_most_seeds_differ() {
    let corpus = [b"{\"a\": [1, 2, 3]}".to_vec(), vec![]];
    let inputs: std::collections::HashSet<_> = (0..1000).map(|seed| mutate(&corpus, seed)).collect();
    assert!((0..1000).all(|seed| inputs.contains(&mutate(&corpus, seed))));
    assert!(inputs.len() > 500, "{}", inputs.len());
}
