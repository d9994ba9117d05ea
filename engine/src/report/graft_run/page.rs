//! The page of a grafting run, section by section.

use super::{Cost, GraftRun, SiteResidual, Stage, Verdict};
use crate::eval::score::Score;
use crate::report::chart::{BarChart, Bars};
use crate::report::format::{change, percent, significant};
use crate::report::html::{self, Html};
use crate::report::parts::{section, table};

impl GraftRun {
    /// The whole page.
    pub fn render(&self) -> String {
        html::page(&self.title, |h| {
            self.top(h);
            self.pictures(h);
            self.quality(h);
            self.cost_table(h);
            self.residuals(h);
            self.curve_charts(h);
            self.tables.iter().for_each(|t| section(h, &t.title, &t.caption, |h| table(h, &t.header, &t.rows)));
            self.origin(h);
            h.leaf("footer", &[], concat!("Written by graft ", env!("CARGO_PKG_VERSION"), "."));
        })
    }

    fn top(&self, h: &mut Html) {
        h.element("header", &[], |h| {
            h.leaf("p", &[("class", "eyebrow")], "Grafting report");
            h.leaf("h1", &[], &self.title);
            let (class, word) = match self.verdict() {
                Verdict::Holds => ("headline holds", "The graft holds."),
                Verdict::FallsShort => ("headline falls", "The graft falls short."),
                Verdict::NotScored => ("headline open", "Not scored."),
            };
            h.element("p", &[("class", class)], |h| {
                h.leaf("b", &[], word);
                h.leaf("span", &[], &self.headline());
            });
            h.element("div", &[("class", "cards")], |h| {
                if let Some((before, after, real)) = self.ends() {
                    let real =
                        format!("real images {} ± {}", significant(real.mean.frechet), significant(real.sd.frechet));
                    card(h, "Fréchet distance", &arrow(before.frechet, after.frechet, significant), &real);
                }
                for cost in self.costs.iter().take(3) {
                    let detail = format!("{} → {}", cost.unit.write(cost.before), cost.unit.write(cost.after));
                    card(h, &cost.name, &change(cost.before, cost.after), &detail);
                }
            });
        });
    }

    /// The summary and what the numbers say of it.
    fn headline(&self) -> String {
        let Some((before, after, real)) = self.ends() else {
            return format!("{} Samples were not compared with real images.", self.summary);
        };
        let limit = real.mean.frechet + real.allowed(before.frechet);
        format!(
            "{} Fréchet distance of its samples to real images: {}, {} for the original. Other real images score {}, so up to \
             {} counts as equally good.",
            self.summary,
            significant(after.frechet),
            significant(before.frechet),
            significant(real.mean.frechet),
            significant(limit),
        )
    }

    fn pictures(&self, h: &mut Html) {
        if self.stages.iter().all(|s| s.samples.is_none()) {
            return;
        }
        let note = "The same labels and the same noise at every stage: what differs is what the new operators changed.";
        section(h, "Samples", note, |h| {
            h.element("div", &[("class", "pictures")], |h| {
                for stage in &self.stages {
                    let Some(png) = &stage.samples else { continue };
                    h.element("figure", &[], |h| {
                        h.leaf("h3", &[], &stage.name);
                        h.picture(png, &format!("samples: {}", stage.name));
                        h.leaf("figcaption", &[], &stage.note);
                    });
                }
            });
        });
    }

