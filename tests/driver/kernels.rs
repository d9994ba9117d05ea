//! Kernels: where they come from, how they are launched, and what happens when one fails.

use super::Row;
use super::child::{axpy, floats, open, read, refused, text};
use super::lab::{Lab, Said, same};
use graft_engine::backend::cuda::{self, ARCHIVE};
use graft_engine::tensor::Gpu;
use graft_kernels::archive::{Key, digest, write};
use graft_kernels::launch::{Arg, ElementType, Kernel, Launch, Shape, TensorMap};
use graft_kernels::sources;
use graft_tools::codegen::{contracts, workspace_root};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

pub const ROWS: &[Row] = &[
    ("kernels are compiled once and then cached", cached),
    ("a damaged cache entry is compiled again", damaged),
    ("a cache that cannot be written", unwritable),
    ("compiled kernels beside the program", archive),
    ("clusters and tensor maps", |lab| lab.done("cluster", &[]).map(|_| ())),
    ("shared memory beyond 48 KiB", |lab| {
        let said = lab.done("shared", &[])?;
        same("times that the kernel is prepared", said.count("shared 61440"), 1)
    }),
    ("arguments that are not the kernel's", |lab| lab.done("arguments", &[]).map(|_| ())),
    ("a kernel that fails", |lab| lab.done("fault", &[]).map(|_| ())),
    ("other architectures", architectures),
    ("operators on the device", |lab| {
        // All of them with EMU_SOAK=1; the emulator's device runs all of them in every test.
        let said = lab.done("operators", &[])?;
        same("lines with FAIL or SKIP", said.lines("FAIL") + said.lines("SKIP"), 0)
    }),
    ("every source in the real run-time compiler", real_compiler),
    ("an older driver that tells no arguments", |lab| lab.done("axpy", &[("FAKE_VERSION", "12000")]).map(|_| ())),
];

pub const PARTS: &[super::child::Part] = &[
    ("axpy", axpy_part),
    ("cluster", cluster),
    ("shared", shared),
    ("arguments", arguments),
    ("fault", fault),
    ("hopper", hopper),
    ("operators", operators),
    ("compile", compile_part),
];

static CLUSTER: Kernel = Kernel { op: "probes", source: "probes_sm90.cu", name: "probe_cluster", arch: 90 };

/// Several lengths, two launches in a row without a wait between; says where the kernel came from.
fn axpy_part() -> Result<(), String> {
    let gpu = open()?;
    for len in [1usize, 7, 8, 2048, 5000] {
        let x: Vec<f32> = (0..len).map(|i| i as f32).collect();
        let (a, b) = (floats(&gpu, &x)?, floats(&gpu, &vec![1.0; len])?);
        text(axpy(&gpu, a, b, len, 2.0, 0))?;
        text(axpy(&gpu, b, a, len, -1.0, 0))?;
        let want: Vec<f32> = x.iter().map(|v| v - (1.0 + 2.0 * v)).collect();
        same(&format!("{len} floats"), read(&gpu, a, len)?, want)?;
    }
    let from = text(gpu.origins())?;
    println!("origins archive={} cache={} compiled={}", from.archive, from.cache, from.compiled);
    Ok(())
}

fn origins(said: &Said, must: [usize; 3], notices: usize) -> Result<(), String> {
    let [archive, cache, compiled] = must;
    let line = format!("origins archive={archive} cache={cache} compiled={compiled}");
    if said.lines(&line) == 1 && said.lines("notice: ") == notices {
        return Ok(());
    }
    Err(format!("must be {line} with {notices} notices: {}", said.text.trim()))
}

/// A cache of the row's own.
fn cache(lab: &Lab) -> String {
    lab.folder.join("cache").display().to_string()
}

fn entries(lab: &Lab) -> Result<Vec<PathBuf>, String> {
    let list = std::fs::read_dir(lab.folder.join("cache/kernels")).map_err(|e| e.to_string())?;
    Ok(list.filter_map(Result::ok).map(|e| e.path()).collect())
}

