//! The report of a study: many grafts of one base side by side, what they keep and what they save.
//!
//! Every sentence on top is computed from the rows. Distances are judged as ratios to that of the base; what was not
//! run says so in its place.

use super::chart::{BarChart, Bars};
use super::format::{percent, seconds, significant};
use super::html::{self, Html};
use super::parts::{section, table};
use crate::error::Result;
use crate::eval::score::Baseline;
use crate::io::atomic;
use std::path::Path;

/// Everything that the report shows.
#[derive(Clone, Debug, Default)]
pub struct Science {
    /// Heading.
    pub title: String,
    /// What the reader should know first.
    pub note: String,
    /// Fréchet distance of the base.
    pub base: Option<Spread>,
    /// Scores of real images at the same count.
    pub real: Option<Baseline>,
    /// What the numbers say.
    pub findings: Vec<Finding>,
    /// Rows by heading.
    pub sections: Vec<Section>,
    /// Samples of some rows.
    pub pictures: Vec<Picture>,
    /// Names and values that a repetition needs.
    pub facts: Vec<(String, String)>,
}

/// A computed sentence.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// Whether it is good news; none where it is neither.
    pub holds: Option<bool>,
    /// The sentence.
    pub text: String,
}

impl Finding {
    /// A sentence that is neither good nor bad news.
    pub fn open(text: &str) -> Finding {
        Finding { holds: None, text: text.to_string() }
    }
}

/// Rows below a heading.
#[derive(Clone, Debug, Default)]
pub struct Section {
    /// Heading.
    pub title: String,
    /// Rows.
    pub lines: Vec<Line>,
}

/// Mean over seeds, with the standard deviation where there are several (denominator: seeds less one).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Standard deviation.
    pub sd: Option<f64>,
}

impl Spread {
    /// Of some values; none of nothing.
    pub fn of(values: &[f64]) -> Option<Spread> {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let sd = || (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
        (!values.is_empty()).then(|| Spread { mean, sd: (values.len() > 1).then(sd) })
    }

    fn text(&self) -> String {
        match self.sd {
            Some(sd) => format!("{} ± {}", significant(self.mean), significant(sd)),
            None => significant(self.mean),
        }
    }
}

/// A row, or one stage of it; what was not measured is none.
#[derive(Clone, Debug, Default)]
pub struct Line {
    /// Name of the row.
    pub row: String,
    /// Stage, where the row shows several.
    pub stage: String,
    /// Operators.
    pub what: String,
    /// Seeds that were run.
    pub seeds: usize,
    /// Fréchet distance to real images.
    pub frechet: Option<Spread>,
    /// The same over that of the base with the same seeds.
    pub ratio: Option<f64>,
    /// Kernel distance.
    pub kid: Option<f64>,
    /// Precision.
    pub precision: Option<f64>,
    /// Recall.
    pub recall: Option<f64>,
    /// Share of samples that the classifier takes for the class asked for.
    pub agreement: Option<f64>,
    /// Denoising loss on held-out images.
    pub loss: Option<f64>,
    /// Mean relative error of the new operators after stage 1.
    pub residual: Option<f64>,
    /// Changes in per cent: operator FLOPs, projection FLOPs, operator parameters, all FLOPs, all parameters.
    pub change: Option<[f64; 5]>,
    /// Seconds of both stages.
    pub train_seconds: Option<f64>,
    /// Seconds of sampling an image.
    pub image_seconds: Option<f64>,
}

/// Samples with a title.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Row.
    pub title: String,
    /// What to see.
    pub note: String,
    /// PNG sheet.
    pub png: Vec<u8>,
}

const HEADER: [&str; 16] = [
    "row",
    "operators",
    "seeds",
    "Fréchet ↓",
    "to base",
    "kernel ↓",
    "precision ↑",
    "recall ↑",
    "right class ↑",
    "test loss ↓",
    "residual",
    "ΔFLOPs op",
    "Δparams op",
    "ΔFLOPs",
    "training",
    "an image",
];

