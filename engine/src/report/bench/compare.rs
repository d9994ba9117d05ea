//! Two files of rows: what became faster or slower, beyond the noise of both.

use super::{CEILING, Row};

/// A measurement that stands in both files.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// What was measured.
    pub subject: String,
    /// Median milliseconds before.
    pub before: f64,
    /// And after.
    pub after: f64,
    /// Even the fastest call after is slower than nine of ten before.
    pub slower: bool,
    /// Nine of ten calls after are faster than the fastest before.
    pub faster: bool,
}

impl Change {
    /// How many times as fast as before.
    pub fn ratio(&self) -> f64 {
        self.before / self.after
    }
}

/// The measurements that both files have, in the order of `after`; the last row of a subject counts. Ceilings are no
/// work of ours and are left out.
pub fn compare(before: &[Row], after: &[Row]) -> Vec<Change> {
    let last = |i: usize| {
        let subject = after[i].subject();
        (!after[i + 1..].iter().any(|r| r.subject() == subject)).then_some(subject)
    };
    let changes = after.iter().enumerate().filter(|(_, row)| row.bench != CEILING).filter_map(|(i, row)| {
        let subject = last(i)?;
        let old = before.iter().rfind(|r| r.subject() == subject)?;
        let (slower, faster) = (row.ms_min > old.ms_p90, row.ms_p90 < old.ms_min);
        Some(Change { subject, before: old.ms, after: row.ms, slower, faster })
    });
    changes.collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::row;
    use super::*;

    #[test]
    fn only_what_leaves_the_noise_is_a_change() {
        let before = [row("op", "a", 1.0), row("op", "b", 1.0), row("op", "c", 1.0), row("op", "gone", 1.0)];
        let after = [row("op", "a", 1.04), row("op", "b", 1.2), row("op", "c", 0.5), row("op", "new", 1.0)];
        let found = compare(&before, &after);
        let flags: Vec<_> = found.iter().map(|c| (c.slower, c.faster)).collect();
        assert_eq!(flags, [(false, false), (true, false), (false, true)]);
        assert_eq!(found[2].ratio(), 2.0);
    }

    #[test]
    fn the_last_row_of_a_subject_counts_and_ceilings_do_not() {
        let before = [row("op", "a", 9.0), row("op", "a", 1.0), row(CEILING, "copy", 1.0)];
        let after = [row("op", "a", 9.0), row("op", "a", 1.0), row(CEILING, "copy", 2.0)];
        let found = compare(&before, &after);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].before, found[0].after, found[0].slower), (1.0, 1.0, false));
    }
}
