//! Charts as inline SVG: lines over a linear or logarithmic axis, and horizontal bars.
//!
//! Colours come from the page's style sheet (classes `s0` to `s5`), so that charts follow light and dark screens.

use super::format::significant;
use super::html::{self, Html};

/// Size of a line chart in SVG units; the page scales it.
const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 300.0;
/// Margins around the plot: left, right, top, bottom.
const MARGIN: [f64; 4] = [58.0, 14.0, 28.0, 42.0];
/// Points that a curve keeps; longer ones are averaged in equal runs, with a band from the least to the largest.
const POINTS: usize = 240;
/// Most curves of a chart that have their bands drawn; more would hide each other.
const BANDS: usize = 2;
/// Colours of the style sheet.
pub(super) const COLOURS: usize = 6;

/// A named curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// (x, y) with growing x; points that are not finite are left out.
    pub points: Vec<(f64, f64)>,
    /// Points by themselves, joined by nothing.
    pub dots: bool,
}

impl Series {
    /// A curve.
    pub fn curve(name: impl Into<String>, points: Vec<(f64, f64)>) -> Series {
        Series { name: name.into(), points, dots: false }
    }

    /// Points by themselves.
    pub fn dots(name: impl Into<String>, points: Vec<(f64, f64)>) -> Series {
        Series { name: name.into(), points, dots: true }
    }
}

/// Curves over one pair of axes.
#[derive(Clone, Debug, PartialEq)]
pub struct LineChart {
    /// What it shows, for those who cannot see it.
    pub title: String,
    /// Horizontal axis.
    pub x_label: String,
    /// Vertical axis.
    pub y_label: String,
    /// Logarithmic horizontal axis; points at or below zero are left out.
    pub log_x: bool,
    /// Logarithmic vertical axis; points at or below zero are left out.
    pub log_y: bool,
    /// Curves.
    pub series: Vec<Series>,
}

/// A group of bars with one label: one value per series, none where it was not measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Bars {
    /// Label.
    pub label: String,
    /// Values, not negative.
    pub values: Vec<Option<f64>>,
}

/// Horizontal bars from zero.
#[derive(Clone, Debug, PartialEq)]
pub struct BarChart {
    /// What it shows, for those who cannot see it.
    pub title: String,
    /// Names of the series; without a legend where there is one.
    pub series: Vec<String>,
    /// Groups from the top.
    pub groups: Vec<Bars>,
    /// A dashed line at a value, with its name.
    pub mark: Option<(f64, String)>,
}

/// A run of points of a curve.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Run {
    x: f64,
    mean: f64,
    low: f64,
    high: f64,
}

/// A linear map of one axis, of the value or of its decimal logarithm.
#[derive(Clone, Copy, Debug)]
struct Scale {
    log: bool,
    from: (f64, f64),
    to: (f64, f64),
}

impl Scale {
    fn at(&self, value: f64) -> f64 {
        let value = if self.log { value.log10() } else { value };
        self.to.0 + (value - self.from.0) / (self.from.1 - self.from.0) * (self.to.1 - self.to.0)
    }
}

impl LineChart {
    /// Draws legend and plot.
    pub fn draw(&self, h: &mut Html) {
        if self.series.len() > 1 {
            legend(h, self.series.iter().map(|s| s.name.as_str()));
        }
        svg(h, WIDTH, HEIGHT, &self.title, |h| self.plot(h));
    }

    /// The chart as a file of its own: title, legend, plot.
    pub fn file(&self) -> String {
        const LINE: f64 = 18.0;
        let top = LINE * (self.series.len() + 1) as f64 + 12.0;
        html::svg_file(WIDTH, HEIGHT + top, &self.title, |h| {
            label(h, "name", "start", (10.0, LINE), &self.title);
            for (index, series) in self.series.iter().enumerate() {
                let y = LINE * (index + 1) as f64;
                rectangle(h, &format!("bar s{}", index % COLOURS), (10.0, y + 8.0), (12.0, 12.0));
                label(h, "", "start", (28.0, y + LINE), &series.name);
            }
            h.element("g", &[("transform", &format!("translate(0,{})", number(top)))], |h| self.plot(h));
        })
    }