impl Line {
    fn name(&self) -> String {
        if self.stage.is_empty() { self.row.clone() } else { format!("{} · {}", self.row, self.stage) }
    }

    fn cells(&self) -> Vec<String> {
        let dash = || "–".to_string();
        if self.seeds == 0 {
            let mut cells = vec![self.name(), "not run".to_string()];
            cells.resize(HEADER.len(), dash());
            return cells;
        }
        let number = |v: Option<f64>| v.map_or_else(dash, significant);
        let part = |v: Option<f64>| v.map_or_else(dash, percent);
        let change = |i: usize| self.change.map_or_else(dash, |c| format!("{:+.2} %", c[i]));
        let time = |v: Option<f64>| v.map_or_else(dash, seconds);
        vec![
            self.name(),
            self.what.clone(),
            self.seeds.to_string(),
            self.frechet.as_ref().map_or_else(dash, Spread::text),
            self.ratio.map_or_else(dash, |r| format!("{r:.2}×")),
            number(self.kid),
            part(self.precision),
            part(self.recall),
            part(self.agreement),
            self.loss.map_or_else(dash, |loss| format!("{loss:.5}")),
            number(self.residual),
            change(0),
            change(2),
            change(3),
            time(self.train_seconds),
            time(self.image_seconds),
        ]
    }
}

impl Science {
    /// The whole page.
    pub fn render(&self) -> String {
        html::page(&self.title, |h| {
            self.top(h);
            self.quality(h);
            self.sections.iter().for_each(|s| self.rows(h, s));
            self.samples(h);
            section(h, "How to repeat it", "What every row shares.", |h| {
                h.element("dl", &[], |h| {
                    for (name, value) in &self.facts {
                        h.leaf("dt", &[], name);
                        h.leaf("dd", &[], value);
                    }
                });
            });
            h.leaf("footer", &[], concat!("Written by graft ", env!("CARGO_PKG_VERSION"), "."));
        })
    }

