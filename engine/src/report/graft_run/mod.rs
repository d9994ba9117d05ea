//! The report of a grafting run: what was replaced, whether the model is still good, what it now costs, and how each
//! stage went. Its verdict is computed from the scores, never given.

mod page;

use super::chart::LineChart;
use super::format::{count, seconds};
use crate::error::Result;
use crate::eval::score::{Baseline, Score};
use crate::io::atomic;
use std::path::Path;

/// Everything that a report shows. Parts that are empty are left out.
#[derive(Clone, Debug, Default)]
pub struct GraftRun {
    /// Name of the run.
    pub title: String,
    /// One sentence: which operators of which model were replaced by what.
    pub summary: String,
    /// The model at its stages, the original first, the result last.
    pub stages: Vec<Stage>,
    /// Scores of real images, beside which those of the stages stand.
    pub real: Option<Baseline>,
    /// What the original and the result cost.
    pub costs: Vec<Cost>,
    /// How well each new operator stands in for the old one.
    pub sites: Vec<SiteResidual>,
    /// Losses and the like over a run.
    pub curves: Vec<Figure<LineChart>>,
    /// Further tables.
    pub tables: Vec<Table>,
    /// Text of the plan.
    pub plan: String,
    /// Names and values that a repetition of the run needs.
    pub facts: Vec<(String, String)>,
}

/// The model at one point of the run.
#[derive(Clone, Debug)]
pub struct Stage {
    /// Such as "original" or "after distillation".
    pub name: String,
    /// What happened to get there, in a sentence.
    pub note: String,
    /// Samples as a PNG contact sheet, of the same labels and seeds at every stage.
    pub samples: Option<Vec<u8>>,
    /// Scores of samples.
    pub score: Option<Score>,
}

/// Something that a model costs, before and after.
#[derive(Clone, Debug, PartialEq)]
pub struct Cost {
    /// What.
    pub name: String,
    /// How it is written.
    pub unit: Unit,
    /// Of the original.
    pub before: f64,
    /// Of the result.
    pub after: f64,
}

/// How a cost is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A number with a decimal prefix, such as parameters or operations.
    Count,
    /// A duration in seconds.
    Seconds,
    /// Bytes with a decimal prefix.
    Bytes,
}

impl Unit {
    fn write(self, value: f64) -> String {
        match self {
            Unit::Count => count(value),
            Unit::Seconds => seconds(value),
            Unit::Bytes => format!("{}B", if value.abs() < 1e3 { format!("{value:.0} ") } else { count(value) }),
        }
    }
}

/// Relative error of one new operator against the old one's output.
#[derive(Clone, Debug, PartialEq)]
pub struct SiteResidual {
    /// Such as "block 3, attn: hyena_x".
    pub site: String,
    /// Right after initialisation.
    pub before: Option<f64>,
    /// After distillation.
    pub after: Option<f64>,
}

/// A chart with a heading and a sentence on how to read it.
#[derive(Clone, Debug)]
pub struct Figure<C> {
    /// Heading.
    pub title: String,
    /// How to read it.
    pub caption: String,
    /// The chart.
    pub chart: C,
}

/// Rows of text below a header; the first column is aligned left.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Heading.
    pub title: String,
    /// How to read it.
    pub caption: String,
    /// Names of the columns.
    pub header: Vec<String>,
    /// Rows, as long as the header.
    pub rows: Vec<Vec<String>>,
}

/// Whether the result is as good as the original.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The criterion of [`Baseline::accepts`] holds.
    Holds,
    /// It does not.
    FallsShort,
    /// Scores are missing.
    NotScored,
}

impl GraftRun {
    /// The verdict, by the Fréchet distances of the first and the last stage.
    pub fn verdict(&self) -> Verdict {
        match self.ends() {
            Some((before, after, real)) if real.accepts(before.frechet, after.frechet) => Verdict::Holds,
            Some(_) => Verdict::FallsShort,
            None => Verdict::NotScored,
        }
    }

    /// Scores of the original and of the result, where both and the baseline are known.
    fn ends(&self) -> Option<(Score, Score, &Baseline)> {
        match &self.stages[..] {
            [first, .., last] => Some((first.score?, last.score?, self.real.as_ref()?)),
            _ => None,
        }
    }

    /// Writes the page to a file, all or nothing.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        atomic::write_bytes(path, self.render().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::files::test_dir;
    use crate::io::png;
    use crate::report::chart::Series;
    use crate::report::html::check::well_formed;
    use std::collections::BTreeMap;

    fn score(frechet: f64) -> Score {
        Score { n: 500, frechet, kid: 0.0123, precision: 0.91, recall: 0.75, agreement: 0.884 }
    }

