//! The page of a file of rows: every row with its share of the ceiling, a roofline, where the time of a forward pass
//! goes, the cost model beside what was measured, how cost grows along what was varied, and what was tried at each
//! operator.

use super::misfit::Misfit;
use super::{CEILING, Ceilings, LAYER, Row, curves};
use crate::report::chart::{LineChart, Series};
use crate::report::format::significant;
use crate::report::html::{self, Html};
use crate::report::ladder;
use crate::report::results::ladders::Ladder;
use crate::report::stack::StackChart;
use std::collections::BTreeMap;

/// Points of the roofline's curve.
const ROOF: usize = 60;
/// Operations per byte that the roofline spans, as powers of ten.
const SPAN: (f64, f64) = (-1.0, 4.0);

/// A self-contained page; of the `ladders` those of the operators that were measured.
pub fn page(title: &str, rows: &[Row], ladders: &[Ladder]) -> String {
    html::page(title, |h| {
        h.leaf("h1", &[], title);
        growth(h, rows);
        for (device, list) in by_device(rows) {
            h.leaf("h2", &[], &device);
            // What was run in a way that was asked for stands in the table alone.
            let chosen: Vec<Row> = list.iter().filter(|row| row.way.is_none()).cloned().collect();
            ceilings(h, &chosen);
            roofline(h, &chosen);
            layers(h, &chosen);
            predictions(h, &chosen);
            table(h, &list);
        }
        beside_ladders(h, rows, ladders);
    })
}

/// The ladders, each below the rows of its operator with what was predicted of them.
fn beside_ladders(h: &mut Html, rows: &[Row], ladders: &[Ladder]) {
    let mut found: BTreeMap<&str, Vec<Vec<String>>> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.bench == "op") {
        let factor = row.predicted_ms.map_or("-".into(), |predicted| significant(row.ms / predicted));
        let line = [
            row.case.clone(),
            format!("{}{}", row.work, row.axes_in_words()),
            format!("{}, {}", row.device, row.element),
            row.predicted_ms.map_or("-".into(), significant),
            significant(row.ms),
            factor,
        ];
        let (op, _) = row.case.split_once('/').unwrap_or((&row.case, ""));
        found.entry(op).or_default().push(line.to_vec());
    }
    let heads = ["case", "work", "device", "predicted, ms", "measured, ms", "measured over predicted"];
    ladder::draw(h, ladders, &heads, &found);
}

/// Rows of each device with its threads and working type.
fn by_device(rows: &[Row]) -> BTreeMap<String, Vec<Row>> {
    let mut found: BTreeMap<String, Vec<Row>> = BTreeMap::new();
    for row in rows {
        let threads = row.threads.map_or(String::new(), |n| format!(", {n} threads"));
        found.entry(format!("{}{threads}, {}", row.device, row.element)).or_default().push(row.clone());
    }
    found
}

fn ceilings(h: &mut Html, rows: &[Row]) {
    let c = rows.first().map(|row| Ceilings::of(rows, row)).unwrap_or_default();
    let words = |what: &str, value: Option<f64>, scale: f64, unit: &str| match value {
        None => format!("{what} not measured"),
        Some(v) => format!("{what} {} {unit}", significant(v * scale)),
    };
    let text = format!(
        "Ceilings of this run: {}, {}, {}, {}, {}.",
        words("copy", c.copy, 1e-6, "GB/s"),
        words("copy in the caches", c.cached, 1e-6, "GB/s"),
        words("product", c.product, 1e-9, "TFLOP/s"),
        words("exponentials", c.exps, 1e-6, "G/s"),
        words("a call with no work", c.call, 1e3, "µs"),
    );
    h.leaf("p", &[("class", "note")], &text);
    let range = |value: &dyn Fn(&Row) -> Option<f64>, unit: &str| {
        let found: Vec<f64> = rows.iter().filter_map(value).collect();
        let least = found.iter().copied().reduce(f64::min);
        match least.zip(found.iter().copied().reduce(f64::max)) {
            None => "not readable".to_string(),
            Some((least, most)) => format!("{} to {} {unit}", significant(least), significant(most)),
        }
    };
    let text = format!("Clock: {}. Power: {}.", range(&|r| r.mhz, "MHz"), range(&|r| r.watts, "W"));
    h.leaf("p", &[("class", "note")], &text);
}

