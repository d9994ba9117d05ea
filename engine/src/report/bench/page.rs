//! The page of a file of rows: every row with its share of the ceiling, a roofline, and how cost grows along what was
//! varied.

use super::{CEILING, Ceilings, Row};
use crate::report::chart::{LineChart, Series};
use crate::report::format::significant;
use crate::report::html::{self, Html};
use std::collections::BTreeMap;

/// Points of the roofline's curve.
const ROOF: usize = 60;
/// Operations per byte that the roofline spans, as powers of ten.
const SPAN: (f64, f64) = (-1.0, 4.0);

/// A self-contained page.
pub fn page(title: &str, rows: &[Row]) -> String {
    html::page(title, |h| {
        h.leaf("h1", &[], title);
        for (device, list) in by_device(rows) {
            h.leaf("h2", &[], &device);
            ceilings(h, &list);
            roofline(h, &list);
            growth(h, &list);
            table(h, &list);
        }
    })
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
    let words = |value: Option<f64>, scale: f64, unit: &str| {
        value.map_or(format!("{unit} not measured"), |v| format!("{} {unit}", significant(v * scale)))
    };
    let text = format!("Ceilings of this run: {}, {}.", words(c.copy, 1e-6, "GB/s"), words(c.product, 1e-9, "TFLOP/s"));
    h.leaf("p", &[("class", "note")], &text);
}

fn roofline(h: &mut Html, rows: &[Row]) {
    let Some(c) = rows.first().map(|row| Ceilings::of(rows, row)) else { return };
    let (Some(copy), Some(product)) = (c.copy, c.product) else { return };
    let measured: Vec<(f64, f64)> = rows
        .iter()
        .filter(|r| r.bench != CEILING)
        .filter_map(|r| Some(((r.flops? / r.bytes?).log10(), r.tflops()? * 1e3)))
        .collect();
    if measured.is_empty() {
        return;
    }
    let at = |i: usize| SPAN.0 + (SPAN.1 - SPAN.0) * i as f64 / (ROOF - 1) as f64;
    let roof = (0..ROOF).map(|i| (at(i), (10f64.powf(at(i)) * copy).min(product) / 1e6)).collect();
    let mut series = vec![Series { name: "roof".into(), points: roof }];
    // A chart has curves, no dots: the measured operators in the order of their intensity.
    let mut measured = measured;
    measured.sort_by(|a, b| a.0.total_cmp(&b.0));
    series.push(Series { name: "measured".into(), points: measured });
    h.leaf("h3", &[], "Roofline");
    let chart = LineChart {
        title: "GFLOP/s against operations per byte".into(),
        x_label: "operations per byte, power of ten".into(),
        y_label: "GFLOP/s".into(),
        log_y: true,
        series,
    };
    chart.draw(h);
}

/// A chart for each thing that was varied alone: milliseconds along it, a curve for each setting of the rest.
fn growth(h: &mut Html, rows: &[Row]) {
    let names: std::collections::BTreeSet<&String> = rows.iter().flat_map(|r| r.axes.keys()).collect();
    for name in names {
        let mut curves: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
        for row in rows.iter().filter(|r| r.axes.contains_key(name)) {
            let mut rest = row.clone();
            let at = rest.axes.remove(name).unwrap_or_default();
            let label = format!("{} {}{}", rest.case, rest.work, rest.axes_in_words());
            curves.entry(label).or_default().push((at, row.ms));
        }
        curves.retain(|_, points| {
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            points.dedup_by(|a, b| a.0 == b.0);
            points.len() > 1
        });
        if curves.is_empty() {
            continue;
        }
        h.leaf("h3", &[], &format!("Time along {name}"));
        let series = curves.into_iter().map(|(name, points)| Series { name, points }).collect();
        let title = format!("milliseconds along {name}");
        LineChart { title, x_label: name.clone(), y_label: "ms".into(), log_y: true, series }.draw(h);
    }
}

fn table(h: &mut Html, rows: &[Row]) {
    h.element("table", &[], |h| {
        h.element("tr", &[], |h| {
            for head in
                ["what", "work", "varied", "ms", "fastest", "GB/s", "TFLOP/s", "share of the ceiling", "peak MiB"]
            {
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
        let page = page("Bench", &rows);
        well_formed(&page);
        for words in ["Time along tokens", "Roofline", "% of", "DiT-S/2 &lt;&amp;&gt;"] {
            assert!(page.contains(words), "{words}");
        }
        assert!(!page.contains("Time along batch"), "one value is no growth");
    }
}