    fn run(after: f64) -> GraftRun {
        let sheet = |grey: u8| {
            let images: Vec<_> =
                (0..40).map(|i| png::Image::filled(28, 28, &[grey.wrapping_add(6 * i)]).unwrap()).collect();
            let layout = crate::io::grid::Layout { upscale: 2, ..crate::io::grid::Layout::new(8) };
            png::encode(&crate::io::grid::grid(&images, &layout).unwrap(), &BTreeMap::new()).unwrap()
        };
        let stage = |name: &str, note: &str, frechet: f64, grey| Stage {
            name: name.into(),
            note: note.into(),
            samples: Some(sheet(grey)),
            score: Some(score(frechet)),
        };
        let noisy = |scale: f64| {
            (0..2000)
                .map(move |i| (f64::from(i), scale * (1.0 / (1.0 + f64::from(i) / 60.0) + 0.02 * f64::from(i % 7))))
        };
        let curve = |names: &[&str], log_y| LineChart {
            title: "Loss".into(),
            x_label: "update".into(),
            y_label: "loss".into(),
            log_x: false,
            log_y,
            series: (1..).zip(names).map(|(k, n)| Series::curve(*n, noisy(f64::from(k)).collect())).collect(),
        };
        GraftRun {
            title: "fashion-dit with hyena_x".into(),
            summary: "6 of 12 attention operators were replaced by hyena_x.".into(),
            stages: vec![
                stage("Original", "The model as it was trained.", 5.31, 0),
                stage("Stage 1", "Each new operator learnt the output of the old one.", 9.87, 40),
                stage("Stage 2", "The whole model was trained for 400 updates more.", after, 10),
            ],
            real: Some(Baseline {
                mean: score(1.93),
                sd: Score { n: 500, frechet: 0.21, kid: 0.001, precision: 0.01, recall: 0.02, agreement: 0.01 },
                splits: 5,
                disjoint: false,
            }),
            costs: vec![
                Cost { name: "Parameters".into(), unit: Unit::Count, before: 3_312_000.0, after: 3_021_000.0 },
                Cost { name: "Operations per evaluation".into(), unit: Unit::Count, before: 2.41e8, after: 2.02e8 },
                Cost { name: "Time per image, 20 steps".into(), unit: Unit::Seconds, before: 0.124, after: 0.101 },
                Cost { name: "Memory of the weights".into(), unit: Unit::Bytes, before: 6.6e6, after: 6.0e6 },
            ],
            sites: (0..6)
                .map(|i| SiteResidual {
                    site: format!("block {}, attn: hyena_x", 2 * i),
                    before: Some(1.02),
                    after: Some(0.05 * f64::from(i + 1)),
                })
                .collect(),
            curves: vec![
                Figure {
                    title: "Distillation".into(),
                    caption: "Regression loss of every new operator.".into(),
                    chart: curve(&["block 0", "block 2", "block 4", "block 6", "block 8", "block 10"], true),
                },
                Figure {
                    title: "Fine-tuning".into(),
                    caption: "Loss of the whole model.".into(),
                    chart: curve(&["loss"], false),
                },
            ],
            tables: vec![Table {
                title: "Schedule".into(),
                caption: "Time by stage.".into(),
                header: vec!["stage".into(), "updates".into(), "time".into()],
                rows: vec![vec!["distillation".into(), "6 × 400".into(), "3 min 20 s".into()]],
            }],
            plan: "[graft]\nblocks = \"even\" # 0 <= i < 12 & i % 2 == 0\nname = \"</pre><script>alert(1)</script>\"\n"
                .into(),
            facts: vec![("seed".into(), "0".into()), ("data".into(), "assets/fashion-mnist".into())],
        }
    }

    #[test]
    fn the_report_is_well_formed_and_has_its_numbers() {
        let page = run(5.62).render();
        let text = well_formed(&page);
        for wanted in [
            "5.31 → 5.62",
            "1.93 ± 0.210",
            "−8.8 %",
            "3.31 M → 3.02 M",
            "124 ms",
            "6.60 MB",
            "91.0 %",
            "0.0123",
            "block 10",
            "3 min 20 s",
            "assets/fashion-mnist",
        ] {
            assert!(text.contains(wanted), "{wanted}");
        }
        // 1.93 + 1.25 · (5.31 − 1.93) + 2 · 0.21 = 6.575.
        assert!(
            text.contains("images: 5.62, 5.31 for the original. Other real images score 1.93, so up to 6.5"),
            "{text}"
        );
        assert!(text.contains("allowed up to 6.5"));
        assert!(text.contains("0 &lt;= i &lt; 12 &amp; i") && !page.contains("<script"));
        assert_eq!(page.matches("data:image/png;base64,").count(), 3);
        assert_eq!(page, run(5.62).render());
    }

    #[test]
    fn the_verdict_follows_from_the_scores() {
        assert_eq!(run(5.62).verdict(), Verdict::Holds);
        assert!(run(5.62).render().contains("The graft holds."));
        let bad = run(6.6);
        assert_eq!(bad.verdict(), Verdict::FallsShort);
        assert!(bad.render().contains("The graft falls short."));
        let mut open = run(5.62);
        open.real = None;
        assert_eq!(open.verdict(), Verdict::NotScored);
        assert!(well_formed(&open.render()).contains("were not compared"));
        let nothing = GraftRun { title: "t".into(), ..GraftRun::default() };
        let text = well_formed(&nothing.render());
        assert!(text.contains("Not scored.") && !text.contains("Quality") && !text.contains("Cost"));
    }

    #[test]
    fn it_is_written_whole() {
        let path = test_dir("report").join("report.html");
        run(5.62).write(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), run(5.62).render());
        assert!(run(5.62).write(&path.join("below_a_file")).is_err());
    }
}