fn cached(lab: &Lab) -> Result<(), String> {
    let place = cache(lab);
    let first = lab.done("axpy", &[("GRAFT_CACHE", &place)])?;
    origins(&first, [0, 0, 1], 0)?;
    same("compilations", first.calls.iter().filter(|c| *c == "compile axpy.cu sm_90a").count(), 1)?;
    let second = lab.done("axpy", &[("GRAFT_CACHE", &place)])?;
    origins(&second, [0, 1, 0], 0)?;
    same("compilations", second.count("compile"), 0)?;
    // Another architecture and another compiler have entries of their own.
    origins(&lab.done("axpy", &[("GRAFT_CACHE", &place), ("FAKE_ARCH", "80")])?, [0, 0, 1], 0)?;
    origins(&lab.done("axpy", &[("GRAFT_CACHE", &place), ("FAKE_NVRTC", "12060")])?, [0, 0, 1], 0)?;
    same("entries", entries(lab)?.len(), 3)
}

fn damaged(lab: &Lab) -> Result<(), String> {
    let place = cache(lab);
    lab.done("axpy", &[("GRAFT_CACHE", &place)])?;
    let entry = entries(lab)?.pop().ok_or("no entry")?;
    let whole = std::fs::read(&entry).map_err(|e| e.to_string())?;
    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for bytes in [&flipped[..], &whole[..whole.len() / 2], b""] {
        std::fs::write(&entry, bytes).map_err(|e| e.to_string())?;
        let said = lab.done("axpy", &[("GRAFT_CACHE", &place)])?;
        origins(&said, [0, 0, 1], 1)?;
        same("the notice", said.lines("is not what was written; it is compiled again"), 1)?;
        origins(&lab.done("axpy", &[("GRAFT_CACHE", &place)])?, [0, 1, 0], 0)?;
    }
    same("entries", entries(lab)?.len(), 1)
}

fn unwritable(lab: &Lab) -> Result<(), String> {
    let place = cache(lab);
    // A file where the folder would be.
    std::fs::write(&place, b"").map_err(|e| e.to_string())?;
    let said = lab.done("axpy", &[("GRAFT_CACHE", &place)])?;
    same("kernels", said.lines("compiled=1"), 1)?;
    same("the notice", said.lines("kernels are compiled at every start"), 1)?;
    let nowhere = lab.done("axpy", &[("GRAFT_CACHE", ""), ("XDG_CACHE_HOME", ""), ("HOME", "")])?;
    origins(&nowhere, [0, 0, 1], 1)?;
    same("the notice", nowhere.lines("fix: set HOME or GRAFT_CACHE"), 1)
}

