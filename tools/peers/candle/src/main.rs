//! Operators in candle on the CPU: a peer of `paired op`, forward passes.
//!
//! `candle-peer --threads N` speaks the protocol of `tools/peers/common.py`: a line of JSON for each line of JSON. An
//! operator is written as candle's own models write it, with its fused softmax and norms.

mod operators;

use candle_core::{Device, Tensor};
use operators::Case;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Instant;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Fallible<()> {
    let threads = std::env::args().skip_while(|a| a != "--threads").nth(1).ok_or("--threads N is missing")?;
    // Both its own loops and its matrix products ask rayon, which asks this, and no thread has started yet.
    if std::env::var("RAYON_NUM_THREADS").as_deref() != Ok(threads.as_str()) {
        let itself = std::env::current_exe()?;
        let status = std::process::Command::new(itself)
            .args(["--threads", &threads])
            .env("RAYON_NUM_THREADS", &threads)
            .status()?;
        std::process::exit(status.code().unwrap_or(1));
    }
    let mut out = std::io::stdout();
    writeln!(out, "{}", json!({ "name": "candle", "version": operators::VERSION }))?;
    let mut held: Option<(Case, PathBuf)> = None;
    for line in std::io::stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let answer = answer(&request, &mut held).unwrap_or_else(|e| json!({ "error": e.to_string() }));
        writeln!(out, "{answer}")?;
    }
    Ok(())
}

fn answer(request: &Value, held: &mut Option<(Case, PathBuf)>) -> Fallible<Value> {
    let text = |key: &str| request[key].as_str().unwrap_or_default().to_string();
    match request["ask"].as_str() {
        Some("knows") if operators::OPERATORS.contains(&text("op").as_str()) => Ok(json!({})),
        Some("knows") => Ok(json!({ "none": "not written" })),
        Some("case") => {
            *held = None;
            if text("dtype") != "f32" {
                return Ok(json!({ "none": "bf16 has no fast kernels on the CPU" }));
            }
            let folder = PathBuf::from(text("folder"));
            let tensors = candle_core::safetensors::load(folder.join("inputs.safetensors"), &Device::Cpu)?;
            let numbers = |key: &str| -> HashMap<String, f64> {
                let pairs = request[key].as_object().into_iter().flatten();
                pairs.filter_map(|(name, value)| Some((name.clone(), value.as_f64()?))).collect()
            };
            let case = Case::new(text("op"), tensors, numbers("dims"), numbers("params"));
            let ways = match case.ways() {
                Ok(ways) => ways,
                Err(why) => return Ok(json!({ "none": why })),
            };
            *held = Some((case, folder));
            Ok(json!({ "ways": { "forward": ways, "backward": [] } }))
        }
        Some("output") => {
            let (case, folder) = held.as_ref().ok_or("no case")?;
            let path = folder.join("peer.safetensors");
            let y: Tensor = case.output(&text("way"))?.contiguous()?;
            candle_core::safetensors::save(&HashMap::from([("y", y)]), &path)?;
            Ok(json!({ "file": path }))
        }
        Some("run") => {
            let (case, _) = held.as_ref().ok_or("no case")?;
            let (way, calls) = (text("way"), request["calls"].as_u64().unwrap_or(1));
            let start = Instant::now();
            for _ in 0..calls {
                case.run(&way)?;
            }
            Ok(json!({ "ms": start.elapsed().as_secs_f64() * 1e3 }))
        }
        _ => Err(format!("unknown request {request}").into()),
    }
}
