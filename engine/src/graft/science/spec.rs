//! The file of a study: settings that all its rows share, and the rows.
//!
//! ```toml
//! title = "Operators on small clothes"
//! note = "What the reader should know first."
//!
//! # [base], [data], [distill], [finetune] and [eval] as in a plan; every row takes them.
//!
//! [[row]]
//! name = "hyena_x-50"                # folder of its runs
//! group = "Token mixers"             # heading in the report
//! tier = "core"                      # core (default) or full
//! seeds = [0, 1, 2]                  # of both stages and of the samples; [0] where not given
//! score = ["distilled", "finetuned"] # stages that are sampled; ["finetuned"] where not given
//! graft = [{ site = "attn", layers = "every-other", operator = { kind = "hyena_x" } }]
//! distill = { steps = 400 }          # over the shared settings; likewise finetune
//! ```
//!
//! Instead of `graft`, a control says `control = "base"` (the base as it is) or `control = "longer"` (the base,
//! finetuned as the grafted models are).

use crate::error::{Error, Result};
use crate::graft::assemble::Stage;
use crate::graft::plan::Plan;
use crate::io::files;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::Path;
use toml::{Table, Value};

/// A study that has been read and checked.
#[derive(Clone, Debug)]
pub struct Study {
    /// Heading of the report.
    pub title: String,
    /// What the reader should know first.
    pub note: String,
    /// Rows in the order of the report.
    pub rows: Vec<Row>,
    shared: Table,
}

/// How much of a study is run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// The rows that a laptop runs in an hour or so.
    #[default]
    Core,
    /// Every row.
    Full,
}

/// What a control does to the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Control {
    /// Nothing.
    Base,
    /// It is finetuned as the grafted models are, and nothing is replaced.
    Longer,
}

/// A row: a graft or a control, over one or more seeds.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// Name, unique; also the folder of its runs.
    pub name: String,
    /// Heading that it stands under.
    pub group: String,
    /// Tier that runs it.
    #[serde(default)]
    pub tier: Tier,
    /// Seeds.
    #[serde(default = "first_seed")]
    pub seeds: Vec<u64>,
    /// Control instead of a graft.
    pub control: Option<Control>,
    #[serde(default = "last_stage")]
    score: Vec<String>,
    graft: Option<Vec<Table>>,
    distill: Option<Table>,
    finetune: Option<Table>,
}

fn first_seed() -> Vec<u64> {
    vec![0]
}