/// The archive beside a copy of this program: right, of another text, damaged, cut, of a newer toolkit.
fn archive(lab: &Lab) -> Result<(), String> {
    let place = cache(lab);
    let with = [("GRAFT_CACHE", place.as_str())];
    lab.done("axpy", &with)?;
    let entry = std::fs::read(entries(lab)?.pop().ok_or("no entry")?).map_err(|e| e.to_string())?;
    let start = entry.iter().position(|b| *b == b'\n').ok_or("no header")? + 1;
    let code = entry[start..].to_vec();
    let unit = sources::unit("axpy", "axpy.cu").ok_or("no source")?;
    let key = |target: &str| Key {
        op: "axpy".to_string(),
        source: "axpy.cu".to_string(),
        element: "f32".to_string(),
        target: target.to_string(),
    };
    let program = lab.folder.join("program");
    std::fs::copy(std::env::current_exe().map_err(|e| e.to_string())?, &program).map_err(|e| e.to_string())?;
    let whole = write(12040, &[(key("sm_90a"), digest(unit.as_bytes()), code.clone())]);
    let other = write(12040, &[(key("sm_90a"), 1, code.clone())]);
    let newer = write(13000, &[(key("sm_90a"), digest(unit.as_bytes()), code.clone())]);
    let foreign = write(12040, &[(key("sm_80"), digest(unit.as_bytes()), code)]);
    let mut damaged = whole.clone();
    let last = damaged.len() - 100;
    damaged[last] ^= 4;
    let cases: [(&str, &[u8], [usize; 3], &str); 6] = [
        ("right", &whole, [1, 0, 0], ""),
        ("of another text", &other, [0, 1, 0], "was made from another text"),
        ("of a newer toolkit", &newer, [0, 1, 0], "made with CUDA 13.0, but the driver supports 12.4"),
        ("of another architecture", &foreign, [0, 1, 0], ""),
        ("damaged", &damaged, [0, 1, 0], "axpy.cu is damaged"),
        ("cut", &whole[..60], [0, 1, 0], "it ends too early; it is not used"),
    ];
    for (name, bytes, must, notice) in cases {
        std::fs::write(lab.folder.join(ARCHIVE), bytes).map_err(|e| e.to_string())?;
        let said = lab.run_as(&program, "axpy", &with)?;
        origins(&said, must, usize::from(!notice.is_empty())).map_err(|e| format!("{name}: {e}"))?;
        if said.lines(notice) == 0 {
            return Err(format!("{name}: no notice has {notice:?}: {}", said.text.trim()));
        }
    }
    // With an archive that fits, the compiler need not be there.
    std::fs::write(lab.folder.join(ARCHIVE), &whole).map_err(|e| e.to_string())?;
    let alone = lab.fakes.driver_alone.display().to_string();
    let said = lab.run_as(&program, "axpy", &[("LD_LIBRARY_PATH", &alone), ("GRAFT_NVRTC", "libnvrtc-none.so")])?;
    origins(&said, [1, 0, 0], 0)
}

/// Each block reads its neighbours' shared memory and shares two loads of the copy engine.
fn cluster() -> Result<(), String> {
    let gpu = open()?;
    let v: Vec<u32> = (0..256).map(|i| (i as f32 + 1.0).to_bits()).collect();
    let bytes: Vec<u8> = v.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let (input, output) = (text(gpu.allocate(1024))?, text(gpu.allocate(8 * 2048))?);
    text(gpu.upload(input, &bytes))?;
    let map = TensorMap {
        element: 2,
        swizzle: 0,
        address: input,
        rank: 2,
        dims: [16, 16, 0, 0, 0],
        strides: [64, 0, 0, 0],
        block: [16, 16, 0, 0, 0],
    };
    let shape = Shape::new(8, 32).cluster(4).shared(&[4096]);
    let args = [Arg::Map(map), Arg::Address(input), Arg::Address(output)];
    let launch = Launch { kernel: &CLUSTER, element: ElementType::F32, shape, args: &args };
    text(gpu.launch(&launch))?;
    let mut out = vec![0u8; 8 * 2048];
    text(gpu.download(output, &mut out))?;
    let out: Vec<u32> = out.as_chunks::<4>().0.iter().map(|b| u32::from_ne_bytes(*b)).collect();
    for b in 0..8u32 {
        let (rank, next, before) = (b % 4, (b + 1) % 4, (b + 3) % 4);
        let own = |r: u32| v[..32].iter().map(move |x| x.wrapping_add(r * 1000));
        let mut want: Vec<u32> = own(next).collect();
        want.extend(own(before));
        want.extend((0..32).map(|l| l * 7 + before));
        want.extend(own(before));
        want.extend(&v);
        want.extend(&v[..64]);
        want.extend((0..32).map(|l| ((l + next) as f32).to_bits()));
        want.extend([400 + rank; 32]);
        same(&format!("block {b}"), out[b as usize * 512..][..want.len()].to_vec(), want)?;
    }
    // Maps that the copy engine does not take are refused by name.
    for (wrong, words) in [
        (TensorMap { swizzle: 4, ..map }, "a tensor map of no such swizzle; is 4"),
        (TensorMap { element: 77, ..map }, "a tensor map of no such element; is 77"),
        (TensorMap { rank: 6, ..map }, "a tensor map of no such rank; is 6"),
        (TensorMap { address: input + 4, ..map }, "the tensor map"),
        (TensorMap { strides: [60, 0, 0, 0], ..map }, "CUDA_ERROR_INVALID_VALUE"),
    ] {
        let args = [Arg::Map(wrong), Arg::Address(input), Arg::Address(output)];
        refused(gpu.launch(&Launch { args: &args, ..launch }), &["probe_cluster f32", words])?;
    }
    text(gpu.synchronize())
}