fn roofline(h: &mut Html, rows: &[Row]) {
    let Some(c) = rows.first().map(|row| Ceilings::of(rows, row)) else { return };
    let (Some(copy), Some(product)) = (c.copy, c.product) else { return };
    let dots = |bench: &str| -> Vec<(f64, f64)> {
        let of = rows.iter().filter(|r| r.bench == bench);
        let of = of.filter_map(|r| Some((r.flops? / r.bytes?, r.tflops()? * 1e3)));
        of.filter(|(intensity, rate)| *intensity > 0.0 && *rate > 0.0).collect()
    };
    let (operators, parts) = (dots("op"), dots(LAYER));
    let Some(least) = operators.iter().chain(&parts).map(|p| p.0).reduce(f64::min) else { return };
    let from = least.log10().floor().min(SPAN.0);
    let at = |i: usize| 10f64.powf(from + (SPAN.1 - from) * i as f64 / (ROOF - 1) as f64);
    let roof = (0..ROOF).map(|i| (at(i), (at(i) * copy).min(product) / 1e6)).collect();
    let mut series = vec![Series::curve("roof: copy and product of this run", roof)];
    for (name, points) in [("operators by themselves", operators), ("operators within a model", parts)] {
        if !points.is_empty() {
            series.push(Series::dots(name, points));
        }
    }
    h.leaf("h3", &[], "Roofline");
    let chart = LineChart {
        title: "GFLOP/s against operations per byte".into(),
        x_label: "operations per byte".into(),
        y_label: "GFLOP/s".into(),
        log_x: true,
        log_y: true,
        series,
    };
    h.element("figure", &[], |h| {
        chart.draw(h);
        h.leaf("figcaption", &[], "A dot above the sloping part is a case whose tensors stay in the caches.");
    });
}

/// Every layer of a forward pass as a bar of its operators.
fn layers(h: &mut Html, rows: &[Row]) {
    let mut models: BTreeMap<String, BTreeMap<u64, Vec<(String, f64)>>> = BTreeMap::new();
    for row in rows.iter().filter(|r| r.bench == LAYER) {
        let mut rest = row.clone();
        let layer = rest.axes.remove(LAYER).unwrap_or_default();
        let model = format!("{}{}", rest.case, rest.axes_in_words());
        let parts = models.entry(model).or_default().entry(layer as u64).or_default();
        parts.retain(|(op, _)| *op != row.work);
        parts.push((row.work.clone(), row.ms));
    }
    for (model, layers) in models {
        let last = layers.keys().next_back().copied().unwrap_or_default();
        let name = |layer: u64| match layer {
            0 => "embeddings".to_string(),
            l if l == last => "last layer".to_string(),
            l => format!("block {l}"),
        };
        h.leaf("h3", &[], &format!("Where the time of a forward pass goes: {model}"));
        let bars = layers.into_iter().map(|(layer, parts)| (name(layer), parts)).collect();
        h.element("figure", &[], |h| StackChart::of("milliseconds of each operator by layer", "ms", bars).draw(h));
    }
}

/// The cost model beside the measured rows, and its error.
fn predictions(h: &mut Html, rows: &[Row]) {
    let Some(error) = Misfit::of(rows) else { return };
    h.leaf("h3", &[], "Predicted and measured");
    h.leaf("p", &[("class", "note")], &error.to_string());
    let of = |layer: bool| -> Vec<(f64, f64)> {
        let of = rows.iter().filter(|r| (r.bench == LAYER) == layer);
        of.filter_map(|r| Some((r.predicted_ms?, r.ms))).collect()
    };
    let (alone, within) = (of(false), of(true));
    let all = || alone.iter().chain(&within).flat_map(|(a, b)| [*a, *b]);
    let (least, most) = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    let mut series = vec![Series::curve("equal", vec![(least, least), (most, most)])];
    for (name, points) in [("by themselves", alone), ("within a model", within)] {
        if !points.is_empty() {
            series.push(Series::dots(name, points));
        }
    }
    let chart = LineChart {
        title: "measured milliseconds against predicted ones".into(),
        x_label: "predicted, ms".into(),
        y_label: "measured, ms".into(),
        log_x: true,
        log_y: true,
        series,
    };
    h.element("figure", &[], |h| chart.draw(h));
}