    fn plot(&self, h: &mut Html) {
        let series: Vec<Vec<Run>> = self.series.iter().map(|s| self.runs(&s.points)).collect();
        let all = || series.iter().flatten();
        let Some((x_range, y_range)) = range(all().map(|r| (r.x, r.x))).zip(range(all().map(|r| (r.low, r.high))))
        else {
            return label(h, "", "start", (MARGIN[0], HEIGHT / 2.0), "Nothing was recorded.");
        };
        let (y_ticks, y_from) = if self.log_y { log_ticks(y_range) } else { linear_ticks(padded(y_range)) };
        let (x_ticks, x_from) = match self.log_x {
            true => (self.powers_of_two().unwrap_or_else(|| log_ticks(x_range).0), log_ticks(x_range).1),
            false => (linear_ticks(x_range).0, widened(x_range)),
        };
        let x = Scale { log: self.log_x, from: x_from, to: (MARGIN[0], WIDTH - MARGIN[1]) };
        let y = Scale { log: self.log_y, from: y_from, to: (HEIGHT - MARGIN[3], MARGIN[2]) };
        for &tick in &y_ticks {
            line(h, "grid", (x.to.0, y.at(tick)), (x.to.1, y.at(tick)));
            label(h, "", "end", (x.to.0 - 8.0, y.at(tick) + 4.0), &tick_text(tick));
        }
        line(h, "axis", (x.to.0, y.to.0), (x.to.1, y.to.0));
        for &tick in x_ticks.iter().filter(|&&t| t >= x_range.0 && t <= x_range.1) {
            label(h, "", "middle", (x.at(tick), y.to.0 + 18.0), &tick_text(tick));
        }
        label(h, "", "end", (x.to.1, HEIGHT - 4.0), &self.x_label);
        label(h, "", "start", (x.to.0 - 50.0, 12.0), &self.y_label);
        for (index, (runs, series)) in series.iter().zip(&self.series).enumerate() {
            match series.dots {
                true => runs.iter().for_each(|run| dot(h, index, run, x, y)),
                false => draw_runs(h, index, runs, self.series.len() <= BANDS, x, y),
            }
        }
    }

    /// The places of the points where they are few powers of two: what doubles is read off best there.
    fn powers_of_two(&self) -> Option<Vec<f64>> {
        let mut places: Vec<f64> = self.series.iter().flat_map(|s| s.points.iter().map(|p| p.0)).collect();
        places.sort_by(f64::total_cmp);
        places.dedup();
        (places.len() <= 10 && places.iter().all(|p| *p >= 1.0 && p.log2().fract() == 0.0)).then_some(places)
    }

    /// Points that the axes can show, averaged in equal runs where there are many.
    fn runs(&self, points: &[(f64, f64)]) -> Vec<Run> {
        let shown = |&&(x, y): &&(f64, f64)| {
            x.is_finite() && y.is_finite() && (!self.log_y || y > 0.0) && (!self.log_x || x > 0.0)
        };
        let points: Vec<(f64, f64)> = points.iter().filter(shown).copied().collect();
        let length = points.len().div_ceil(POINTS).max(1);
        let run = |chunk: &[(f64, f64)]| {
            let n = chunk.len() as f64;
            let (low, high) = range(chunk.iter().map(|p| (p.1, p.1))).unwrap_or_default();
            let (x, mean) = (chunk.iter().map(|p| p.0).sum::<f64>() / n, chunk.iter().map(|p| p.1).sum::<f64>() / n);
            Run { x, mean, low, high }
        };
        points.chunks(length).map(run).collect()
    }
}

