//! Captured work: what is replayed, what may not be captured, what is evicted, and threads that wait.

use super::Row;
use super::child::{axpy, floats, open, read, refused, text, write};
use super::lab::same;
use graft_engine::backend::cuda::{Cuda, GraphKey, Step};
use graft_engine::tensor::Gpu;

pub const ROWS: &[Row] = &[
    ("a graph is replayed with other inputs", |lab| {
        let said = lab.done("replay", &[])?;
        // Two plain launches and two captured; the rest are replays.
        same("launches", said.count("launch axpy_forward"), 4)?;
        same("replays", said.count("replay"), 4)
    }),
    ("what a capture cannot hold", |lab| lab.done("forbidden", &[]).map(|_| ())),
    ("graphs make room for others", |lab| lab.done("eviction", &[]).map(|_| ())),
    ("other threads wait for a capture", |lab| lab.done("threads", &[]).map(|_| ())),
    ("time between two events", |lab| lab.done("timing", &[]).map(|_| ())),
];

pub const PARTS: &[super::child::Part] =
    &[("replay", replay), ("forbidden", forbidden), ("eviction", eviction), ("threads", threads), ("timing", timing)];

const LEN: usize = 3000;

fn key(work: &str, addresses: &[u64]) -> GraphKey {
    GraphKey { work: work.to_string(), shape: vec![LEN], addresses: addresses.to_vec() }
}

/// `y = 2 x`, then `z = z + y`: order matters.
fn work(gpu: &Cuda, [x, y, z]: [u64; 3]) -> graft_engine::error::Result<()> {
    gpu.fill(y, 0, 4 * LEN)?;
    axpy(gpu, x, y, LEN, 2.0, 0)?;
    axpy(gpu, y, z, LEN, 1.0, 0)?;
    gpu.copy(x, z, 4 * LEN)
}

fn blocks(gpu: &Cuda) -> Result<[u64; 3], String> {
    Ok([floats(gpu, &[0.0; LEN])?, floats(gpu, &[9.0; LEN])?, floats(gpu, &[0.0; LEN])?])
}

fn replay() -> Result<(), String> {
    let gpu = open()?;
    let at = blocks(&gpu)?;
    let key = key("a step", &at);
    let (mut steps, mut sum) = (Vec::new(), vec![0.0; LEN]);
    for round in 0..5 {
        let x: Vec<f32> = (0..LEN).map(|i| (i + 7 * round) as f32).collect();
        write(&gpu, at[0], &x)?;
        steps.push(text(gpu.graph(&key, &mut || work(&gpu, at)))?);
        sum.iter_mut().zip(&x).for_each(|(s, x)| *s += 2.0 * x);
        same(&format!("round {round}"), read(&gpu, at[0], LEN)?, sum.clone())?;
    }
    same("steps", steps, vec![Step::Ran, Step::Captured, Step::Replayed, Step::Replayed, Step::Replayed])?;
    same("graphs", text(gpu.graphs())?, 1)
}

fn forbidden() -> Result<(), String> {
    let gpu = open()?;
    let at = blocks(&gpu)?;
    type Tried = fn(&Cuda, [u64; 3]) -> graft_engine::error::Result<()>;
    let cases: [(&str, Tried); 7] = [
        ("memory is allocated", |g, _| g.allocate(64).map(|_| ())),
        ("bytes are uploaded", |g, at| g.upload(at[0], &[1; 64])),
        ("bytes are downloaded", |g, at| g.download(at[0], &mut [1; 64])),
        ("the queue is waited for", |g, _| g.synchronize()),
        ("memory is reserved", |g, _| g.reserve(&Default::default())),
        ("another graph is asked for", |g, at| g.graph(&key("inner", &at), &mut || Ok(())).map(|_| ())),
        ("time is measured", |g, _| g.timed(&mut || Ok(())).map(|_| ())),
    ];
    for (tried, call) in cases {
        let key = key(tried, &at);
        let words = [tried, "inside the capture of", "fix: do it before"];
        text(gpu.graph(&key, &mut || work(&gpu, at)))?;
        refused(gpu.graph(&key, &mut || work(&gpu, at).and_then(|()| call(&gpu, at))), &words)?;
        // It fails even where the work does not hand the error on.
        let quiet = || {
            let _ = call(&gpu, at);
            work(&gpu, at)
        };
        refused(gpu.graph(&key, &mut { quiet }), &words)?;
    }
    same("graphs", text(gpu.graphs())?, 0)?;
    // An error of the work itself is handed on, and nothing of it ran.
    let key_of = key("failing", &at);
    text(gpu.graph(&key_of, &mut || Ok(())))?;
    write(&gpu, at[2], &[5.0; LEN])?;
    let failing = || work(&gpu, at).and(Err(graft_engine::error::Error::failure("the work", "fails")));
    refused(gpu.graph(&key_of, &mut { failing }), &["the work: fails"])?;
    same("untouched", read(&gpu, at[2], LEN)?, vec![5.0; LEN])?;
    // A kernel that was never loaded, and shared memory that was never given, come too late in a capture.
    let other = open()?;
    let at = blocks(&other)?;
    let key = key("cold", &at);
    text(other.graph(&key, &mut || Ok(())))?;
    refused(
        other.graph(&key, &mut || work(&other, at)),
        &["kernel axpy_forward is loaded inside the capture of cold"],
    )?;
    text(work(&other, at))?;
    refused(
        other.graph(&key, &mut || axpy(&other, at[0], at[1], LEN, 1.0, 60 << 10)),
        &["a capture cannot give a kernel more shared memory", "61440 bytes, prepared for 49152"],
    )?;
    text(other.synchronize())
}