fn growth(h: &mut Html, rows: &[Row]) {
    for (_, chart) in curves::charts(rows) {
        h.leaf("h3", &[], &chart.title);
        h.element("figure", &[], |h| chart.draw(h));
    }
}

fn table(h: &mut Html, rows: &[Row]) {
    h.element("div", &[("class", "scroll")], |h| rows_table(h, rows));
}

fn rows_table(h: &mut Html, rows: &[Row]) {
    h.element("table", &[], |h| {
        h.element("tr", &[], |h| {
            for head in [
                "what",
                "work",
                "varied",
                "ms",
                "predicted",
                "fastest",
                "GB/s",
                "TFLOP/s",
                "share of the ceiling",
                "peak MiB",
            ] {
                h.leaf("th", &[], head);
            }
        });
        for row in rows {
            let number = |value: Option<f64>| value.map_or("-".to_string(), significant);
            let share = Ceilings::of(rows, row).share(row).filter(|_| row.bench != CEILING);
            let varied = row.axes_in_words();
            let cells = [
                row.case.clone(),
                row.work.clone(),
                varied.trim_start_matches(", ").to_string(),
                significant(row.ms),
                number(row.predicted_ms),
                significant(row.ms_min),
                number(row.gbs()),
                number(row.tflops()),
                share.map_or("-".into(), |(share, of)| format!("{:.0} % of {of}", 100.0 * share)),
                number(row.peak_bytes.map(|b| b as f64 / f64::from(1 << 20))),
            ];
            h.element("tr", &[], |h| cells.iter().for_each(|cell| h.leaf("td", &[], cell)));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::tests::row;
    use super::super::{COPY, PRODUCT};
    use super::*;
    use crate::report::html::check::well_formed;

    #[test]
    fn a_page_shows_shares_and_growth() {
        let mut rows = vec![row(CEILING, COPY, 1.0), row(CEILING, PRODUCT, 0.5)];
        for tokens in [256.0, 1024.0] {
            let mut r = row("model", "DiT-S/2 <&>", tokens / 100.0);
            r.axes.insert("tokens".into(), tokens);
            rows.push(r);
        }
        let page = page("Bench", &rows, &[]);
        well_formed(&page);
        for words in ["time along tokens", "% of", "DiT-S/2 &lt;&amp;&gt;", "Power: not readable."] {
            assert!(page.contains(words), "{words}");
        }
        assert!(!page.contains("time along batch"), "one value is no growth");
        assert!(!page.contains("Roofline") && !page.contains("Predicted"), "no operator was measured");
    }

    #[test]
    fn layers_and_predictions_are_drawn_where_they_were_measured() {
        let mut rows = vec![row(CEILING, COPY, 1.0), row(CEILING, PRODUCT, 0.5)];
        for (layer, op, ms) in [(0.0, "patchify", 1.0), (1.0, "gemm", 3.0), (1.0, "attention", 2.0), (2.0, "gemm", 1.0)]
        {
            let mut r = row(LAYER, "DiT-S/2", ms);
            r.work = op.into();
            r.axes.insert(LAYER.into(), layer);
            r.predicted_ms = Some(ms / 2.0);
            rows.push(r);
        }
        let page = page("Bench", &rows, &[]);
        well_formed(&page);
        let words = ["Roofline", "block 1", "last layer", "5.00 ms", "Predicted and measured", "a factor of 2.00"];
        for words in words {
            assert!(page.contains(words), "{words}: {page}");
        }
    }

    #[test]
    fn a_ladder_stands_below_what_was_predicted_of_its_operator() {
        let mut rows = vec![row("op", "gemm/fc1", 3.0), row("op", "attention/a", 1.0)];
        rows[0].predicted_ms = Some(2.0);
        let ladder = Ladder { op: "gemm".into(), title: " (CPU)".into(), text: "tiles of 14×32".into() };
        let page = page("Bench", &rows, &[ladder]);
        well_formed(&page);
        let after = page.split_once("Ladders").map(|(_, after)| after).unwrap();
        assert!(
            after.contains("<td>2.00</td><td>3.00</td><td>1.50</td>") && after.contains("tiles of 14×32"),
            "{after}"
        );
        assert!(!after.contains("attention/a"));
    }
}
