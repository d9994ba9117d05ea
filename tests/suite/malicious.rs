//! Checkpoints that mean harm, written byte by byte: each is refused with the right message, and none is executed.

use crate::torch_file::{Entry, entry, text, zip};
use graft_engine::io::torch_zip::TorchFile;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A checkpoint of this pickle with one storage of four floats.
fn with_pickle(pickle: &[u8]) -> Vec<u8> {
    zip(&[entry("a/data.pkl", pickle), entry("a/byteorder", b"little"), entry("a/data/0", &[0; 16])])
}

/// `{"w": tensor}` with these opcodes for persistent id and for offset, shape and strides.
fn tensor(storage: &[u8], geometry: &[u8]) -> Vec<u8> {
    let parts = [
        b"\x80\x02}".to_vec(),
        text("w"),
        b"ctorch._utils\n_rebuild_tensor_v2\n(".to_vec(),
        storage.to_vec(),
        geometry.to_vec(),
        b"\x89}tRs.".to_vec(),
    ];
    parts.concat()
}

/// The persistent id of four floats in storage `key`.
fn storage(key: &str, class: &str, len: &[u8]) -> Vec<u8> {
    let class = format!("ctorch\n{class}\n").into_bytes();
    [b"(".to_vec(), text("storage"), class, text(key), text("cpu"), len.to_vec(), b"tQ".to_vec()].concat()
}

/// Offset 0, shape (4,), stride (1,).
const FOUR: &[u8] = b"K\0K\x04\x85K\x01\x85";

fn good() -> Vec<u8> {
    tensor(&storage("0", "FloatStorage", b"K\x04"), FOUR)
}

