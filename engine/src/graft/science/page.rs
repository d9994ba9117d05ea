//! The report of a study, from the results that are there.

use super::result::JobResult;
use super::spec::{Control, Row, Study, Tier};
use super::{Job, REAL};
use crate::error::Result;
use crate::eval::score::{Baseline, Score};
use crate::io::{files, json};
use crate::report::science::{Finding, Line, Picture, Science, Section, Spread};
use std::path::Path;

/// Rows whose samples are shown: the base, and the best of every section.
fn shown(h: &Science) -> Vec<String> {
    let best = |s: &Section| {
        let scored = s.lines.iter().filter_map(|l| Some((l.frechet.as_ref()?.mean, l.row.clone())));
        scored.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, row)| row)
    };
    h.sections.iter().filter_map(best).collect()
}

/// The report of a study whose jobs ran, or are running, below `run`.
///
/// # Errors
/// A result that is damaged.
pub fn report(study: &Study, run: &Path) -> Result<Science> {
    let mut rows = Vec::new();
    for row in &study.rows {
        let results = row.seeds.iter().map(|&seed| Job { row, seed }.result(run));
        rows.push((row, results.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect::<Vec<_>>()));
    }
    let is_base = |row: &Row| row.control == Some(Control::Base);
    let bases: &[JobResult] = rows.iter().find(|(row, _)| is_base(row)).map_or(&[], |(_, results)| results);
    let base = frechet(bases, None);
    let mut sections: Vec<Section> = Vec::new();
    for (row, results) in &rows {
        let section = match sections.iter().position(|s| s.title == row.group) {
            Some(i) => &mut sections[i],
            None => {
                sections.push(Section { title: row.group.clone(), lines: Vec::new() });
                let last = sections.len() - 1;
                &mut sections[last]
            }
        };
        section.lines.extend(lines(row, results, bases));
    }
    let real = run.join(REAL);
    let real: Option<Baseline> = if real.exists() { serde_json::from_value(json::read(&real)?).ok() } else { None };
    let first = study.settings()?;
    let (d, f, e) = (&first.distill, &first.finetune, &first.eval);
    let mut science = Science {
        title: study.title.clone(),
        note: study.note.clone(),
        base,
        real,
        findings: Vec::new(),
        sections,
        pictures: Vec::new(),
        facts: vec![
            ("base model".into(), first.base.display().to_string()),
            ("stage 1".into(), format!("{} updates of {} images", d.steps, d.batch)),
            ("stage 2".into(), format!("{} updates of {} images", f.steps, f.batch)),
            (
                "samples".into(),
                format!("{} a model, {} with {} steps, guidance {}", e.samples, e.sampler, e.steps, e.guidance),
            ),
        ],
    };
    science.findings = findings(&rows, bases);
    let wanted = shown(&science);
    for (row, results) in &rows {
        let Some(result) = results.first().filter(|_| is_base(row) || wanted.contains(&row.name)) else { continue };
        let Some(stage) = result.last() else { continue };
        let path = Job { row, seed: result.seed }.folder(run).join(format!("samples-{}.png", stage.name));
        if path.exists() {
            let note = stage.score.map_or(String::new(), |s| format!("Fréchet {:.2}", s.frechet));
            science.pictures.push(Picture { title: row.name.clone(), note, png: files::read_bytes(&path)? });
        }
    }
    Ok(science)
}

/// Fréchet distances of a stage (the last where not given) over the seeds.
fn frechet(results: &[JobResult], stage: Option<&str>) -> Option<Spread> {
    spread(results, stage, |s| s.frechet)
}

/// Distance over that of the base with the same seed, and so the same noise and labels: mean over the seeds that both
/// have.
fn ratio(results: &[JobResult], stage: Option<&str>, bases: &[JobResult]) -> Option<f64> {
    let of = |r: &JobResult| {
        let base = bases.iter().find(|b| b.seed == r.seed)?;
        let [own, base] = [frechet(std::slice::from_ref(r), stage)?, frechet(std::slice::from_ref(base), None)?];
        Some(own.mean / base.mean)
    };
    Spread::of(&results.iter().filter_map(of).collect::<Vec<_>>()).map(|s| s.mean)
}

fn spread(results: &[JobResult], stage: Option<&str>, of: fn(&Score) -> f64) -> Option<Spread> {
    let pick = |r: &JobResult| match stage {
        None => r.last().and_then(|s| s.score),
        Some(name) => r.stages.iter().find(|s| s.name == name).and_then(|s| s.score),
    };
    Spread::of(&results.iter().filter_map(pick).map(|s| of(&s)).collect::<Vec<_>>())
}