impl BarChart {
    /// Draws legend and bars.
    pub fn draw(&self, h: &mut Html) {
        const LEFT: f64 = 180.0;
        const RIGHT: f64 = 80.0;
        const BAR: f64 = 15.0;
        const GAP: f64 = 12.0;
        let values =
            self.groups.iter().flat_map(|g| g.values.iter().flatten()).chain(self.mark.as_ref().map(|(v, _)| v));
        let largest = values.copied().filter(|v| v.is_finite()).fold(0.0, f64::max);
        if largest == 0.0 {
            return h.leaf("p", &[("class", "note")], "Nothing was recorded.");
        }
        if self.series.len() > 1 {
            legend(h, self.series.iter().map(String::as_str));
        }
        let top = if self.mark.is_some() { 22.0 } else { 4.0 };
        let rows = self.groups.iter().map(|g| g.values.len() as f64 * BAR + GAP);
        let (width, height) = (960.0, top + rows.sum::<f64>());
        let x = Scale { log: false, from: (0.0, largest), to: (LEFT, width - RIGHT) };
        svg(h, width, height, &self.title, |h| {
            let mut y = top;
            for group in &self.groups {
                let middle = y + group.values.len() as f64 * BAR / 2.0;
                label(h, "name", "end", (LEFT - 12.0, middle + 4.0), &group.label);
                for (index, value) in group.values.iter().enumerate() {
                    // Nothing is drawn for what was not measured; a value below zero shows as its number alone.
                    if let Some(value) = value.filter(|v| v.is_finite()) {
                        let length = (x.at(value.max(0.0)) - LEFT).max(1.0);
                        rectangle(h, &format!("bar s{}", index % COLOURS), (LEFT, y + 1.0), (length, BAR - 2.0));
                        label(h, "", "start", (LEFT + length + 8.0, y + BAR / 2.0 + 4.0), &significant(value));
                    }
                    y += BAR;
                }
                y += GAP;
            }
            line(h, "axis", (LEFT, top - 4.0), (LEFT, height - GAP + 4.0));
            if let Some((value, name)) = &self.mark {
                line(h, "mark", (x.at(*value), top - 4.0), (x.at(*value), height - GAP + 4.0));
                label(h, "name", "middle", (x.at(*value), 12.0), &format!("{name} {}", significant(*value)));
            }
        });
    }
}

fn dot(h: &mut Html, index: usize, run: &Run, x: Scale, y: Scale) {
    let (cx, cy) = (number(x.at(run.x)), number(y.at(run.mean)));
    h.empty("circle", &[("class", &format!("dot s{}", index % COLOURS)), ("cx", &cx), ("cy", &cy), ("r", "4")]);
}

fn draw_runs(h: &mut Html, index: usize, runs: &[Run], band: bool, x: Scale, y: Scale) {
    let class = |kind: &str| format!("{kind} s{}", index % COLOURS);
    if let [only] = runs {
        return dot(h, index, only, x, y);
    }
    let point = |at: f64, value: f64| format!("{},{}", number(x.at(at)), number(y.at(value)));
    if band && runs.iter().any(|r| r.low < r.high) {
        let upper = runs.iter().map(|r| point(r.x, r.high));
        let lower = runs.iter().rev().map(|r| point(r.x, r.low));
        let outline = upper.chain(lower).collect::<Vec<_>>().join(" ");
        h.empty("polygon", &[("class", &class("band")), ("points", &outline)]);
    }
    let points = runs.iter().map(|r| point(r.x, r.mean)).collect::<Vec<_>>().join(" ");
    h.empty("polyline", &[("class", &class("line")), ("points", &points)]);
}

pub(super) fn legend<'a>(h: &mut Html, names: impl Iterator<Item = &'a str>) {
    h.element("ul", &[("class", "legend")], |h| {
        for (index, name) in names.enumerate() {
            h.element("li", &[("class", &format!("s{}", index % COLOURS))], |h| {
                h.leaf("i", &[], "");
                h.text(name);
            });
        }
    });
}

pub(super) fn svg(h: &mut Html, width: f64, height: f64, title: &str, body: impl FnOnce(&mut Html)) {
    let view = format!("0 0 {} {}", number(width), number(height));
    h.element("svg", &[("viewBox", &view), ("role", "img"), ("aria-label", title)], body);
}

pub(super) fn line(h: &mut Html, class: &str, from: (f64, f64), to: (f64, f64)) {
    let [x1, y1, x2, y2] = [from.0, from.1, to.0, to.1].map(number);
    h.empty("line", &[("class", class), ("x1", &x1), ("y1", &y1), ("x2", &x2), ("y2", &y2)]);
}