/// More shapes than are kept; memory that a graph uses stays its own until it goes.
fn eviction() -> Result<(), String> {
    let gpu = open()?;
    let at = blocks(&gpu)?;
    let scratch = floats(&gpu, &[0.0; LEN])?;
    let held = key("with scratch", &at);
    let mut freed = false;
    let step = |gpu: &Cuda| {
        gpu.graph(&held, &mut || {
            gpu.fill(scratch, 0, 4 * LEN)?;
            axpy(gpu, at[0], scratch, LEN, 1.0, 0)?;
            gpu.copy(at[1], scratch, 4 * LEN)
        })
    };
    text(step(&gpu))?;
    let before = text(gpu.memory())?.used;
    // The second time the block is freed inside the capture, as a tensor that goes out of scope does.
    let captured = gpu.graph(&held, &mut || {
        gpu.fill(scratch, 0, 4 * LEN)?;
        axpy(&gpu, at[0], scratch, LEN, 1.0, 0)?;
        gpu.copy(at[1], scratch, 4 * LEN)?;
        if !std::mem::replace(&mut freed, true) {
            gpu.free(scratch, 4 * LEN);
        }
        Ok(())
    });
    same("step", text(captured)?, Step::Captured)?;
    same("in use", text(gpu.memory())?.used, before)?;
    let other = floats(&gpu, &[4.0; LEN])?;
    write(&gpu, at[0], &[3.0; LEN])?;
    same("step", text(step(&gpu))?, Step::Replayed)?;
    same("the graph's result", read(&gpu, at[1], LEN)?, vec![3.0; LEN])?;
    same("another tensor", read(&gpu, other, LEN)?, vec![4.0; LEN])?;
    for shape in 0..9 {
        let key = GraphKey { work: "many".to_string(), shape: vec![shape], addresses: at.to_vec() };
        for _ in 0..2 {
            text(gpu.graph(&key, &mut || work(&gpu, at)))?;
        }
    }
    same("graphs", text(gpu.graphs())?, 8)?;
    same("in use after eviction", text(gpu.memory())?.used, before)?;
    text(gpu.forget_graphs())?;
    same("graphs", text(gpu.graphs())?, 0)
}

fn threads() -> Result<(), String> {
    let gpu = open()?;
    let at = blocks(&gpu)?;
    let key = key("slow", &at);
    text(gpu.graph(&key, &mut || work(&gpu, at)))?;
    let beside = floats(&gpu, &[1.0; LEN])?;
    let (begin, began) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let gpu = &gpu;
        let other = scope.spawn(move || {
            began.recv().map_err(|e| e.to_string())?;
            // Comes while the other thread captures, and is not recorded.
            text(axpy(gpu, beside, beside, LEN, 1.0, 0))?;
            read(gpu, beside, LEN)
        });
        let step = gpu.graph(&key, &mut || {
            let _ = begin.send(());
            std::thread::sleep(std::time::Duration::from_millis(50));
            work(gpu, at)
        });
        same("step", text(step)?, Step::Captured)?;
        let values = other.join().map_err(|_| "the thread panicked")??;
        same("of the other thread", values, vec![2.0; LEN])
    })?;
    text(gpu.graph(&key, &mut || work(&gpu, at)))?;
    same("after a replay", read(&gpu, beside, LEN)?, vec![2.0; LEN])
}

fn timing() -> Result<(), String> {
    let gpu = open()?;
    let at = blocks(&gpu)?;
    let time = text(gpu.timed(&mut || work(&gpu, at)))?;
    if !(time > 0.0 && time < 60_000.0) {
        return Err(format!("{time} ms"));
    }
    // Of nothing: nearly nothing.
    let none = text(gpu.timed(&mut || Ok(())))?;
    if none >= time {
        return Err(format!("{none} ms for nothing, {time} for work"));
    }
    // As `graft bench` does: every sample has all the work in it, warm and cold, and nothing is left behind.
    for times in [text(gpu.time(2, &mut || work(&gpu, at)))?, text(gpu.time_cold(3, &mut || work(&gpu, at)))?] {
        if times.iter().any(|t| !(*t > f64::from(none) && *t < 60_000.0)) {
            return Err(format!("{times:?} ms, {none} for nothing"));
        }
    }
    same("graphs", text(gpu.graphs())?, 0)
}
