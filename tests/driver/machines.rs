//! Machines that lack something: one message each, with the fix.

use super::Row;
use super::child::{open, text};
use super::lab::{Lab, same};
use graft_engine::backend::cuda;
use std::ffi::OsString;
use std::process::ExitCode;

pub const ROWS: &[Row] = &[
    ("no driver", no_driver),
    ("a driver that is too old", |lab| {
        let words = ["the NVIDIA driver is too old", "is it supports CUDA 11.4", "CUDA 12.0 (R525) or newer", "fix:"];
        lab.refused("open", &[("FAKE_VERSION", "11040")], &words)
    }),
    ("no device", |lab| {
        lab.refused("open", &[("FAKE_DEVICES", "0")], &["CUDA_ERROR_NO_DEVICE", "CUDA_VISIBLE_DEVICES"])
    }),
    ("a device that is not there", |lab| {
        let words = ["no such device", "device 2 of 2", "0 to 1", "CUDA_VISIBLE_DEVICES"];
        lab.refused("third", &[("FAKE_DEVICES", "2")], &words)
    }),
    ("no run-time compiler", |lab| {
        let alone = lab.fakes.driver_alone.display().to_string();
        let words =
            ["no compiled kernels for this device and no compiler", "libnvrtc-none.so", "fix: put graft.cubins"];
        lab.refused("axpy", &[("LD_LIBRARY_PATH", &alone), ("GRAFT_NVRTC", "libnvrtc-none.so")], &words)
    }),
    ("a compiler newer than the driver", |lab| {
        let words = ["the run-time compiler is newer than the driver", "NVRTC 13.0, CUDA 12.4", "GRAFT_NVRTC"];
        lab.refused("axpy", &[("FAKE_NVRTC", "13000")], &words)
    }),
    ("a compiler that fails", |lab| {
        let place = lab.folder.join("cache").display().to_string();
        let words = ["axpy.cu: does not compile: NVRTC_ERROR_COMPILATION", "is NVRTC 12.4"];
        lab.refused("axpy", &[("FAKE_FLAGS", "-include none.h"), ("GRAFT_CACHE", &place)], &words)
    }),
    ("graft doctor", doctor),
    ("graft doctor on an old driver", |lab| {
        let said = lab.done("doctor", &[("FAKE_VERSION", "11040")])?;
        same("lines", said.lines("the NVIDIA driver is too old"), 1)
    }),
];

pub const PARTS: &[super::child::Part] = &[
    ("open", || open().map(|_| ())),
    ("third", || text(cuda::Cuda::open(2)).map(|_| ())),
    ("doctor", || {
        let words = ["graft", "doctor"].map(OsString::from);
        let code = graft_engine::cli::run(words);
        if code == ExitCode::SUCCESS { Ok(()) } else { Err(format!("{code:?}")) }
    }),
];

fn no_driver(lab: &Lab) -> Result<(), String> {
    let nowhere = lab.folder.display().to_string();
    let said = lab.run("open", &[("LD_LIBRARY_PATH", &nowhere)])?;
    if said.good || said.lines("Fake GPU") == 0 && said.lines("the NVIDIA driver library was not found") == 0 {
        return Err("SKIP this machine has a driver".to_string());
    }
    same("lines with the fix", said.lines("fix: install the driver"), 1)
}

fn doctor(lab: &Lab) -> Result<(), String> {
    let place = lab.folder.join("cache").display().to_string();
    lab.done("axpy", &[("GRAFT_CACHE", &place)])?;
    let said = lab.done("doctor", &[("GRAFT_CACHE", &place), ("FAKE_DEVICES", "2")])?;
    for words in [
        "2 devices, the driver supports CUDA 12.4; 12.0 (R525) or newer is needed",
        "cuda:1: Fake GPU, compute capability 9.0, 4 multiprocessors, 0.2 GiB free of 0.2",
        "no graft.cubins that can be used",
        "NVRTC 12.4 (libnvrtc.so)",
        "cache/kernels: 1 kernel sources",
    ] {
        if said.lines(words) != 1 {
            return Err(format!("no line has {words:?}:\n{}", said.text));
        }
    }
    Ok(())
}
