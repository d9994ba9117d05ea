//! Rows of ours alone: GPUs, pictures from text, loading, growth, the cost model.

use super::rows::{self, Row, digits, newest, table};
use super::targets::rate;
use crate::error::Result;
use crate::io::files;
use crate::report::bench::COLD;
use serde_json::Value;
use std::path::Path;

/// Folder of the committed plots, below `docs`.
const PLOTS: &str = "results";

fn mebibytes(value: &Value) -> String {
    value.as_f64().map_or("-".to_string(), |bytes| format!("{:.0}", bytes / f64::from(1 << 20)))
}

/// What a row was measured at: `batch 2, percent grafted 50, tokens 16384`.
fn at(row: &Row) -> String {
    let axes = row.value["axes"].as_object().into_iter().flatten();
    let words = axes.filter_map(|(name, value)| match name.as_str() {
        COLD => Some(name.clone()),
        _ => Some(format!("{name} {}", value.as_f64()?)),
    });
    words.collect::<Vec<_>>().join(", ")
}

/// The larger of a row's shares of the device's rate of copies and of products; the ceilings themselves have none.
fn of_ceiling(row: &Row, rows: &[Row]) -> String {
    if row.maybe("bench") == Some("ceiling") {
        return "-".to_string();
    }
    let share = |ceiling, amount| Some(row.maybe_number(amount)? / row.ms()? / rate(row, rows, ceiling, amount)?);
    let both = [share("copy", "bytes"), share("product", "flops")];
    both.into_iter().flatten().max_by(f64::total_cmp).map_or("-".into(), |share| format!("{:.0} %", 100.0 * share))
}

/// Every row that a GPU gave.
///
/// # Errors
/// A row that lacks a field.
pub fn gpu(rows: &[Row]) -> Result<String> {
    let chosen = rows.iter().filter(|r| r.maybe("backend") == Some("cuda") && !r.is_paired());
    let chosen =
        newest(chosen, |r| [r.device().to_string(), r.subject(), r.work().to_string(), r.element().to_string(), at(r)]);
    let mut lines = Vec::new();
    for row in chosen {
        let rate = |key: &str, scale: f64| {
            row.maybe_number(key).zip(row.ms()).map_or("-".into(), |(n, ms)| digits(n / ms * scale))
        };
        lines.push(vec![
            row.device().to_string(),
            row.subject(),
            row.work().to_string(),
            row.element().to_string(),
            at(row),
            row.ms().map_or("-".into(), digits),
            rate("bytes", 1e-6),
            rate("flops", 1e-9),
            of_ceiling(row, rows),
        ]);
    }
    let heads = ["GPU", "case", "work", "dtype", "at", "ms", "GB/s", "TFLOP/s", "of the ceiling"];
    Ok(table(&heads, &lines, "Not measured: no row of a GPU is committed."))
}

/// Stages of pictures from text, with the bytes that were planned and seen.
///
/// # Errors
/// A row that lacks a field.
pub fn text_to_image(rows: &[Row]) -> Result<String> {
    let chosen = newest(rows.iter().filter(|r| r.maybe("case") == Some("text_to_image")), |r| {
        let size = [r.value["width"].to_string(), r.value["height"].to_string(), r.value["steps"].to_string()];
        (r.device().to_string(), r.maybe("model").unwrap_or_default().to_string(), r.element().to_string(), size)
    });
    let mut lines = Vec::new();
    for row in chosen {
        let what = format!(
            "{}, {} x {}, {} steps, guidance {}",
            row.text("model")?,
            row.number("width")?,
            row.number("height")?,
            row.number("steps")?,
            row.number("guidance_scale")?
        );
        for stage in row.value["stages"].as_array().unwrap_or(&Vec::new()) {
            lines.push(vec![
                row.device().to_string(),
                what.clone(),
                row.element().to_string(),
                row.value["threads"].to_string(),
                stage["stage"].as_str().unwrap_or("?").to_string(),
                stage["seconds"].as_f64().map_or("-".into(), digits),
                mebibytes(&stage["bytes_planned"]),
                mebibytes(&stage["bytes_of_tensors"]),
                mebibytes(&stage["bytes_peak"]),
            ]);
        }
    }
    let heads = [
        "processor",
        "picture",
        "dtype",
        "threads",
        "stage",
        "seconds",
        "tensors planned, MiB",
        "tensors seen, MiB",
        "process at its peak, MiB",
    ];
    Ok(table(&heads, &lines, "Not measured."))
}

/// Loading against the disk.
///
/// # Errors
/// A row that lacks a field.
pub fn loading(rows: &[Row]) -> Result<String> {
    let chosen = newest(rows.iter().filter(|r| r.maybe("bench") == Some("load")), |r| {
        (r.device().to_string(), r.maybe("work").unwrap_or_default().to_string(), r.value["bytes"].to_string())
    });
    let mut lines = Vec::new();
    for row in chosen {
        let (bytes, load, read) = (row.number("bytes")?, row.number("load_ms")?, row.number("read_ms")?);
        lines.push(vec![
            row.device().to_string(),
            row.maybe("work").unwrap_or("load").to_string(),
            format!("{:.2}", bytes / 1e9),
            format!("{:.2}", load / 1e3),
            format!("{:.2}", bytes / load / 1e6),
            format!("{:.2}", bytes / read / 1e6),
            format!("{:.0} %", 100.0 * row.number("share")?),
        ]);
    }
    let heads = ["processor", "what", "GB", "seconds", "GB/s", "sequential read, GB/s", "share of the disk"];
    Ok(table(&heads, &lines, "Not measured."))
}