pub(super) fn rectangle(h: &mut Html, class: &str, corner: (f64, f64), size: (f64, f64)) {
    let [x, y, width, height] = [corner.0, corner.1, size.0, size.1].map(number);
    h.empty("rect", &[("class", class), ("x", &x), ("y", &y), ("width", &width), ("height", &height), ("rx", "2")]);
}

pub(super) fn label(h: &mut Html, class: &str, anchor: &str, at: (f64, f64), text: &str) {
    let (x, y) = (number(at.0), number(at.1));
    h.leaf("text", &[("class", class), ("text-anchor", anchor), ("x", &x), ("y", &y)], text);
}

/// A coordinate to a tenth of a unit: more than a screen shows.
pub(super) fn number(value: f64) -> String {
    format!("{value:.1}")
}

/// Least and largest of a set of ranges.
fn range(values: impl Iterator<Item = (f64, f64)>) -> Option<(f64, f64)> {
    values.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)))
}

/// A range of some extent.
fn widened((low, high): (f64, f64)) -> (f64, f64) {
    if high > low { (low, high) } else { (low - 0.5 * low.abs().max(1.0), high + 0.5 * high.abs().max(1.0)) }
}

/// A range with a margin, down to zero where zero is near.
fn padded(range: (f64, f64)) -> (f64, f64) {
    let (low, high) = widened(range);
    let margin = 0.05 * (high - low);
    let low = if low >= 0.0 && low < 0.35 * high { 0.0 } else { low - margin };
    (low, high + margin)
}

/// Ticks at round values inside a range, and the range.
fn linear_ticks(range: (f64, f64)) -> (Vec<f64>, (f64, f64)) {
    let (low, high) = widened(range);
    let rough = (high - low) / 5.0;
    let unit = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * unit).into_iter().find(|&s| s >= rough).unwrap_or(rough);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    ((first..=last).map(|i| i as f64 * step).collect(), (low, high))
}

/// Ticks of a logarithmic axis, and its range in decimal logarithms: whole decades where there are several, else
/// some multiples of each.
fn log_ticks((low, high): (f64, f64)) -> (Vec<f64>, (f64, f64)) {
    let (low, high) = (low.log10(), high.log10());
    let (low, high) = if high - low > 0.2 { (low - 0.05, high + 0.05) } else { (low - 0.1, high + 0.1) };
    let every = ((high - low) / 6.0).ceil().max(1.0) as i32;
    let multiples: &[f64] = match high - low {
        extent if extent < 1.5 => &[1.0, 2.0, 5.0],
        extent if extent < 3.0 => &[1.0, 3.0],
        _ => &[1.0],
    };
    let decades = (low.floor() as i32..=high.ceil() as i32).filter(|d| d.rem_euclid(every) == 0);
    let ticks = decades.flat_map(|d| multiples.iter().map(move |m| m * 10f64.powi(d)));
    (ticks.filter(|t| t.log10() >= low && t.log10() <= high).collect(), (low, high))
}

/// A tick without superfluous zeros.
fn tick_text(value: f64) -> String {
    let text = if value.abs() >= 1e5 { super::format::count(value) } else { significant(value) };
    match text.split_once(['e', ' ']) {
        Some((digits, rest)) => format!("{}{}{rest}", trimmed(digits), if text.contains('e') { "e" } else { " " }),
        None => trimmed(&text).to_owned(),
    }
}

