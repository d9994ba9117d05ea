//! Where the time of a forward pass goes: every operator of every layer, with what the cost model predicts of it.

use super::Subject;
use super::model::Subjected;
use crate::autograd::{Graph, Precision, Var};
use crate::error::{Error, Result};
use crate::models::sites::Seen;
use crate::nn::operators::Site;
use crate::ops::contracts;
use crate::ops::watch::{self, Call};
use crate::report::bench::{Ceilings, LAYER, Needs, Row};
use crate::tensor::{DType, Device};
use std::collections::BTreeMap;

/// Measurements of a forward pass with everything watched.
const SAMPLES: usize = 5;

/// A row for each operator within each layer: layer 0 is what comes before the blocks, the last what comes behind them.
/// `ceilings` are rows of the same run.
///
/// # Errors
/// A device with a clock of its own, and those of the pass.
pub fn measure(
    device: &Device,
    precision: Precision,
    model: &Subjected,
    x: &Var,
    case: &str,
    ceilings: &[Row],
) -> Result<Vec<Row>> {
    if !device.is_host() {
        return Err(Error::usage("--layers", "operators are timed by the host's clock").must("--backend cpu"));
    }
    let g = Graph::inference(precision);
    let mut found: BTreeMap<(usize, &str), (Vec<f64>, Vec<Call>)> = BTreeMap::new();
    for sample in 0..=SAMPLES {
        let mut ends = Vec::new();
        let mut observer = |seen: &Seen<'_>| {
            if seen.site == Site::Mlp {
                ends.push(watch::count());
            }
            Ok(())
        };
        let (outcome, calls) = watch::watch(|| model.forward(&g, x, Some(&mut observer)));
        outcome?;
        // The first pass warms up.
        if sample == 0 {
            continue;
        }
        let mut pass: BTreeMap<(usize, &str), (f64, Vec<Call>)> = BTreeMap::new();
        for (call, layer) in calls.iter().zip(places(&calls, &ends)) {
            let entry = pass.entry((layer, call.op)).or_default();
            entry.0 += 1e3 * call.seconds;
            entry.1.push(call.clone());
        }
        for (key, (ms, calls)) in pass {
            let entry = found.entry(key).or_default();
            entry.0.push(ms);
            entry.1 = calls;
        }
    }
    let element = if precision == Precision::Bf16 { DType::BF16 } else { DType::F32 };
    let rows = found.into_iter().map(|((layer, op), (times, calls))| {
        let mut row = Subject { bench: LAYER, case: case.into(), work: op.into() }.row(device, element, times);
        let ceilings = Ceilings::of(ceilings, &row);
        let needs: Vec<Needs> = calls.iter().filter_map(needs).collect();
        let sum = |part: fn(&Needs) -> f64| Some(needs.iter().map(part).sum()).filter(|sum| *sum > 0.0);
        (row.flops, row.bytes, row.exps) = (sum(|n| n.flops), sum(|n| n.bytes), sum(|n| n.exps));
        // Every call by itself: a sum of largest times is no largest time of sums.
        row.predicted_ms = needs.iter().map(|n| ceilings.predict(*n)).sum();
        row.axes.insert(LAYER.into(), layer as f64);
        row
    });
    Ok(rows.collect())
}

/// The layer of every call. A block ends with what follows its last site until the next block's first norm.
fn places(calls: &[Call], ends: &[usize]) -> Vec<usize> {
    let norm = |call: &Call| matches!(call.op, "ln_modulate" | "rms_norm" | "qk_norm");
    let first = calls.iter().position(norm).unwrap_or(0);
    let (mut layer, mut places) = (0, Vec::with_capacity(calls.len()));
    for (index, call) in calls.iter().enumerate() {
        if index == first {
            layer = 1;
        }
        let done = ends.iter().filter(|end| index >= **end).count();
        if layer > 0 && done + 1 > layer && norm(call) {
            layer = done + 1;
        }
        places.push(layer);
    }
    places
}

/// What the contract counts of a call.
fn needs(call: &Call) -> Option<Needs> {
    let info = contracts::OPS.iter().find(|op| op.name == call.op)?;
    let cost = (info.cost)(&|name| call.dim(name));
    Some(Needs { flops: cost.flops as f64, bytes: cost.bytes as f64, exps: cost.exps as f64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_reaches_to_the_next_norm() {
        let call = |op: &'static str| Call { op, dims: Vec::new(), seconds: 0.0 };
        let names = ["patchify", "ln_modulate", "gemm", "ln_modulate", "gemm", "gate_residual", "ln_modulate", "gemm"];
        let calls: Vec<Call> = names.into_iter().map(call).collect();
        // The site of the perceptron ends with call 4; its gate comes after it.
        assert_eq!(places(&calls, &[5]), [0, 1, 1, 1, 1, 1, 2, 2]);
        assert_eq!(places(&calls[..1], &[]), [0]);
    }

    #[test]
    fn the_contract_counts_a_call() {
        let dims = vec![("B", 1), ("N", 2), ("K", 3), ("F", 4), ("C", 0)];
        let found = needs(&Call { op: "gemm", dims, seconds: 0.0 }).unwrap();
        assert_eq!(found, Needs { flops: 48.0, bytes: 4.0 * (6.0 + 12.0 + 8.0), exps: 0.0 });
        let attention = vec![("B", 1), ("N", 5), ("H", 2), ("E", 4)];
        assert_eq!(needs(&Call { op: "attention", dims: attention, seconds: 0.0 }).unwrap().exps, 50.0);
    }
}