/// The cost model beside what was measured: its median and its worst error of each device.
///
/// # Errors
/// A row that lacks a field.
pub fn cost_model(rows: &[Row]) -> Result<String> {
    let chosen = newest(rows.iter().filter(|r| r.maybe_number("predicted_ms").is_some_and(|p| p > 0.0)), |r| {
        let words = [r.device(), r.element(), r.work()].map(str::to_string);
        (words, r.subject(), r.value["threads"].to_string(), r.value["axes"].to_string())
    });
    let mut groups: std::collections::BTreeMap<String, Vec<(f64, String)>> = std::collections::BTreeMap::new();
    for row in chosen {
        let (predicted, measured) = (row.number("predicted_ms")?, row.number("ms")?);
        let threads = row.maybe_number("threads").map_or(String::new(), |n| format!(", {n} threads"));
        let kind =
            if row.maybe("bench") == Some("layer") { "operators within a model" } else { "operators by themselves" };
        let group = format!("{}{threads}, {}: {kind}", row.device(), row.element());
        let what = format!(
            "{} {}: predicted {}, measured {} ms",
            row.subject(),
            row.work(),
            digits(predicted),
            digits(measured)
        );
        groups.entry(group).or_default().push(((measured / predicted).ln(), what));
    }
    let mut lines = Vec::new();
    for (group, mut errors) in groups {
        errors.sort_by(|a, b| a.0.abs().total_cmp(&b.0.abs()));
        let median = errors[errors.len() / 2].0.abs().exp();
        let (worst, what) = errors[errors.len() - 1].clone();
        let within = errors.iter().filter(|(e, _)| e.abs() <= 2f64.ln()).count();
        lines.push(vec![
            group,
            errors.len().to_string(),
            format!("{median:.2}"),
            format!("{within} of {}", errors.len()),
            format!("{:.1}: {what}", worst.abs().exp()),
        ]);
    }
    let heads = ["device", "rows", "median factor between prediction and time", "within 2 times", "worst factor"];
    Ok(table(&heads, &lines, "Not measured."))
}

/// The committed plots.
///
/// # Errors
/// A folder that cannot be read.
pub fn growth(root: &Path, rows: &[Row]) -> Result<String> {
    let plots = rows::entries(&root.join("docs").join(PLOTS))?;
    let names = plots.iter().filter(|p| p.extension().is_some_and(|e| e == "svg"));
    let names = names.map(|p| files::file_name(p));
    let measured = rows.iter().filter(|r| r.value["axes"].is_object() && r.maybe("bench") != Some("layer")).count();
    let mut out = String::new();
    for name in names {
        let title = name.trim_end_matches(".svg").replace('-', " ");
        out += &format!("![{title}]({PLOTS}/{name})\n\n");
    }
    if out.is_empty() {
        return Ok("Not measured.\n".into());
    }
    Ok(out + &format!("Drawn from {measured} rows.\n"))
}

#[cfg(test)]
mod tests {
    use super::super::rows::tests::row;
    use super::*;
    use serde_json::json;

    #[test]
    fn stages_show_planned_and_seen_bytes() {
        let rows = [row(
            json!({ "case": "text_to_image", "processor": "X", "model": "m", "width": 64, "height": 32, "steps": 2, "guidance_scale": 1.0, "dtype": "f32",
            "threads": 2, "stages": [{ "stage": "decoder", "seconds": 1.5, "bytes_planned": null, "bytes_of_tensors": 3 << 20, "bytes_peak": 4 << 20 }] }),
        )];
        let text = text_to_image(&rows).unwrap();
        assert!(
            text.ends_with("| X | m, 64 x 32, 2 steps, guidance 1 | f32 | 2 | decoder | 1.50 | - | 3 | 4 |\n"),
            "{text}"
        );
    }

    #[test]
    fn the_error_of_the_model_is_a_factor_in_either_direction() {
        let of = |case: &str, predicted: f64, ms: f64| {
            row(
                json!({ "bench": "op", "device": "X", "threads": 2, "element": "f32", "case": case, "work": "forward", "predicted_ms": predicted, "ms": ms }),
            )
        };
        let text = cost_model(&[of("a", 1.0, 1.1), of("b", 4.0, 1.0), of("c", 1.0, 1.5)]).unwrap();
        let want = "| X, 2 threads, f32: operators by themselves | 3 | 1.50 | 2 of 3 | 4.0: b forward: predicted 4.00, measured 1.00 ms |\n";
        assert!(text.ends_with(want), "{text}");
    }

    #[test]
    fn what_has_no_row_says_so() {
        for text in [gpu(&[]), text_to_image(&[]), loading(&[]), cost_model(&[])] {
            assert!(text.unwrap().starts_with("Not measured"));
        }
    }
}