fn last_stage() -> Vec<String> {
    vec![Stage::Finetuned.name().to_string()]
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StudyText {
    title: String,
    #[serde(default)]
    note: String,
    base: Table,
    data: Table,
    #[serde(default)]
    distill: Table,
    #[serde(default)]
    finetune: Table,
    #[serde(default)]
    eval: Table,
    row: Vec<Row>,
}

impl Study {
    /// Reads a study; every row's plan is composed once, so that what is wrong shows before anything runs.
    ///
    /// # Errors
    /// The file, and the row with what is wrong in it.
    pub fn read(path: &Path) -> Result<Study> {
        Study::parse(&path.display().to_string(), &files::read_text(path)?)
    }

    /// Reads a study's text; `name` stands for the file in messages.
    ///
    /// # Errors
    /// As [`Study::read`].
    pub fn parse(name: &str, text: &str) -> Result<Study> {
        let wrong = |e: toml::de::Error| Error::usage(name, e.to_string().trim_end().replace('\n', " "));
        let raw: StudyText = toml::from_str(text).map_err(wrong)?;
        let sections = [
            ("base", raw.base),
            ("data", raw.data),
            ("distill", raw.distill),
            ("finetune", raw.finetune),
            ("eval", raw.eval),
        ];
        let shared = sections.into_iter().map(|(key, table)| (key.to_string(), Value::Table(table))).collect();
        let study = Study { title: raw.title, note: raw.note, rows: raw.row, shared };
        let mut names = BTreeSet::new();
        for row in &study.rows {
            let place = format!("{name}: row {:?}", row.name);
            if !names.insert(&row.name) {
                return Err(Error::usage(place, "two rows have this name").must("a name of its own"));
            }
            row.check()
                .and_then(|()| row.seeds.iter().try_for_each(|&s| study.plan(row, s).map(drop)))
                .map_err(|e| e.context(&place))?;
        }
        if study.rows.is_empty() {
            return Err(Error::usage(name, "the study has no row").must("at least one [[row]]"));
        }
        Ok(study)
    }

    /// A plan that carries what all rows share: base, data, settings of the stages and of the scores.
    ///
    /// # Errors
    /// As [`Study::plan`].
    pub fn settings(&self) -> Result<Plan> {
        self.compose(None, 0)
    }

    /// The plan of a row with a seed. That of a control grafts nothing that is used: its settings are.
    ///
    /// # Errors
    /// What is wrong with the plan, by line of the composed text.
    pub fn plan(&self, row: &Row, seed: u64) -> Result<Plan> {
        self.compose(Some(row), seed)
    }

    fn compose(&self, row: Option<&Row>, seed: u64) -> Result<Plan> {
        let mut plan = self.shared.clone();
        let over = row.map_or([None, None], |row| [row.distill.as_ref(), row.finetune.as_ref()]);
        for (key, over) in ["distill", "finetune"].into_iter().zip(over) {
            if let (Some(Value::Table(section)), Some(over)) = (plan.get_mut(key), over) {
                overlay(section, over);
            }
        }
        let seed =
            i64::try_from(seed).map_err(|_| Error::usage("seeds", "out of range").is(seed).must("below 2^63"))?;
        for key in ["distill", "finetune", "eval"] {
            if let Some(Value::Table(section)) = plan.get_mut(key) {
                section.insert("seed".into(), Value::Integer(seed));
            }
        }
        let grafts = row.and_then(|row| row.graft.clone()).unwrap_or_else(|| vec![placeholder()]);
        plan.insert("graft".into(), Value::Array(grafts.into_iter().map(Value::Table).collect()));
        let name = row.map_or("study", |row| row.name.as_str());
        let text = toml::to_string(&plan).map_err(|e| Error::failure(name, e.to_string()))?;
        Plan::parse(name, text)
    }
}

/// The graft in the plan of a control, which only carries settings.
fn placeholder() -> Table {
    let operator = Table::from_iter([("kind".to_string(), Value::from("mha"))]);
    Table::from_iter([
        ("site".to_string(), Value::from("attn")),
        ("layers".to_string(), Value::from("all")),
        ("operator".to_string(), Value::Table(operator)),
    ])
}

/// Puts `over` on top of `section`; tables are merged.
fn overlay(section: &mut Table, over: &Table) {
    for (key, value) in over {
        match (section.get_mut(key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => overlay(below, above),
            _ => {
                section.insert(key.clone(), value.clone());
            }
        }
    }
}

impl Row {
    /// Stages whose models are sampled.
    pub fn scored(&self) -> Vec<Stage> {
        let all = [Stage::Random, Stage::Distilled, Stage::Finetuned];
        all.into_iter().filter(|stage| self.score.iter().any(|s| s == stage.name())).collect()
    }

    fn check(&self) -> Result<()> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if self.name.is_empty() || self.name.starts_with('.') || !self.name.chars().all(plain) {
            return Err(Error::usage("name", "cannot be a folder").must("letters, digits, -, _ and dots"));
        }
        if self.control.is_some() == self.graft.is_some() {
            return Err(Error::usage("row", "neither graft nor control, or both").must("one of the two"));
        }
        if self.scored().len() != self.score.len() || self.score.is_empty() {
            return Err(Error::usage("score", "unknown stage, or one twice")
                .is(self.score.join(", "))
                .must("some of random, distilled, finetuned"));
        }
        if self.seeds.is_empty() || self.seeds.iter().collect::<BTreeSet<_>>().len() != self.seeds.len() {
            return Err(Error::usage("seeds", "no seed, or one twice").must("different seeds"));
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A study with the given rows.
    pub fn study(rows: &str) -> Result<Study> {
        let text = "title = \"t\"\n[base]\nmodel = \"none\"\n[data]\nkind = \"mnist\"\ndir = \"none\"\n[distill]\nsteps = 9\n\
                    optimizer = { lr = 1e-3, clip = 2.0 }\n";
        Study::parse("study.toml", &format!("{text}{rows}"))
    }

    const GRAFT: &str = "graft = [{ site = \"attn\", layers = \"all\", operator = { kind = \"hyena_x\" } }]\n";

    #[test]
    fn rows_overlay_what_is_shared() {
        let row = "[[row]]\nname = \"a\"\ngroup = \"g\"\nseeds = [3, 4]\ndistill = { optimizer = { lr = 5e-3 } }\n";
        let study = study(&format!("{row}{GRAFT}")).unwrap();
        let plan = study.plan(&study.rows[0], 4).unwrap();
        assert_eq!((plan.distill.steps, plan.distill.seed, plan.finetune.seed, plan.eval.seed), (9, 4, 4, 4));
        assert_eq!((plan.distill.optimizer.lr, plan.distill.optimizer.clip), (5e-3, 2.0));
        assert_eq!(study.rows[0].scored(), [Stage::Finetuned]);
    }

    #[test]
    fn mistakes_name_the_row() {
        let row = |rest: &str| format!("[[row]]\nname = \"a\"\ngroup = \"g\"\n{rest}");
        let cases = [
            (row(""), "row \"a\": row: neither graft nor control"),
            (row(&format!("control = \"base\"\n{GRAFT}")), "or both"),
            (row(&format!("score = [\"stage 3\"]\n{GRAFT}")), "unknown stage"),
            (row(&format!("seeds = [1, 1]\n{GRAFT}")), "one twice"),
            (row(&GRAFT.replace("hyena_x", "hyena_z")), "unknown operator"),
            (row(GRAFT) + &row(GRAFT), "two rows have this name"),
            (row(GRAFT).replace("\"a\"", "\"../a\""), "cannot be a folder"),
            (row(&format!("colour = 3\n{GRAFT}")), "unknown field `colour`"),
        ];
        for (rows, expected) in cases {
            let found = study(&rows).unwrap_err().to_string();
            assert!(found.contains(expected), "{found}\n  should hold: {expected}");
        }
    }
}