    fn quality(&self, h: &mut Html) {
        let scored: Vec<(&Stage, Score)> = self.stages.iter().filter_map(|s| Some((s, s.score?))).collect();
        if scored.is_empty() {
            return;
        }
        let header =
            ["", "images", "Fréchet ↓", "kernel ↓", "precision ↑", "recall ↑", "right class ↑"].map(str::to_owned);
        let row = |name: &str, s: &Score| {
            let fractions = [s.precision, s.recall, s.agreement].map(percent);
            let numbers = [s.n.to_string(), significant(s.frechet), significant(s.kid)];
            [name.to_owned()].into_iter().chain(numbers).chain(fractions).collect::<Vec<_>>()
        };
        let mut rows: Vec<Vec<String>> = scored.iter().map(|(stage, score)| row(&stage.name, score)).collect();
        if let Some(real) = &self.real {
            rows.push(row("real images", &real.mean));
            let s = &real.sd;
            let spread = [significant(s.frechet), significant(s.kid)]
                .into_iter()
                .chain([s.precision, s.recall, s.agreement].map(percent));
            let name = format!("spread over {} splits", real.splits);
            rows.push([name, String::new()].into_iter().chain(spread.map(|v| format!("± {v}"))).collect());
        }
        let note = "How far the features of samples lie from those of real images. Real images that the comparison set does \
                    not contain are the yardstick, scored in the same way and number. The verdict asks that the distance in \
                    excess of theirs grows by at most a quarter, two standard deviations of the measurement allowed.";
        section(h, "Quality", note, |h| {
            table(h, &header, &rows);
            if scored.len() + usize::from(self.real.is_some()) < 2 {
                return;
            }
            let bar = |label: &str, value: f64| Bars { label: label.to_owned(), values: vec![Some(value)] };
            let mut groups: Vec<Bars> = scored.iter().map(|(stage, score)| bar(&stage.name, score.frechet)).collect();
            groups.extend(self.real.as_ref().map(|real| bar("real images", real.mean.frechet)));
            let mark = self.ends().map(|(before, _, real)| {
                (real.mean.frechet + real.allowed(before.frechet), "allowed up to".to_owned())
            });
            h.element("figure", &[], |h| {
                h.leaf("h3", &[], "Fréchet distance");
                BarChart { title: "Fréchet distance of every stage".into(), series: vec![], groups, mark }.draw(h);
            });
        });
    }

    fn cost_table(&self, h: &mut Html) {
        if self.costs.is_empty() {
            return;
        }
        let header = ["", "original", "result", "change"].map(str::to_owned);
        let row =
            |c: &Cost| vec![c.name.clone(), c.unit.write(c.before), c.unit.write(c.after), change(c.before, c.after)];
        let rows: Vec<Vec<String>> = self.costs.iter().map(row).collect();
        section(h, "Cost", "What the model takes before and after.", |h| table(h, &header, &rows));
    }

    fn residuals(&self, h: &mut Html) {
        if self.sites.is_empty() {
            return;
        }
        let note = "Error of each new operator against the output of the one it replaces, relative to the size of that output, \
                    on held-out inputs: 1 is as bad as giving nothing, 0 is a perfect stand-in.";
        section(h, "Stand-ins", note, |h| {
            let group = |s: &SiteResidual| Bars { label: s.site.clone(), values: vec![s.before, s.after] };
            let series = vec!["before distillation".to_owned(), "after distillation".to_owned()];
            let groups = self.sites.iter().map(group).collect();
            h.element("figure", &[], |h| {
                BarChart { title: "Relative error of every new operator".into(), series, groups, mark: None }.draw(h);
            });
        });
    }

    fn curve_charts(&self, h: &mut Html) {
        if self.curves.is_empty() {
            return;
        }
        let note =
            "Lines are means over short runs of updates; the band spans the least and the largest value of each run.";
        section(h, "Course of the run", note, |h| {
            h.element("div", &[("class", "charts")], |h| {
                for figure in &self.curves {
                    h.element("figure", &[], |h| {
                        h.leaf("h3", &[], &figure.title);
                        figure.chart.draw(h);
                        h.leaf("figcaption", &[], &figure.caption);
                    });
                }
            });
        });
    }

    fn origin(&self, h: &mut Html) {
        if self.plan.is_empty() && self.facts.is_empty() {
            return;
        }
        section(h, "How to repeat it", "The plan, and what else the result depends on.", |h| {
            if !self.facts.is_empty() {
                h.element("dl", &[], |h| {
                    for (name, value) in &self.facts {
                        h.leaf("dt", &[], name);
                        h.leaf("dd", &[], value);
                    }
                });
            }
            if !self.plan.is_empty() {
                h.leaf("pre", &[], self.plan.trim_end());
            }
        });
    }
}

fn arrow(before: f64, after: f64, write: fn(f64) -> String) -> String {
    format!("{} → {}", write(before), write(after))
}

fn card(h: &mut Html, name: &str, value: &str, detail: &str) {
    h.element("div", &[("class", "card")], |h| {
        h.leaf("div", &[("class", "name")], name);
        h.leaf("div", &[("class", "value")], value);
        h.leaf("div", &[("class", "detail")], detail);
    });
}
