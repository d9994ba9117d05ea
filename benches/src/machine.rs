//! The machine and the source that a measured row belongs to.

pub use graft_engine::io::system::processor;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Commit of the working tree, with `+` where it has changes; `unknown` outside a repository.
pub fn commit(root: &Path) -> String {
    let git = |args: &[&str]| {
        let out = Command::new("git").arg("-C").arg(root).args(args).output().ok().filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&out.stdout).trim().to_string())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else { return "unknown".into() };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_none_or(|s| !s.is_empty());
    if changed { format!("{commit}+") } else { commit }
}

/// Share of the processor time that was in use during `pause`, in 0..=1; NaN where the system does not tell.
pub fn busy_share(pause: Duration) -> f64 {
    let Some(before) = processor_ticks() else { return f64::NAN };
    std::thread::sleep(pause);
    let Some(after) = processor_ticks() else { return f64::NAN };
    let (idle, total) = (after[0] - before[0], after[1] - before[1]);
    1.0 - idle / total.max(1.0)
}

/// Idle and total ticks of all processors since the start of the system.
fn processor_ticks() -> Option<[f64; 2]> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<f64> = line.split_whitespace().filter_map(|w| w.parse().ok()).collect();
    // user, nice, system, idle, iowait, …
    Some([ticks.get(3)? + ticks.get(4)?, ticks.iter().take(8).sum()])
}

/// Middle value; the mean of the middle two where their number is even. NaN of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => 0.5 * (sorted[n / 2 - 1] + sorted[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_share() {
        let share = busy_share(Duration::from_millis(50));
        assert!(share.is_nan() || (0.0..=1.0).contains(&share), "{share}");
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
