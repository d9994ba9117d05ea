//! How the time of a battery is shared: every stage gets the part of it that its steps are expected to take of what all
//! are, so that a short battery too sees something of each; what a stage leaves goes to those behind it, and at the end to
//! the steps that were passed over.

use super::plan::{Stage, Step};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Most checks at a time.
const BESIDE: usize = 12;

/// Less time than this is none.
const LEAST: Duration = Duration::from_secs(2);

/// Steps that run at a time where nothing in them is timed.
pub fn beside() -> usize {
    BESIDE.min(std::thread::available_parallelism().map_or(1, usize::from))
}

/// The rounds of a battery: stages within their shares, then what was passed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Round {
    Shares,
    Rest,
}

/// The times of a battery.
pub struct Schedule {
    time: Duration,
    /// When each stage has had its share.
    ends: BTreeMap<Stage, Duration>,
    begun: BTreeSet<Stage>,
}

impl Schedule {
    /// For `time` in all and the steps that are to run.
    pub fn new<'s>(time: Duration, steps: impl Iterator<Item = &'s Step>) -> Schedule {
        let mut costs: BTreeMap<Stage, Duration> = BTreeMap::new();
        steps.for_each(|step| *costs.entry(step.stage).or_default() += step.cost());
        let all: Duration = costs.values().sum();
        let scale = (time.as_secs_f64() / all.as_secs_f64().max(1.0)).min(1.0);
        let mut end = Duration::ZERO;
        let ends = costs.into_iter().map(|(stage, cost)| {
            end += cost.mul_f64(scale);
            // With time enough for all nobody is cut off.
            (stage, if scale < 1.0 { end } else { time })
        });
        Schedule { time, ends: ends.collect(), begun: BTreeSet::new() }
    }

    /// How long a step may run that would start now, after `elapsed`; none where its time is over. A stage starts its
    /// first step whatever those before it took, and any other only where half of what it is expected to take is left.
    pub fn room(&self, step: &Step, round: Round, elapsed: Duration) -> Option<Duration> {
        let left = self.time.saturating_sub(elapsed);
        let own = match round {
            Round::Rest => left,
            Round::Shares => self.ends.get(&step.stage).map_or(left, |end| end.saturating_sub(elapsed)),
        };
        let first = round == Round::Shares && !self.begun.contains(&step.stage);
        let starts = left >= LEAST && (first || own >= LEAST.max(step.cost() / 2));
        starts.then(|| step.limit.min(left).min(own.max(Duration::from_secs(step.expected))))
    }

    /// Notes that a step of a stage has run.
    pub fn ran(&mut self, stage: Stage) {
        self.begun.insert(stage);
    }
}

/// Whether the battery is expected to come to each step within `time`; those that cannot run take none of it.
pub fn reached(steps: &[Step], time: Duration) -> Vec<bool> {
    let can = |step: &&Step| step.missing.is_none();
    let mut schedule = Schedule::new(time, steps.iter().filter(can));
    let (mut elapsed, mut reached) = (Duration::ZERO, vec![false; steps.len()]);
    for round in [Round::Shares, Round::Rest] {
        for (step, reached) in steps.iter().zip(&mut reached).filter(|(step, done)| can(step) && !**done) {
            if schedule.room(step, round, elapsed).is_some() {
                (elapsed, *reached) = (elapsed + step.cost(), true);
                schedule.ran(step.stage);
            }
        }
    }
    reached
}

#[cfg(test)]
mod tests {
    use super::super::plan::steps;
    use super::*;
    use std::path::Path;

    fn all() -> Vec<Step> {
        let mut steps = steps(Path::new("nowhere"), Path::new("none")).unwrap();
        steps.iter_mut().for_each(|step| step.missing = None);
        steps
    }

    fn stages(steps: &[Step], minutes: u64) -> BTreeSet<Stage> {
        let reached = reached(steps, Duration::from_secs(60 * minutes));
        steps.iter().zip(reached).filter(|(_, reached)| *reached).map(|(step, _)| step.stage).collect()
    }

    #[test]
    fn a_short_battery_sees_something_of_every_stage() {
        let steps = all();
        assert_eq!(stages(&steps, 9).len(), Stage::ALL.len());
        let reached = |minutes: u64| reached(&steps, Duration::from_secs(60 * minutes)).iter().filter(|r| **r).count();
        assert!(reached(9) < reached(20) && reached(20) < steps.len());
        assert_eq!(reached(60), steps.len());
    }

    #[test]
    fn what_a_stage_leaves_goes_to_others_and_what_it_overran_stops_none() {
        let steps: Vec<Step> = all().into_iter().filter(|s| s.stage >= Stage::Operators).collect();
        let time = Duration::from_secs(540);
        let mut schedule = Schedule::new(time, steps.iter());
        let of = |stage: Stage| steps.iter().filter(move |s| s.stage == stage);
        let (one, other) = (of(Stage::Operators).next().unwrap(), of(Stage::Models).next().unwrap());
        let end = schedule.ends[&Stage::Operators];
        assert!(end < time / 2 && schedule.ends.values().max() <= Some(&time), "{:?}", schedule.ends);
        assert_eq!(schedule.room(one, Round::Shares, Duration::ZERO), Some(one.limit.min(end)));
        schedule.ran(Stage::Operators);
        assert_eq!(schedule.room(one, Round::Shares, end), None);
        assert!(schedule.room(one, Round::Rest, end).is_some());
        // The models' share is over before they begin: one of them runs all the same, for what it is expected to take.
        let late = schedule.ends[&Stage::Models];
        assert_eq!(schedule.room(other, Round::Shares, late), Some(Duration::from_secs(other.expected)));
        assert_eq!(schedule.room(other, Round::Shares, time), None);
        assert_eq!(Schedule::new(Duration::from_secs(7200), steps.iter()).ends[&Stage::Operators].as_secs(), 7200);
    }
}