fn shared() -> Result<(), String> {
    let gpu = open()?;
    let (x, y) = (floats(&gpu, &[3.0; 64])?, floats(&gpu, &[1.0; 64])?);
    for _ in 0..3 {
        text(axpy(&gpu, x, y, 64, 2.0, 60 << 10))?;
        text(axpy(&gpu, x, y, 64, 1.0, 50 << 10))?;
    }
    same("sums", read(&gpu, y, 64)?, vec![1.0 + 3.0 * 9.0; 64])?;
    refused(axpy(&gpu, x, y, 64, 2.0, 228 << 10), &["axpy_forward f32: too much shared memory", "233472 bytes"])
}

fn arguments() -> Result<(), String> {
    let gpu = open()?;
    let (x, y) = (floats(&gpu, &[3.0; 64])?, floats(&gpu, &[1.0; 64])?);
    let shape = Shape::new(1, 256);
    for args in [
        &[Arg::Address(x), Arg::Address(y), Arg::I32(64)][..],
        &[Arg::Address(x), Arg::Address(y), Arg::U64(64), Arg::F32(1.0)],
        &[],
    ] {
        let launch = Launch { kernel: &super::child::AXPY, element: ElementType::F32, shape, args };
        refused(gpu.launch(&launch), &["arguments do not fit the kernel", "must be [8, 8, 4, 4] bytes"])?;
    }
    static MISSING: Kernel = Kernel { op: "axpy", source: "axpy.cu", name: "axpy_sideways", arch: 80 };
    static ELSEWHERE: Kernel = Kernel { op: "axpy", source: "axpi.cu", name: "axpy_forward", arch: 80 };
    let of = |kernel| Launch { kernel, element: ElementType::F32, shape, args: &[] };
    refused(gpu.launch(&of(&MISSING)), &["axpy.cu: has no kernel axpy_sideways for f32", "CUDA_ERROR_NOT_FOUND"])?;
    refused(gpu.launch(&of(&ELSEWHERE)), &["axpi.cu: this program carries no such source"])?;
    same("untouched", read(&gpu, y, 64)?, vec![1.0; 64])
}

/// A launch without the clusters that the kernel needs: it starts, and the failure shows when it is waited for.
fn fault() -> Result<(), String> {
    let gpu = open()?;
    let input = text(gpu.allocate(1 << 14))?;
    text(gpu.fill(input, 0, 1 << 14))?;
    let map = TensorMap {
        element: 2,
        swizzle: 0,
        address: input,
        rank: 2,
        dims: [16, 16, 0, 0, 0],
        strides: [64, 0, 0, 0],
        block: [16, 16, 0, 0, 0],
    };
    let shape = Shape::new(1, 32).shared(&[4096]);
    let args = [Arg::Map(map), Arg::Address(input), Arg::Address(input)];
    text(gpu.launch(&Launch { kernel: &CLUSTER, element: ElementType::F32, shape, args: &args }))?;
    let words =
        ["CUDA_ERROR_LAUNCH_FAILED", "nothing computed since the last synchronisation holds", "compute-sanitizer"];
    refused(gpu.synchronize(), &["cuda:0 (Fake GPU): work on the device failed", words[0], words[1], words[2]])?;
    // It stays so until the process ends.
    refused(gpu.allocate(64 << 20), &words)?;
    refused(gpu.download(input, &mut [0; 4]), &words)
}

