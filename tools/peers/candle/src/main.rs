//! Operators in candle on the CPU: a peer of `paired op`; forward passes in f32.
//!
//! It answers requests as `../onnx_ops.py` does, with `RAYON_NUM_THREADS` threads. An operator has one or more ways to be written;
//! the caller compares the outputs of all and times the fastest. Weights and layouts are prepared outside of the time.

mod operators;

use candle_core::{DType, Device, Result, Tensor, bail, safetensors};
use operators::{Case, OPERATORS, Way};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Instant;

/// The case that is measured.
struct Taken {
    folder: PathBuf,
    output: String,
    ways: Vec<Way>,
}

fn main() -> std::io::Result<()> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{}", json!({ "name": "candle", "version": VERSION }))?;
    let mut taken = None;
    for line in std::io::stdin().lock().lines() {
        let answer = serde_json::from_str(&line?)
            .map_err(candle_core::Error::wrap)
            .and_then(|request| answer(&request, &mut taken))
            .unwrap_or_else(|e| json!({ "error": e.to_string() }));
        writeln!(output, "{answer}")?;
        output.flush()?;
    }
    Ok(())
}

/// As Cargo.toml pins it.
const VERSION: &str = "0.11.1";

fn answer(request: &Value, taken: &mut Option<Taken>) -> Result<Value> {
    let text = |name: &str| request[name].as_str().unwrap_or_default();
    let known = OPERATORS.iter().find(|(name, _)| *name == text("op"));
    let chosen = |taken: &Option<Taken>| -> Result<Tensor> {
        let Some(way) = taken.as_ref().and_then(|t| t.ways.iter().find(|w| w.name == text("way"))) else {
            bail!("no way {}", text("way"))
        };
        (way.run)()
    };
    match text("ask") {
        "knows" if known.is_none() => Ok(json!({ "none": "it is not written for it" })),
        "knows" => Ok(json!({})),
        "case" => {
            let Some((_, build)) = known else { bail!("no operator {}", text("op")) };
            if text("dtype") != "f32" {
                return Ok(json!({ "none": "it is written for f32" }));
            }
            let folder = PathBuf::from(text("folder"));
            let whole: Vec<&str> = request["i32"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let mut tensors: HashMap<String, Tensor> =
                safetensors::load(folder.join("inputs.safetensors"), &Device::Cpu)?;
            for name in whole {
                if let Some(t) = tensors.get_mut(name) {
                    *t = t.to_dtype(DType::U32)?;
                }
            }
            let Some(ways) = build(&Case::new(request, tensors))? else {
                *taken = None;
                return Ok(json!({ "none": "it is not written for this case" }));
            };
            let names: Vec<&str> = ways.iter().map(|w| w.name).collect();
            let answer = json!({ "ways": { "forward": names, "backward": [] } });
            *taken = Some(Taken { folder, output: request["outputs"][0].as_str().unwrap_or_default().into(), ways });
            Ok(answer)
        }
        "output" => {
            let result = chosen(taken)?;
            let Some(of) = taken else { bail!("no case") };
            let Some(way) = of.ways.iter().find(|w| w.name == text("way")) else { bail!("no way") };
            let file = of.folder.join("peer.safetensors");
            (way.ours)(&result)?.contiguous()?.save_safetensors(&of.output, &file)?;
            Ok(json!({ "file": file }))
        }
        "run" => {
            let calls = request["calls"].as_u64().unwrap_or(1);
            let start = Instant::now();
            for _ in 0..calls {
                std::hint::black_box(chosen(taken)?);
            }
            Ok(json!({ "ms": start.elapsed().as_secs_f64() * 1e3 }))
        }
        other => bail!("asked {other}"),
    }
}