fn trimmed(digits: &str) -> &str {
    if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::html::{check::well_formed, page};

    fn chart(log_y: bool, points: &[(f64, f64)]) -> LineChart {
        let series = |name: &str| Series::curve(name, points.to_vec());
        let labels = ["loss < 1", "step", "loss"].map(str::to_owned);
        let [title, x_label, y_label] = labels;
        LineChart { title, x_label, y_label, log_x: false, log_y, series: vec![series("a&b"), series("c")] }
    }

    fn drawn(chart: &LineChart) -> String {
        let page = page("t", |h| chart.draw(h));
        well_formed(&page);
        page
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(linear_ticks((0.0, 1.0)).0, [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]);
        assert_eq!(linear_ticks((-30.0, 110.0)).0, [0.0, 50.0, 100.0]);
        assert_eq!(linear_ticks((7.0, 7.0)).0, [4.0, 6.0, 8.0, 10.0]);
        assert_eq!(log_ticks((0.001, 10.0)).0, [0.001, 0.01, 0.1, 1.0, 10.0]);
        assert_eq!(log_ticks((0.3, 4.0)).0, [0.5, 1.0, 2.0]);
        assert_eq!(
            [0.6000000000000001, 0.0, 1500.0, 2.5e6, 2e-5].map(tick_text),
            ["0.6", "0", "1500", "2.5 M", "2e-5"]
        );
    }

    #[test]
    fn a_line_is_where_its_values_are() {
        let page = drawn(&chart(false, &[(0.0, 0.0), (10.0, 1.0)]));
        // Linear from 0 to 1.05 over the plot's 230 units of height, from 0 to 10 over its 488 of width.
        assert!(page.contains("<polyline class=\"line s0\" points=\"58.0,258.0 546.0,39.0\"/>"), "{page}");
        assert!(
            page.contains("a&amp;b") && page.contains("aria-label=\"loss &lt; 1\"") && page.contains(">0.75</text>")
        );
        assert!(!page.contains("polygon"));
    }

    #[test]
    fn a_file_of_its_own_has_legend_and_round_powers() {
        let mut chart = chart(true, &[(256.0, 1.0), (1024.0, 4.0), (4096.0, 16.0)]);
        chart.log_x = true;
        chart.series[1].dots = true;
        let file = chart.file();
        well_formed(&file);
        assert!(file.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 560 366\""), "{file}");
        // Equal factors are equal steps.
        for text in ["a&amp;b", ">256</text>", ">1024</text>", ">4096</text>"] {
            assert!(file.contains(text), "{text}: {file}");
        }
        assert_eq!(file.matches("<circle").count(), 3);
        assert_eq!(chart.powers_of_two().unwrap(), [256.0, 1024.0, 4096.0]);
    }

    #[test]
    fn what_an_axis_cannot_show_is_left_out() {
        let points = [(0.0, f64::NAN), (1.0, -1.0), (2.0, 0.1), (3.0, f64::INFINITY), (4.0, 10.0)];
        let runs = chart(true, &points).runs(&points);
        assert_eq!(runs.iter().map(|r| (r.x, r.mean)).collect::<Vec<_>>(), [(2.0, 0.1), (4.0, 10.0)]);
        assert!(!drawn(&chart(true, &points)).contains("NaN"));
        assert!(drawn(&chart(true, &points[..2])).contains("Nothing was recorded."));
        assert!(drawn(&chart(false, &[(1.0, 2.0)])).contains("<circle"));
    }

    #[test]
    fn long_curves_become_means_with_a_band() {
        let points: Vec<(f64, f64)> = (0..1000).map(|i| (f64::from(i), f64::from(i % 5))).collect();
        let chart = chart(false, &points);
        let runs = chart.runs(&points);
        assert_eq!(runs.len(), 200);
        assert_eq!(runs[1], Run { x: 7.0, mean: 2.0, low: 0.0, high: 4.0 });
        assert!(drawn(&chart).contains("<polygon class=\"band s1\""));
    }

    #[test]
    fn bars_have_their_length_and_number() {
        let group = |label: &str, values: [Option<f64>; 2]| Bars { label: label.into(), values: values.to_vec() };
        let chart = BarChart {
            title: "t".into(),
            series: vec!["before".into(), "after".into()],
            groups: vec![group("block 1", [Some(4.0), Some(1.0)]), group("block 2", [None, Some(f64::NAN)])],
            mark: Some((2.0, "limit".into())),
        };
        let page = page("t", |h| chart.draw(h));
        assert!(well_formed(&page).contains("limit 2.00"));
        // 4 spans the 700 units between the margins, 1 a quarter of them.
        assert!(page.contains("width=\"700.0\"") && page.contains("width=\"175.0\""), "{page}");
        assert_eq!(page.matches("<rect").count(), 2);
        let empty = BarChart { groups: vec![], mark: None, ..chart };
        assert!(super::super::html::page("t", |h| empty.draw(h)).contains("Nothing was recorded."));
    }
}
