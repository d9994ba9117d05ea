//! Measured rows: what one is, how two files of them compare, and the page that shows them.

mod ceilings;
mod compare;
mod curves;
mod misfit;
mod page;

pub use ceilings::{Ceilings, Needs};
pub use compare::{Change, compare};
pub use curves::plots;
pub use misfit::Misfit;
pub use page::page;

use crate::error::{Error, Result};
use crate::io::jsonl;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Kind of a row that measures what the device can do at best; other rows are shares of it.
pub const CEILING: &str = "ceiling";
/// The ceiling of bytes: a large copy.
pub const COPY: &str = "copy";
/// The ceiling of arithmetic: a large product.
pub const PRODUCT: &str = "product";
/// The ceiling of bytes that stay in the caches: a copy that fits.
pub const CACHED: &str = "copy in cache";
/// The ceiling of exponentials.
pub const EXPS: &str = "exponentials";
/// The least time of a call: an operator with next to no work.
pub const CALL: &str = "call";
/// Kind of the rows that are parts of a forward pass: an operator within a layer.
pub const LAYER: &str = "layer";
/// The axis of a call on a GPU whose cache holds nothing.
pub const COLD: &str = "cold L2";

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `op`, `site`, `model`, `train`, `e2e`, [`LAYER`] or [`CEILING`].
    pub bench: String,
    /// Operator and case, or model.
    pub case: String,
    /// `forward`, `backward`, `training step`, `20 steps`, …
    pub work: String,
    /// What was varied, by name: batch, tokens, percent of layers grafted.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub axes: BTreeMap<String, f64>,
    /// The way of running the operator that was asked for; none where it was chosen as always.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub way: Option<String>,
    /// Backend: `cpu` or `cuda`.
    pub backend: String,
    /// Working type.
    pub element: String,
    /// Name of the device.
    pub device: String,
    /// Threads of operators; none on a GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Median milliseconds of one call.
    pub ms: f64,
    /// Fastest call.
    pub ms_min: f64,
    /// Nine of ten calls are at least as fast.
    pub ms_p90: f64,
    /// Calls measured.
    pub samples: usize,
    /// Floating-point operations of one call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flops: Option<f64>,
    /// Bytes that one call must move at the least.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<f64>,
    /// Exponentials of one call, where they are counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exps: Option<f64>,
    /// Milliseconds that the cost model predicts from the ceilings of the same run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predicted_ms: Option<f64>,
    /// Clock after the calls in MHz, where it can be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mhz: Option<f64>,
    /// Power after the calls in watts, where it can be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watts: Option<f64>,
    /// Most bytes of tensors at one time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
    /// Version of the program.
    pub version: String,
}

impl Row {
    /// TFLOP/s, where operations are counted.
    pub fn tflops(&self) -> Option<f64> {
        self.flops.map(|flops| flops / self.ms / 1e9)
    }

    /// GB/s of the bytes that must be moved.
    pub fn gbs(&self) -> Option<f64> {
        self.bytes.map(|bytes| bytes / self.ms / 1e6)
    }

    /// Everything that two rows must share to be measurements of the same thing.
    pub fn subject(&self) -> String {
        let Row { bench, case, work, backend, element, device, .. } = self;
        let threads = self.threads.map_or(String::new(), |n| format!(", {n} threads"));
        format!("{bench} {case} {work}{} on {backend} {element} ({device}{threads})", self.axes_in_words())
    }

    /// `, batch 2, tokens 256`, with the way that was asked for.
    pub fn axes_in_words(&self) -> String {
        let axes: String = self.axes.iter().map(|(name, value)| format!(", {name} {value}")).collect();
        self.way.as_ref().map_or(axes.clone(), |way| format!("{axes}, way {way}"))
    }
}

/// Reads a file of rows, a JSON object a line; lines of other kinds are left out.
///
/// # Errors
/// A file that cannot be read, a damaged line, or one without a row.
pub fn read(path: &Path) -> Result<Vec<Row>> {
    let rows: Vec<Row> = jsonl::read(path)?.into_iter().filter_map(|v| serde_json::from_value(v).ok()).collect();
    if rows.is_empty() {
        return Err(Error::failure(path.display().to_string(), "holds no measured row")
            .must("lines that graft bench has written"));
    }
    Ok(rows)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn row(bench: &str, case: &str, ms: f64) -> Row {
        Row {
            bench: bench.into(),
            case: case.into(),
            work: "forward".into(),
            axes: BTreeMap::from([("batch".to_string(), 2.0)]),
            way: None,
            backend: "cpu".into(),
            element: "f32".into(),
            device: "X".into(),
            threads: Some(2),
            ms,
            ms_min: 0.95 * ms,
            ms_p90: 1.05 * ms,
            samples: 5,
            flops: Some(4e9),
            bytes: Some(2e6),
            exps: None,
            predicted_ms: None,
            mhz: None,
            watts: None,
            peak_bytes: None,
            version: "0".into(),
        }
    }

    #[test]
    fn rows_are_read_back_and_say_what_they_measure() {
        let text = serde_json::to_string(&row("model", "DiT-S/2", 3.0)).unwrap();
        let back: Row = serde_json::from_str(&text).unwrap();
        assert_eq!(back.subject(), "model DiT-S/2 forward, batch 2 on cpu f32 (X, 2 threads)");
        assert!(!text.contains("peak_bytes") && !text.contains("way"));
        let forced = Row { way: Some("wgmma".into()), ..back };
        assert_eq!(forced.subject(), "model DiT-S/2 forward, batch 2, way wgmma on cpu f32 (X, 2 threads)");
    }
}
