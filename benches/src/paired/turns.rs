//! Measurements in turns.

use crate::machine::{busy_share, median};
use graft_engine::error::{Error, Result};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A measurement is a loop of calls at least this long, so that neither a clock nor the way to a call is in it.
pub const LEAST_MS: f64 = 20.0;

/// Most calls of one measurement.
const MOST_CALLS: usize = 20_000;

/// Share of the processor that others may use before a measurement.
const IDLE: f64 = 0.1;

/// Runs a number of calls and gives the milliseconds of all together.
pub type Side<'a> = dyn FnMut(usize) -> Result<f64> + 'a;

/// Times per call, in the order in which they were taken.
#[derive(Clone, Debug)]
pub struct Turns {
    /// Milliseconds of a call of ours.
    pub ours: Vec<f64>,
    /// Milliseconds of a call of the peer's.
    pub peer: Vec<f64>,
    /// Calls of one measurement: ours, the peer's.
    pub calls: [usize; 2],
}

impl Turns {
    /// Takes `pairs` measurements of either side. Between two, `pause` lets the threads of one side go to sleep.
    /// Both sides have run before.
    ///
    /// # Errors
    /// Those of the sides.
    pub fn take(pairs: usize, pause: Duration, ours: &mut Side<'_>, peer: &mut Side<'_>) -> Result<Turns> {
        let calls = [calls(ours)?, calls(peer)?];
        let mut turns = Turns { ours: Vec::new(), peer: Vec::new(), calls };
        for pair in 0..pairs {
            for turn in 0..2 {
                std::thread::sleep(pause);
                if (pair + turn) % 2 == 0 {
                    turns.ours.push(ours(calls[0])? / calls[0] as f64);
                } else {
                    turns.peer.push(peer(calls[1])? / calls[1] as f64);
                }
            }
        }
        Ok(turns)
    }

    /// The peer's time over ours, of the medians.
    pub fn ratio(&self) -> f64 {
        median(&self.peer) / median(&self.ours)
    }

    /// The fields of a row.
    pub fn fields(&self, target: Option<f64>) -> Value {
        json!({
            "ours_ms": median(&self.ours), "peer_ms": median(&self.peer), "ratio": self.ratio(), "target": target,
            "ours_spread": spread(&self.ours), "peer_spread": spread(&self.peer),
            "ours_all_ms": self.ours, "peer_all_ms": self.peer,
            "ours_calls": self.calls[0], "peer_calls": self.calls[1], "pairs": self.ours.len(),
        })
    }
}

/// Calls that take [`LEAST_MS`] together.
fn calls(side: &mut Side<'_>) -> Result<usize> {
    let mut count = 1;
    // The first call may still set something up; a loop that is long enough says how long a call takes.
    loop {
        let ms = side(count)?;
        if ms >= LEAST_MS / 4.0 || count >= MOST_CALLS {
            let needed = (LEAST_MS / (ms / count as f64)).ceil();
            return Ok((needed as usize).clamp(1, MOST_CALLS));
        }
        count *= 8;
    }
}

/// A loop of calls of ours.
///
/// # Errors
/// Those of the call.
pub fn loop_of(call: &mut dyn FnMut() -> Result<()>, count: usize) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..count {
        call()?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// Half the distance between the quartiles, as a share of the median.
pub fn spread(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |share: f64| sorted.get((share * (sorted.len().max(1) - 1) as f64).round() as usize).copied();
    match (at(0.25), at(0.75)) {
        (Some(low), Some(high)) => 0.5 * (high - low) / median(&sorted),
        _ => f64::NAN,
    }
}

/// The share of the processor that others use, which must be small: spinning barriers collapse on a shared processor,
/// and a peer's time taken there would flatter us.
///
/// # Errors
/// A busy machine, unless `allowed`.
pub fn idle(pause: Duration, allowed: bool) -> Result<f64> {
    let busy = busy_share(pause);
    if busy > IDLE && !allowed {
        return Err(Error::failure("machine", "is busy; its times would mean nothing")
            .is(format!("{:.0} % in use", 100.0 * busy))
            .must(format!("at most {:.0} %", 100.0 * IDLE))
            .fix("stop other work, or look with --dry-run"));
    }
    Ok(busy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_calls_are_repeated_and_times_are_those_of_one() {
        let mut order = Vec::new();
        let record = std::cell::RefCell::new(&mut order);
        let side = |name: &'static str, ms: f64| {
            let record = &record;
            move |count: usize| {
                record.borrow_mut().push((name, count));
                Ok(ms * count as f64)
            }
        };
        let turns = Turns::take(3, Duration::ZERO, &mut side("ours", 0.5), &mut side("peer", 30.0)).unwrap();
        assert_eq!(
            (turns.calls, turns.ours.as_slice(), turns.peer.as_slice()),
            ([40, 1], &[0.5; 3][..], &[30.0; 3][..])
        );
        assert_eq!(turns.ratio(), 60.0);
        let last: Vec<_> = order.iter().rev().take(6).rev().map(|(name, _)| *name).collect();
        assert_eq!(last, ["ours", "peer", "peer", "ours", "ours", "peer"]);
    }

    #[test]
    fn spread_is_half_the_quartile_distance() {
        assert_eq!(spread(&[1.0, 2.0, 3.0, 4.0, 5.0]), 1.0 / 3.0);
        assert!(spread(&[]).is_nan());
    }
}
