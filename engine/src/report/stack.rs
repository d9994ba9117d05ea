//! Horizontal bars of parts laid end to end, as inline SVG.

use super::chart::{COLOURS, label, legend, line, rectangle, svg};
use super::format::significant;
use super::html::Html;

/// Bars of parts, each bar a sum.
#[derive(Clone, Debug, PartialEq)]
pub struct StackChart {
    /// What it shows, for those who cannot see it.
    pub title: String,
    /// Unit of the sums.
    pub unit: String,
    /// Names of the parts; at most as many as there are colours.
    pub parts: Vec<String>,
    /// Bars from the top: a label, and a value for each part, not negative.
    pub bars: Vec<(String, Vec<f64>)>,
}

impl StackChart {
    /// A chart of the largest parts by name; what is beyond the colours becomes one part, `others`.
    pub fn of(title: &str, unit: &str, bars: Vec<(String, Vec<(String, f64)>)>) -> StackChart {
        let mut sums: Vec<(String, f64)> = Vec::new();
        for (name, value) in bars.iter().flat_map(|(_, parts)| parts) {
            match sums.iter_mut().find(|(n, _)| n == name) {
                Some((_, sum)) => *sum += value,
                None => sums.push((name.clone(), *value)),
            }
        }
        sums.sort_by(|a, b| b.1.total_cmp(&a.1));
        let named = if sums.len() > COLOURS { COLOURS - 1 } else { sums.len() };
        let mut parts: Vec<String> = sums[..named].iter().map(|(n, _)| n.clone()).collect();
        if named < sums.len() {
            parts.push("others".into());
        }
        let values = |found: &[(String, f64)]| {
            let mut values = vec![0.0; parts.len()];
            for (name, value) in found {
                let place = parts[..named].iter().position(|p| p == name).unwrap_or(parts.len() - 1);
                values[place] += value;
            }
            values
        };
        let bars = bars.iter().map(|(label, found)| (label.clone(), values(found))).collect();
        StackChart { title: title.into(), unit: unit.into(), parts, bars }
    }

    /// Draws legend and bars.
    pub fn draw(&self, h: &mut Html) {
        const LEFT: f64 = 110.0;
        const RIGHT: f64 = 90.0;
        const BAR: f64 = 14.0;
        const STEP: f64 = 20.0;
        let sums = || self.bars.iter().map(|(_, values)| values.iter().sum::<f64>());
        let largest = sums().fold(0.0, f64::max);
        if !(largest > 0.0 && largest.is_finite()) {
            return h.leaf("p", &[("class", "note")], "Nothing was recorded.");
        }
        legend(h, self.parts.iter().map(String::as_str));
        let (width, height) = (960.0, STEP * self.bars.len() as f64 + 8.0);
        let scale = (width - LEFT - RIGHT) / largest;
        svg(h, width, height, &self.title, |h| {
            for (row, ((name, values), sum)) in self.bars.iter().zip(sums()).enumerate() {
                let y = 4.0 + STEP * row as f64;
                label(h, "name", "end", (LEFT - 10.0, y + BAR - 2.0), name);
                let mut x = LEFT;
                for (part, value) in values.iter().enumerate().filter(|(_, value)| **value > 0.0) {
                    rectangle(h, &format!("bar s{part}"), (x, y), (scale * value, BAR));
                    x += scale * value;
                }
                label(h, "", "start", (x + 8.0, y + BAR - 2.0), &format!("{} {}", significant(sum), self.unit));
            }
            line(h, "axis", (LEFT, 0.0), (LEFT, height));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::html::{check::well_formed, page};

    #[test]
    fn parts_lie_end_to_end() {
        let bar = |label: &str, parts: &[(&str, f64)]| {
            (label.to_string(), parts.iter().map(|(n, v)| ((*n).to_string(), *v)).collect())
        };
        let chart =
            StackChart::of("t", "ms", vec![bar("1", &[("gemm", 3.0), ("norm", 1.0)]), bar("2", &[("norm", 2.0)])]);
        assert_eq!(chart.parts, ["gemm", "norm"]);
        let page = page("t", |h| chart.draw(h));
        well_formed(&page);
        // 4 ms span 760 units: 570 and 190 in the first bar, 380 in the second.
        for rect in
            ["x=\"110.0\" y=\"4.0\" width=\"570.0\"", "x=\"680.0\" y=\"4.0\" width=\"190.0\"", "width=\"380.0\""]
        {
            assert!(page.contains(rect), "{rect}: {page}");
        }
        assert!(page.contains("4.00 ms"));
    }

    #[test]
    fn what_is_beyond_the_colours_is_one_part() {
        let parts = (0..9).map(|i| (format!("op{i}"), f64::from(10 - i))).collect();
        let chart = StackChart::of("t", "ms", vec![("1".into(), parts)]);
        assert_eq!(chart.parts.len(), COLOURS);
        assert_eq!((chart.parts[5].as_str(), chart.bars[0].1[5]), ("others", 5.0 + 4.0 + 3.0 + 2.0));
        let empty = StackChart::of("t", "ms", Vec::new());
        assert!(page("t", |h| empty.draw(h)).contains("Nothing was recorded."));
    }
}