/// The lines of a row: one for each stage that was sampled; one that says so where nothing was run.
fn lines(row: &Row, results: &[JobResult], bases: &[JobResult]) -> Vec<Line> {
    let stages: Vec<String> = match row.control {
        Some(_) => vec![String::new()],
        None => row.scored().iter().map(|s| s.name().to_string()).collect(),
    };
    let line = |name: &String| {
        let stage = (!name.is_empty()).then_some(name.as_str());
        let first = results.first();
        let mean = |values: Vec<f64>| Spread::of(&values).map(|s| s.mean);
        let frechet = frechet(results, stage);
        Line {
            row: row.name.clone(),
            stage: if stages.len() > 1 { name.clone() } else { String::new() },
            what: first.map_or(String::new(), |r| {
                r.operators.iter().map(|(op, n)| format!("{n} × {op}")).collect::<Vec<_>>().join(", ")
            }),
            seeds: results.len(),
            ratio: ratio(results, stage, bases),
            kid: spread(results, stage, |s| s.kid).map(|s| s.mean),
            precision: spread(results, stage, |s| s.precision).map(|s| s.mean),
            recall: spread(results, stage, |s| s.recall).map(|s| s.mean),
            agreement: spread(results, stage, |s| s.agreement).map(|s| s.mean),
            loss: mean(
                results
                    .iter()
                    .filter_map(|r| match stage {
                        None => r.last()?.loss,
                        Some(name) => r.stages.iter().find(|s| s.name == name)?.loss,
                    })
                    .collect(),
            ),
            residual: mean(results.iter().filter_map(|r| r.residual).collect()),
            change: first.filter(|_| row.control.is_none()).map(|r| r.change.into()),
            train_seconds: mean(
                results
                    .iter()
                    .filter_map(|r| {
                        let both = [r.distill, r.finetune].into_iter().flatten();
                        both.map(|s| s.seconds).reduce(|a, b| a + b)
                    })
                    .collect(),
            ),
            image_seconds: mean(results.iter().filter_map(|r| r.last()?.seconds_per_image).collect()),
            frechet,
        }
    };
    stages.iter().map(line).collect()
}

/// What the numbers say, each sentence computed.
fn findings(rows: &[(&Row, Vec<JobResult>)], bases: &[JobResult]) -> Vec<Finding> {
    if bases.is_empty() {
        return vec![Finding::open("The base was not scored: nothing can be said.")];
    }
    let grafts = rows.iter().filter(|(row, results)| row.control.is_none() && !results.is_empty());
    let scored: Vec<(&Row, &JobResult, f64)> =
        grafts.filter_map(|(row, results)| Some((*row, results.first()?, ratio(results, None, bases)?))).collect();
    let mut found = Vec::new();
    let best = scored.iter().filter(|(_, r, _)| r.attention_replaced == 1.0).min_by(|a, b| a.2.total_cmp(&b.2));
    found.push(match best {
        None => Finding::open("No replacement of all attention was run."),
        Some((row, _, ratio)) => Finding {
            holds: Some(*ratio <= GOAL),
            text: format!(
                "Best replacement of all attention: {} at {ratio:.2} times the distance of the base (goal: at most {GOAL}).",
                row.name
            ),
        },
    });
    let (good, bad): (Vec<_>, Vec<_>) = scored.iter().partition(|(.., ratio)| *ratio <= GOAL);
    let names = |list: &[&(&Row, &JobResult, f64)]| {
        list.iter().map(|(row, _, ratio)| format!("{} ({ratio:.2})", row.name)).collect::<Vec<_>>().join(", ")
    };
    if !good.is_empty() {
        found.push(Finding { holds: Some(true), text: format!("Within {GOAL} times the base: {}.", names(&good)) });
    }
    if !bad.is_empty() {
        found.push(Finding { holds: Some(false), text: format!("Worse than that: {}.", names(&bad)) });
    }
    let open: Vec<&str> = rows.iter().filter(|(_, r)| r.is_empty()).map(|(row, _)| row.name.as_str()).collect();
    if !open.is_empty() {
        let tiers = if rows.iter().any(|(r, v)| v.is_empty() && r.tier == Tier::Core) { "" } else { " (tier full)" };
        found.push(Finding::open(&format!("Not run{tiers}: {}.", open.join(", "))));
    }
    found
}

/// How far from the base a graft may be to count as a success, as a ratio of Fréchet distances.
const GOAL: f64 = 1.15;
