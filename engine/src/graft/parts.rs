//! Stage 1 by several processes: each trains every n-th site in a folder of its own, and what they have made is
//! gathered into what one process would have made, to the bit. Sites see nothing of each other, so nothing else is
//! needed than to keep them apart.

use super::distill::{Distiller, HELD_OUT_LOG, HeldOut, Progress};
use super::pair;
use super::plan::Assignment;
use crate::error::{Error, Result};
use crate::io::jsonl::{self, JsonLog};
use crate::io::{atomic, files};
use crate::train::checkpoint::{self, CHECKPOINT, LOSS_LOG};
use crate::train::sites::SiteLearner;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The sites i of a plan with i mod `of` = `index`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    index: usize,
    of: usize,
}

impl fmt::Display for Part {
    /// `0/4`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

impl FromStr for Part {
    type Err = Error;

    fn from_str(text: &str) -> Result<Part> {
        let numbers = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((index, of)) if index < of => Ok(Part { index, of }),
            _ => Err(Error::usage("--sites", "no such part")
                .is(format!("{text:?}"))
                .must("i/n with i from 0 to n - 1, or merge")),
        }
    }
}

impl Part {
    /// Its folder in that of stage 1.
    pub(super) fn folder(&self, stage: &Path) -> PathBuf {
        stage.join(format!("part-{}-of-{}", self.index, self.of))
    }

    /// Its own sites.
    ///
    /// # Errors
    /// More parts than sites.
    pub(super) fn choose(&self, sites: &[Assignment]) -> Result<Vec<Assignment>> {
        // A pair of blocks and the operators inside it are one thing to train.
        let units = pair::units(sites);
        if self.of > units.len() {
            return Err(Error::usage("--sites", "more parts than sites")
                .is(self)
                .must(format!("at most {} parts", units.len())));
        }
        Ok(units.into_iter().skip(self.index).step_by(self.of).flatten().cloned().collect())
    }

    /// What its checkpoint must have come from.
    pub(super) fn fingerprint(&self, run: &str) -> String {
        format!("{run} sites={self}")
    }

    /// The part that a folder of stage 1 is for.
    fn of_folder(path: &Path) -> Option<Part> {
        let name = files::file_name(path);
        let (index, of) = name.strip_prefix("part-")?.split_once("-of-")?;
        format!("{index}/{of}").parse().ok()
    }
}

/// Whether stage 1 was begun in parts and has no checkpoint of its own yet; says in how many, the fewest first.
///
/// # Errors
/// A folder that cannot be listed.
pub(super) fn begun(stage: &Path) -> Result<Vec<usize>> {
    if !stage.is_dir() || stage.join(CHECKPOINT).exists() {
        return Ok(Vec::new());
    }
    let mut counts: Vec<usize> =
        files::list(stage)?.iter().filter_map(|path| Part::of_folder(path)).map(|part| part.of).collect();
    counts.sort_unstable();
    counts.dedup();
    Ok(counts)
}

/// Gathers `of` finished parts into `whole`, which was opened at its start on all sites: their logs, then their
/// parameters and optimisers as its checkpoint.
///
/// # Errors
/// A part that is missing, not finished, in use, or of another run: nothing is written then.
pub(super) fn gather<M: SiteLearner>(
    whole: &mut Distiller<'_, M>,
    stage: &Path,
    of: usize,
    steps: u64,
    run: &str,
) -> Result<()> {
    let parts: Vec<Part> = (0..of).map(|index| Part { index, of }).collect();
    let mut locks = Vec::new();
    for part in &parts {
        let folder = part.folder(stage);
        let unfinished = |is: String| {
            Error::failure(folder.display().to_string(), "a part of stage 1 is not finished")
                .is(is)
                .must(format!("at step {steps}"))
                .fix(format!(
                    "run `graft distill PLAN --run DIR --sites {part}` to its end, or remove all part folders"
                ))
        };
        if !folder.join(CHECKPOINT).is_file() {
            return Err(unfinished("without a checkpoint".into()));
        }
        locks.push(atomic::RunLock::acquire(&folder)?);
        let mut state = whole.state_mut();
        let mut own: Vec<_> = state.drain(..).skip(part.index).step_by(of).collect();
        checkpoint::restore(&folder.join(CHECKPOINT), &mut own, &part.fingerprint(run))?;
        match own.first().map_or(0, |(_, optimiser)| optimiser.step) {
            step if step < steps => return Err(unfinished(format!("at step {step}"))),
            _ => {}
        }
    }
    let folders: Vec<PathBuf> = parts.iter().map(|part| part.folder(stage)).collect();
    join(&folders, stage, LOSS_LOG, |line: &mut Progress, other: Progress| {
        line.losses.extend(other.losses);
        // Side by side, the slowest sets the pace.
        line.images_per_second = line.images_per_second.min(other.images_per_second);
    })?;
    join(&folders, stage, HELD_OUT_LOG, |line: &mut HeldOut, other: HeldOut| line.sites.extend(other.sites))?;
    whole.save()
}

/// Joins the lines of the same number of a log that every part has.
fn join<T: Serialize + DeserializeOwned>(
    parts: &[PathBuf],
    stage: &Path,
    log: &str,
    add: impl Fn(&mut T, T),
) -> Result<()> {
    let mut joined: Vec<T> = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        let path = part.join(log);
        let damaged = || Error::failure(path.display().to_string(), "the logs of the parts do not fit together");
        let lines = jsonl::read(&path)?;
        if i > 0 && lines.len() != joined.len() {
            return Err(damaged()
                .is(format!("{} lines", lines.len()))
                .must(format!("{} as in the others", joined.len())));
        }
        for (n, line) in lines.into_iter().enumerate() {
            let line: T = serde_json::from_value(line).map_err(|e| damaged().is(format!("line {}: {e}", n + 1)))?;
            match joined.get_mut(n).filter(|_| i > 0) {
                Some(first) => add(first, line),
                None => joined.push(line),
            }
        }
    }
    let mut out = JsonLog::create(&stage.join(log))?;
    joined.iter().try_for_each(|line| out.append(line))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::operators::{Site, Spec};

    #[test]
    fn parts_share_the_sites_out() {
        let sites: Vec<Assignment> = (0..5).map(|block| Assignment::new(block, Site::Attn, Spec::new("mha"))).collect();
        let blocks = |text: &str| -> Vec<usize> {
            let part: Part = text.parse().unwrap();
            part.choose(&sites).unwrap().iter().map(|a| a.block).collect()
        };
        assert_eq!((blocks("0/1"), blocks("0/2"), blocks("1/2")), (vec![0, 1, 2, 3, 4], vec![0, 2, 4], vec![1, 3]));
        let many: Part = "5/6".parse().unwrap();
        assert!(
            many.choose(&sites).unwrap_err().to_string().contains("more parts than sites; is 5/6; must be at most 5")
        );
        for bad in ["2/2", "1", "a/b", "-1/2", "0/0", "merged"] {
            assert!(bad.parse::<Part>().unwrap_err().to_string().contains("--sites: no such part"), "{bad}");
        }
        let part: Part = "3/12".parse().unwrap();
        assert_eq!(Part::of_folder(&part.folder(Path::new("run/distill"))), Some(part));
        assert_eq!(Part::of_folder(Path::new("run/distill/part-3")), None);
    }
}