/// What reading a file to the last tensor says, and in what time.
#[track_caller]
fn refused(bytes: &[u8], words: &str) {
    let start = Instant::now();
    let result = TorchFile::parse("file.pt", bytes).and_then(|file| {
        let weights = file.state_dict()?;
        weights.values().try_for_each(|tensor| tensor.to_f32().map(|_| ()))
    });
    let error = result.expect_err("must be refused").to_string();
    assert!(error.contains(words), "{error}\n  must hold: {words}");
    assert!(error.contains("file.pt"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(60), "{words}: {:?}", start.elapsed());
}

fn marker() -> PathBuf {
    std::env::temp_dir().join(format!("graft-marker-{}", std::process::id()))
}

#[test]
fn the_hand_made_file_is_good_where_nothing_is_wrong() {
    let bytes = with_pickle(&good());
    let file = TorchFile::parse("file.pt", &bytes[..]).unwrap();
    assert_eq!(file.state_dict().unwrap()["w"].to_f32().unwrap(), [0.0; 4]);
}

#[test]
fn code_is_named_and_never_run() {
    let command = format!("touch {}", marker().display());
    let call = |module: &str, name: &str| {
        let global = format!("c{module}\n{name}\n").into_bytes();
        [b"\x80\x02".to_vec(), global, text(&command), b"\x85R.".to_vec()].concat()
    };
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "Popen"),
        ("builtins", "exec"),
        ("__builtin__", "eval"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("copyreg", "_reconstructor"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("collections", "OrderedDict.__init__"),
    ] {
        refused(&with_pickle(&call(module, name)), &format!("forbidden pickle global {module}.{name}"));
    }
    // The other ways to name or build something.
    let command = text(&command);
    let stack_global = [&b"\x80\x04"[..], &text("os"), &text("system"), b"\x93", &command, b"\x85R."].concat();
    refused(&with_pickle(&stack_global), "forbidden pickle global os.system");
    for (opcode, pickle) in [
        ("0x69", [&b"\x80\x02("[..], &command, b"ios\nsystem\n."].concat()),
        ("0x6f", [&b"\x80\x02(cargparse\nNamespace\n"[..], &command, b"o."].concat()),
        ("0x92", [&b"\x80\x04cargparse\nNamespace\n)}\x92."[..]].concat()),
        ("0x82", b"\x80\x02\x82\x01.".to_vec()),
        ("0x83", b"\x80\x02\x83\x01\0.".to_vec()),
        ("0x84", b"\x80\x02\x84\x01\0\0\0.".to_vec()),
        ("0x50", b"Pos.system\n.".to_vec()),
        ("0x53", b"S'os.system'\n.".to_vec()),
        ("0x97", b"\x80\x05\x97.".to_vec()),
    ] {
        refused(&with_pickle(&pickle), &format!("unsupported pickle opcode; is {opcode}"));
    }
    // Known names called in unknown ways, and attributes for what has none.
    for pickle in [
        &b"\x80\x02cargparse\nNamespace\nK\x01\x85R."[..],
        b"\x80\x02ctorch\nFloatStorage\nK\x04\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02K\x01)R.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01R.",
        b"\x80\x02ccollections\nOrderedDict\n}b.",
        b"\x80\x02cargparse\nNamespace\n)\x81K\x01b.",
        b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0zlib\x86R.",
    ] {
        refused(&with_pickle(pickle), "damaged pickle");
    }
    assert!(!marker().exists());
}

#[test]
fn persistent_ids_must_be_storages() {
    let four: &[u8] = b"K\x04";
    for id in [
        b"Nq\0Q".to_vec(),
        b"X\x01\0\0\x000Q".to_vec(),
        [b"(".to_vec(), text("storage"), b"ctorch\nFloatStorage\n".to_vec(), text("0"), b"tQ".to_vec()].concat(),
        [
            b"(".to_vec(),
            text("module"),
            b"ctorch\nFloatStorage\n".to_vec(),
            text("0"),
            text("cpu"),
            b"K\x04tQ".to_vec(),
        ]
        .concat(),
        storage("0", "Size", four),
        storage("0", "FloatStorage", b"J\xff\xff\xff\xff"),
        storage("0", "FloatStorage", b"G\x40\x10\0\0\0\0\0\0"),
        storage("0", "FloatStorage", &[&b"\x8a\x09"[..], &[0; 8], b"\x01"].concat()),
    ] {
        refused(&with_pickle(&tensor(&id, FOUR)), "a persistent id that is not a storage");
    }
    refused(&with_pickle(&tensor(&storage("0", "UntypedStorage", four), FOUR)), "forbidden pickle global");
    // A name that looks like a path is only ever looked up in the archive.
    for key in ["../data.pkl", "/etc/passwd", "..\\..\\x", "0\0", ""] {
        refused(&with_pickle(&tensor(&storage(key, "FloatStorage", four), FOUR)), "missing zip entry");
    }
}

#[test]
fn sizes_are_believed_only_as_far_as_there_are_bytes() {
    let at = |geometry: &[u8]| with_pickle(&tensor(&storage("0", "FloatStorage", b"K\x04"), geometry));
    for geometry in [
        &b"K\x01K\x04\x85K\x01\x85"[..],
        b"K\0K\x04\x85K\x02\x85",
        b"K\0K\x04\x85)",
        b"K\0J\xff\xff\xff\xff\x85K\x01\x85",
        b"K\0J\xff\xff\xff\x7f\x85K\0\x85",
        b"J\xff\xff\xff\x7fK\x04\x85K\x01\x85",
        b"K\0\x8a\x08\0\0\0\0\0\0\0\x40\x8a\x08\0\0\0\0\0\0\0\x40\x86K\0K\0\x86",
        b"K\0\x8a\x09\0\0\0\0\0\0\0\0\x01\x85K\x01\x85",
        b"K\0X\x01\0\0\x004\x85K\x01\x85",
        b"K\0N\x85K\x01\x85",
    ] {
        refused(&at(geometry), "invalid tensor in pickle");
    }
    // More dimensions than any tensor has.
    let deep = [b"K\0(".to_vec(), b"K\x01".repeat(40), b"t(".to_vec(), b"K\x01".repeat(40), b"t".to_vec()].concat();
    refused(&at(&deep), "invalid tensor in pickle");
    // A storage that claims more, or less, than the archive has.
    for (class, len) in [("FloatStorage", &b"K\x05"[..]), ("FloatStorage", b"K\x08"), ("DoubleStorage", b"K\x04")] {
        refused(&with_pickle(&tensor(&storage("0", class, len), FOUR)), "size does not match shape and dtype");
    }
    let huge = storage("0", "FloatStorage", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f");
    refused(&with_pickle(&tensor(&huge, FOUR)), "size does not match shape and dtype");
}

#[test]
fn bombs_cost_neither_memory_nor_time() {
    // A list in a list in a list …, two million deep, and pairs of pairs that stand for 2^60 objects: nothing is ever
    // unfolded, so both are read, and hold no tensors.
    let deep = [b"\x80\x02".to_vec(), b"]".repeat(1_000_000), b"a".repeat(999_999), b".".to_vec()].concat();
    refused(&with_pickle(&deep), "no tensors in the checkpoint");
    let doubled = [b"\x80\x02Nq\0".to_vec(), b"h\0h\0\x86q\0".repeat(60), b".".to_vec()].concat();
    refused(&with_pickle(&doubled), "no tensors in the checkpoint");
    // Marks, objects, memo entries, and one tensor over and over.
    let many = |pattern: &[u8]| [b"\x80\x02", &pattern.repeat(5_000_000)[..], b"."].concat();
    refused(&with_pickle(&many(b"(")), "pickle too large");
    refused(&with_pickle(&many(b")")), "pickle too large");
    refused(&with_pickle(&[&b"\x80\x02N"[..], &b"\x94".repeat(5_000_000), b"."].concat()), "pickle too large");
    let id = storage("0", "FloatStorage", b"K\x04");
    let call = [&b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\0("[..], &id, FOUR, b"\x89NtQ"].concat();
    let call = [&call[..call.len() - 1], b"q\x01"].concat();
    refused(&with_pickle(&[&call[..], &b"h\0h\x01R0".repeat(1_000_000), b"."].concat()), "pickle too large");
    // A namespace whose attributes are its own items, doubled with each step.
    let twice = [&b"\x80\x02cargparse\nNamespace\n)\x81}K\x01K\x02sbq\0"[..], &b"h\0b".repeat(64), b"."].concat();
    refused(&with_pickle(&twice), "pickle too large");
    // Lengths without bytes behind them.
    for opcode in [&b"X"[..], b"T", b"B", b"\x8b"] {
        refused(&with_pickle(&[b"\x80\x02", opcode, b"\xff\xff\xff\xff."].concat()), "cut off");
    }
    for opcode in [&b"\x8d"[..], b"\x8e", b"\x96"] {
        refused(&with_pickle(&[b"\x80\x04", opcode, &[0xff; 8], b"."].concat()), "cut off");
    }
    refused(&with_pickle(b"\x80\x02j\xff\xff\xff\xff."), "an empty memo slot");
    let whole = good();
    (0..whole.len()).for_each(|length| refused(&with_pickle(&whole[..length]), "damaged pickle"));
}

#[test]
fn archives_that_lie() {
    let (pickle, order, data): (Entry<'static>, Entry<'static>, Entry<'static>) =
        (entry("a/data.pkl", &good()), entry("a/byteorder", b"little"), entry("a/data/0", &[0; 16]));
    let with = |changed: Entry<'static>| {
        let entries = [pickle.clone(), order.clone(), data.clone()];
        zip(&entries.map(|e| if e.name == changed.name { changed.clone() } else { e }))
    };
    // Compressed entries are not unpacked, whatever they would become.
    refused(&with(Entry { method: 8, ..pickle.clone() }), "compressed zip entry");
    refused(&with(Entry { method: 8, ..data.clone() }), "compressed zip entry");
    refused(&with(Entry { method: 99, ..data.clone() }), "zip");
    refused(&with(Entry { flags: 1, ..data.clone() }), "compressed zip entry; is encrypted");
    refused(&with(Entry { crc: Some(7), ..data.clone() }), "damaged zip entry");
    refused(&with(Entry { crc: Some(7), ..pickle.clone() }), "damaged zip entry");
    refused(&with(Entry { size: Some(u32::MAX - 1), ..data.clone() }), "damaged zip archive");
    refused(&with(Entry { size: Some(20), ..data.clone() }), "size does not match shape and dtype");
    // Of two entries of one name, programs disagree on which one counts.
    let twice = [pickle.clone(), order.clone(), data.clone(), entry("a/data.pkl", b"\x80\x02}.")];
    refused(&zip(&twice), "damaged zip archive; is two entries of the same name");
    refused(&zip(&[pickle.clone(), data.clone(), entry("b/data.pkl", &good())]), "two data.pkl");
    let shared = Entry { at: Some(0), ..entry("a/data/1", &good()) };
    refused(&zip(&[pickle.clone(), data.clone(), shared]), "zip archive");
    // Cut off at every length, the file is never taken for a whole one.
    let whole = with_pickle(&good());
    for length in 0..whole.len() {
        let cut = TorchFile::parse("file.pt", &whole[..length]).and_then(|f| f.state_dict().map(|_| ()));
        assert!(cut.is_err(), "cut at {length}");
    }
    // Other kinds of file.
    refused(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "legacy torch checkpoint");
    refused(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "not a torch checkpoint; is a pointer of Git LFS",
    );
    refused(b"<!doctype html>", "not a torch checkpoint");
    refused(&zip(&[entry("a/data.pkl", &good()), entry("a/byteorder", b"big"), data.clone()]), "big-endian checkpoint");
    refused(&zip(&[entry("../../data.pkl", b"\x80\x02}.")]), "no tensors in the checkpoint");
    assert!(!marker().exists());
}
