//! How cost grows along what was varied: curves for a page, and plots that are files.

use super::{CEILING, LAYER, Row};
use crate::io::files::slug;
use crate::report::chart::{LineChart, Series};
use std::collections::{BTreeMap, BTreeSet};

/// The axis of grafted layers, for which the gain is shown as well.
const GRAFTED: &str = "percent grafted";
/// Threads are varied between runs.
const THREADS: &str = "threads";
/// Axes that double from point to point.
const DOUBLING: [&str; 3] = ["tokens", "batch", THREADS];

/// The charts of a set of rows of one device and working type: milliseconds along each thing that was varied, a curve
/// for each setting of the rest, and the gain from grafting.
pub fn charts(rows: &[Row]) -> Vec<(String, LineChart)> {
    let counts = |r: &&Row| r.bench != CEILING && r.bench != LAYER && r.way.is_none();
    let rows: Vec<Row> = rows.iter().filter(counts).map(with_threads).collect();
    let kinds: BTreeSet<&String> = rows.iter().map(|r| &r.bench).collect();
    let mut charts = Vec::new();
    for kind in kinds {
        let of: Vec<&Row> = rows.iter().filter(|r| &r.bench == kind).collect();
        let names: BTreeSet<&String> = of.iter().flat_map(|r| r.axes.keys()).collect();
        for name in names {
            let curves = curves(&of, name);
            if curves.is_empty() {
                continue;
            }
            let chart = |title: String, y_label: &str, log_y: bool, series: Vec<Series>| LineChart {
                title,
                x_label: name.clone(),
                y_label: y_label.into(),
                log_x: DOUBLING.contains(&name.as_str()),
                log_y,
                series,
            };
            if name == GRAFTED {
                let series: Vec<Series> = curves.iter().filter_map(|s| gain(s)).collect();
                if !series.is_empty() {
                    let title = format!("{kind}: times as fast as without grafting");
                    charts.push((format!("{kind} gain"), chart(title, "times", false, series)));
                }
            }
            charts.push((format!("{kind} {name}"), chart(format!("{kind}: time along {name}"), "ms", true, curves)));
        }
    }
    charts
}

/// Every chart of committed rows as a picture, by the name of its file.
pub fn plots(rows: &[Row]) -> BTreeMap<String, String> {
    let mut groups: BTreeMap<String, Vec<Row>> = BTreeMap::new();
    for row in rows {
        groups.entry(format!("{} {}", row.device, row.element)).or_default().push(row.clone());
    }
    let mut files = BTreeMap::new();
    for (group, rows) in groups {
        for (what, mut chart) in charts(&rows) {
            chart.title = format!("{group}: {}", chart.title);
            files.insert(format!("{}.svg", slug(&format!("{group} {what}"))), chart.file());
        }
    }
    files
}

fn with_threads(row: &Row) -> Row {
    let mut row = row.clone();
    if let Some(threads) = row.threads {
        row.axes.insert(THREADS.into(), threads as f64);
    }
    row
}

/// The curves along one axis; the label of each says what differs from the others.
fn curves(rows: &[&Row], axis: &str) -> Vec<Series> {
    let mut found: BTreeMap<(String, String, String), Vec<(f64, f64)>> = BTreeMap::new();
    let mut settings: BTreeMap<&String, BTreeSet<String>> = BTreeMap::new();
    for row in rows {
        row.axes.iter().for_each(|(name, value)| {
            settings.entry(name).or_default().insert(value.to_string());
        });
    }
    for row in rows.iter().filter(|r| r.axes.contains_key(axis)) {
        let rest = row.axes.iter().filter(|(name, _)| *name != axis && settings[name].len() > 1);
        let rest: String = rest.map(|(name, value)| format!(", {name} {value}")).collect();
        found.entry((row.case.clone(), row.work.clone(), rest)).or_default().push((row.axes[axis], row.ms));
    }
    found.retain(|_, points| {
        // The last row of a place counts.
        points.reverse();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points.dedup_by(|a, b| a.0 == b.0);
        points.len() > 1
    });
    let several = found.keys().map(|(_, work, _)| work).collect::<BTreeSet<_>>().len() > 1;
    let name = |(case, work, rest): (String, String, String)| {
        if several { format!("{case} {work}{rest}") } else { format!("{case}{rest}") }
    };
    found.into_iter().map(|(key, points)| Series::curve(name(key), points)).collect()
}

/// How many times as fast as at nothing grafted.
fn gain(times: &Series) -> Option<Series> {
    let before = times.points.first().filter(|p| p.0 == 0.0)?.1;
    Some(Series::curve(times.name.clone(), times.points.iter().map(|(x, ms)| (*x, before / ms)).collect()))
}

#[cfg(test)]
mod tests {
    use super::super::tests::row;
    use super::*;
    use crate::report::html::check::well_formed;

    fn at(axis: &str, value: f64, ms: f64) -> Row {
        let mut r = row("model", "DiT-S/2", ms);
        r.axes.insert(axis.into(), value);
        r
    }

    #[test]
    fn a_gain_is_the_time_without_over_the_time_with() {
        let rows = [at(GRAFTED, 0.0, 8.0), at(GRAFTED, 50.0, 4.0), at(GRAFTED, 100.0, 2.0), at(GRAFTED, 100.0, 1.0)];
        let found = charts(&rows);
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["model gain", "model percent grafted"]);
        assert_eq!(found[0].1.series[0].points, [(0.0, 1.0), (50.0, 2.0), (100.0, 8.0)]);
        assert_eq!(found[0].1.series[0].name, "DiT-S/2");
    }

    #[test]
    fn threads_are_an_axis_and_only_what_differs_is_named() {
        let mut rows = vec![at("tokens", 256.0, 4.0), at("tokens", 1024.0, 16.0)];
        rows[1].threads = Some(1);
        let mut third = at("tokens", 256.0, 7.0);
        third.threads = Some(1);
        rows.push(third);
        let found = charts(&rows);
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["model threads", "model tokens"]);
        assert_eq!(found[0].1.series[0].name, "DiT-S/2, tokens 256");
        assert_eq!(found[1].1.series[0].points, [(256.0, 7.0), (1024.0, 16.0)]);
        for (name, text) in plots(&rows) {
            assert!(name.starts_with("x-f32-model-") && name.ends_with(".svg"), "{name}");
            well_formed(&text);
        }
        assert!(plots(&[row(CEILING, "copy", 1.0)]).is_empty());
        rows.iter_mut().for_each(|r| r.way = Some("forced".into()));
        assert!(charts(&rows).is_empty());
    }
}