fn architectures(lab: &Lab) -> Result<(), String> {
    let said = lab.done("axpy", &[("FAKE_ARCH", "86"), ("GRAFT_CACHE", &cache(lab))])?;
    same("compilations", said.count("compile axpy.cu sm_86"), 1)?;
    lab.done("hopper", &[("FAKE_ARCH", "80")])?;
    lab.refused("axpy", &[("FAKE_ARCH", "75")], &["the device is too old", "is compute capability 7.5", "8.0 (A100)"])
}

fn hopper() -> Result<(), String> {
    let gpu = open()?;
    let shape = Shape::new(1, 32);
    let launch = Launch { kernel: &CLUSTER, element: ElementType::F32, shape, args: &[] };
    refused(
        gpu.launch(&launch),
        &["probes_sm90.cu: the kernel is for another architecture", "8.0", "9.0 (Hopper) exactly"],
    )?;
    refused(gpu.launch(&Launch { shape: shape.cluster(1).shared(&[200 << 10]), ..launch }), &["at most 166912 bytes"])
}

/// The library of the pinned compiler wheels, or the one that the caller of the tests names.
fn real_compiler(lab: &Lab) -> Result<(), String> {
    let named = std::env::var("GRAFT_NVRTC").ok().filter(|v| !v.is_empty()).map(PathBuf::from);
    let wheels = std::fs::read_dir(workspace_root().join(".venv-cuda/lib")).into_iter().flatten();
    let inside = |e: std::fs::DirEntry| e.path().join("site-packages/nvidia/cu13/lib/libnvrtc.so.13");
    let found = named.or_else(|| wheels.filter_map(Result::ok).map(inside).find(|p| p.is_file()));
    let library = found.ok_or("SKIP no NVRTC; run python3 tools/setup/cuda_compiler.py or set GRAFT_NVRTC")?;
    // Without the fakes: the real library asks the driver more than the fake one knows.
    let (library, nowhere) = (library.display().to_string(), lab.folder.display().to_string());
    let said = lab.done("compile", &[("GRAFT_NVRTC", &library), ("LD_LIBRARY_PATH", &nowhere)])?;
    if said.lines("compiled ") > 0 { Ok(()) } else { Err(format!("compiled nothing: {}", said.text.trim())) }
}

/// Every source of an operator that has a device path, once for each architecture; elements take turns.
fn compile_part() -> Result<(), String> {
    for contract in contracts(&workspace_root())? {
        let Some(of_device) = contract.cuda else { continue };
        let files = sources::operator(&contract.name).iter().map(|(file, _)| *file).filter(|f| f.ends_with(".cu"));
        for (file, element) in files.flat_map(|f| of_device.elements.iter().map(move |e| (f, e))) {
            let type_ = ElementType::named(element).ok_or("no such element")?;
            let arch = if file.ends_with("_sm90.cu") || element == "bf16" { 90 } else { 80 };
            let code = text(cuda::compile(&contract.name, file, type_, arch))?;
            same(file, code.starts_with(b"\x7fELF"), true)?;
            println!("compiled {file} {element} {arch}: {} bytes", code.len());
        }
    }
    Ok(())
}

fn operators() -> Result<(), String> {
    let soak = std::env::var_os("EMU_SOAK").is_some_and(|v| v != "0");
    for op in if soak { &[""][..] } else { &["axpy", "sum_squares", "philox", "ln_modulate"] } {
        let words = ["graft", "op", "check", op, "--backend", "cuda", "--require", "cuda"].map(OsString::from);
        let code = graft_engine::cli::run(words);
        if code != ExitCode::SUCCESS {
            return Err(format!("{op}: {code:?}"));
        }
    }
    Ok(())
}