    /// The tables as Markdown, for a page in the repository.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        let row = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        for section in &self.sections {
            text += &format!("### {}\n\n{}", section.title, row(HEADER.map(str::to_owned).to_vec()));
            text += &row(vec!["---".to_string(); HEADER.len()]);
            section.lines.iter().for_each(|line| text += &row(line.cells()));
            text.push('\n');
        }
        text
    }

    /// Writes the page to a file, all or nothing.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        atomic::write_bytes(path, self.render().as_bytes())
    }

    fn top(&self, h: &mut Html) {
        h.element("header", &[], |h| {
            h.leaf("p", &[("class", "eyebrow")], "Study of grafts");
            h.leaf("h1", &[], &self.title);
            h.leaf("p", &[("class", "note")], &self.note);
            for finding in &self.findings {
                let (class, word) = match finding.holds {
                    Some(true) => ("headline holds", "Works."),
                    Some(false) => ("headline falls", "Falls short."),
                    None => ("headline open", "Open."),
                };
                h.element("p", &[("class", class)], |h| {
                    h.leaf("b", &[], word);
                    h.leaf("span", &[], &finding.text);
                });
            }
        });
    }

    fn quality(&self, h: &mut Html) {
        let scored = |l: &&Line| l.frechet.is_some();
        let bar = |l: &Line| Bars { label: l.name(), values: vec![l.frechet.map(|f| f.mean)] };
        let mut groups: Vec<Bars> = self.sections.iter().flat_map(|s| &s.lines).filter(scored).map(bar).collect();
        if groups.is_empty() {
            return;
        }
        if let Some(real) = &self.real {
            groups.push(Bars { label: "real images".into(), values: vec![Some(real.mean.frechet)] });
        }
        let note = "How far the features of samples lie from those of real images; the line is the base. Small numbers of \
                    samples put every distance too high by about as much as real images score, which stand last.";
        section(h, "Quality at a glance", note, |h| {
            let mark = self.base.map(|b| (b.mean, "base".to_string()));
            // Ruined controls would squeeze the rest into nothing: they are cut at ten times the base, and say so.
            let limit = self.base.map_or(f64::INFINITY, |b| 10.0 * b.mean);
            let (shown, cut): (Vec<Bars>, Vec<Bars>) =
                groups.into_iter().partition(|g| g.values.iter().flatten().all(|v| *v <= limit));
            h.element("figure", &[], |h| {
                BarChart { title: "Fréchet distance of every row".into(), series: vec![], groups: shown, mark }.draw(h);
                let cut: Vec<String> = cut
                    .iter()
                    .map(|g| {
                        format!(
                            "{} ({})",
                            g.label,
                            g.values.iter().flatten().map(|v| significant(*v)).collect::<String>()
                        )
                    })
                    .collect();
                if !cut.is_empty() {
                    h.leaf("figcaption", &[], &format!("Beyond the chart: {}.", cut.join(", ")));
                }
            });
        });
    }

    fn rows(&self, h: &mut Html, s: &Section) {
        let rows: Vec<Vec<String>> = s.lines.iter().map(Line::cells).collect();
        section(h, &s.title, "", |h| table(h, &HEADER.map(str::to_owned), &rows));
    }

    fn samples(&self, h: &mut Html) {
        if self.pictures.is_empty() {
            return;
        }
        let note = "The base and the best row of each section; the same labels and noise everywhere.";
        section(h, "Samples", note, |h| {
            h.element("div", &[("class", "pictures")], |h| {
                for picture in &self.pictures {
                    h.element("figure", &[], |h| {
                        h.leaf("h3", &[], &picture.title);
                        h.picture(&picture.png, &format!("samples: {}", picture.title));
                        h.leaf("figcaption", &[], &picture.note);
                    });
                }
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::html::check::well_formed;

    fn study() -> Science {
        let line = |row: &str, frechet: f64| Line {
            row: row.into(),
            what: "6 × hyena_x(taps=4)".into(),
            seeds: 2,
            frechet: Spread::of(&[frechet - 0.1, frechet + 0.1]),
            ratio: Some(frechet / 4.0),
            agreement: Some(0.5),
            change: Some([-50.0, 0.1, 0.2, -3.0, 0.01]),
            ..Line::default()
        };
        let open = Line { row: "later".into(), ..Line::default() };
        Science {
            title: "a < b".into(),
            base: Spread::of(&[4.0]),
            findings: vec![Finding { holds: Some(true), text: "good & well".into() }],
            sections: vec![Section {
                title: "Mixers".into(),
                lines: vec![line("hyena", 4.4), line("ruin", 90.0), open],
            }],
            ..Science::default()
        }
    }

    #[test]
    fn spread_by_hand() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[2.0]), Some(Spread { mean: 2.0, sd: None }));
        assert_eq!(Spread::of(&[1.0, 3.0, 5.0]), Some(Spread { mean: 3.0, sd: Some(2.0) }));
    }

    #[test]
    fn the_page_is_well_formed_and_says_what_was_not_run() {
        let page = study().render();
        let text = well_formed(&page);
        for wanted in
            ["a &lt; b", "good &amp; well", "4.40 ± 0.141", "1.10×", "-50.00 %", "not run", "Beyond the chart: ruin"]
        {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        let markdown = study().markdown();
        assert!(markdown.contains("| hyena | 6 × hyena_x(taps=4) | 2 | 4.40 ± 0.141 | 1.10× |"), "{markdown}");
        assert!(markdown.contains("| later | not run | – |"));
        let columns: Vec<usize> =
            markdown.lines().filter(|l| l.starts_with('|')).map(|l| l.matches('|').count()).collect();
        assert!(columns.iter().all(|c| *c == HEADER.len() + 1), "{columns:?}");
    }
}
