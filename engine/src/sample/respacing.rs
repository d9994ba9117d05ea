//! Which timesteps of a trained process a sampler visits, as written on the command line.

use crate::error::{Error, Result};
use std::str::FromStr;

/// A rule that keeps some of T timesteps. Text forms, as in the original DiT code:
/// `250` keeps 250 spread over the whole range with both ends; `10,15,20` cuts the range into equal sections and keeps
/// that many in each; `ddim50` keeps 50 with one integer stride, starting at 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Respacing {
    /// Number of timesteps kept in each of equally long sections.
    Sections(Vec<usize>),
    /// Number of timesteps kept with the smallest integer stride that gives exactly this many.
    Stride(usize),
}

impl FromStr for Respacing {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let count = |word: &str| {
            word.trim().parse::<usize>().map_err(|_| {
                Error::usage("respacing", "not a number of steps")
                    .is(format!("{word:?} in {text:?}"))
                    .must("a count such as 250, sections such as 10,15,20, or a stride such as ddim50")
            })
        };
        match text.trim().strip_prefix("ddim") {
            Some(n) => Ok(Respacing::Stride(count(n)?)),
            None => Ok(Respacing::Sections(text.split(',').map(count).collect::<Result<_>>()?)),
        }
    }
}

impl Respacing {
    /// The kept timesteps out of `0..total`, ascending and distinct.
    ///
    /// # Errors
    /// A usage error when a count is zero, exceeds its section, or no integer stride yields it.
    pub fn timesteps(&self, total: usize) -> Result<Vec<usize>> {
        match self {
            Respacing::Stride(n) => strided(*n, total),
            Respacing::Sections(counts) => sections(counts, total),
        }
    }
}

/// Error unless 1 <= n <= limit.
pub(crate) fn check_count(place: &str, n: usize, limit: usize) -> Result<()> {
    if (1..=limit).contains(&n) {
        return Ok(());
    }
    let error = Error::usage(place, "wrong number of steps").is(n);
    Err(match limit {
        0 => error.must("at least 1, which needs a schedule with more timesteps"),
        _ => error.must(format!("1 to {limit}")),
    })
}

fn strided(n: usize, total: usize) -> Result<Vec<usize>> {
    check_count("steps", n, total)?;
    let kept = |stride: usize| total.div_ceil(stride);
    match (1..=total).find(|&stride| kept(stride) <= n) {
        Some(stride) if kept(stride) == n => Ok((0..total).step_by(stride).collect()),
        // The counts fall as the stride grows, so the neighbours of the first smaller one are the nearest possible.
        other => {
            let stride = other.unwrap_or(total);
            let near = format!("{} or {}", kept(stride), kept(stride.saturating_sub(1).max(1)));
            Err(Error::usage("steps", format!("no integer stride keeps {n} of {total} timesteps"))
                .is(n)
                .must(format!("a count that a stride gives; nearest: {near}"))
                .fix("choose one of these counts, or a respacing without stride"))
        }
    }
}

fn sections(counts: &[usize], total: usize) -> Result<Vec<usize>> {
    let parts = counts.len();
    check_count("respacing sections", parts, total)?;
    let mut kept = Vec::new();
    let mut start = 0;
    for (i, &count) in counts.iter().enumerate() {
        // The first `total % parts` sections take one of the timesteps that do not divide evenly.
        let size = total / parts + usize::from(i < total % parts);
        check_count(if parts == 1 { "steps" } else { "steps of a respacing section" }, count, size)?;
        let stride = if count == 1 { 1.0 } else { (size - 1) as f64 / (count - 1) as f64 };
        // Accumulated, not multiplied: the ties of the original rounding depend on it.
        let mut position = 0.0f64;
        for _ in 0..count {
            kept.push(start + position.round_ties_even() as usize);
            position += stride;
        }
        start += size;
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timesteps(spec: &str, total: usize) -> Result<Vec<usize>> {
        spec.parse::<Respacing>()?.timesteps(total)
    }

    #[test]
    fn small_cases() {
        assert_eq!(timesteps("4", 10).unwrap(), [0, 3, 6, 9]);
        assert_eq!(timesteps("2,3", 10).unwrap(), [0, 4, 5, 7, 9]);
        assert_eq!(timesteps(" 1, 2 ,1", 10).unwrap(), [0, 4, 6, 7]);
        assert_eq!(timesteps("ddim5", 10).unwrap(), [0, 2, 4, 6, 8]);
        assert_eq!(timesteps("ddim1", 10).unwrap(), [0]);
        assert_eq!(timesteps("ddim7", 1000).unwrap(), (0..7).map(|i| 143 * i).collect::<Vec<_>>());
    }

    #[test]
    fn every_count_gives_distinct_ascending_timesteps() {
        for n in 1..=1000 {
            let kept = timesteps(&n.to_string(), 1000).unwrap();
            assert_eq!(kept.len(), n);
            assert!(kept.windows(2).all(|w| w[0] < w[1]) && kept[n - 1] <= 999, "{n}");
        }
    }

    #[test]
    fn misuse_is_explained() {
        for (spec, part) in [
            ("0", "must be 1 to 1000"),
            ("1001", "is 1001"),
            ("", "\"\" in \"\""),
            ("fast", "ddim50"),
            ("-3", "not a number"),
            ("10,,5", "\"\" in \"10,,5\""),
            ("501,10", "must be 1 to 500"),
            ("ddim", "not a number"),
            ("ddim0", "must be 1 to 1000"),
            ("ddim1001", "must be 1 to 1000"),
            ("ddim70", "nearest: 67 or 72"),
        ] {
            let e = timesteps(spec, 1000).unwrap_err();
            assert_eq!(e.exit_code(), 2, "{spec}");
            assert!(e.to_string().contains(part), "{spec}: {e}");
        }
    }
}
