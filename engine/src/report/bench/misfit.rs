//! How far the cost model is from what was measured.

use super::Row;
use crate::report::format::significant;
use std::fmt;

/// The error of the cost model over a set of rows, as factors of at least 1 in either direction.
#[derive(Clone, Debug, PartialEq)]
pub struct Misfit {
    /// Rows with a prediction.
    pub rows: usize,
    /// Of the middle row.
    pub median: f64,
    /// Of the worst row.
    pub worst: f64,
    /// What the worst row measures, predicted and measured milliseconds.
    pub what: (String, f64, f64),
}

impl Misfit {
    /// The error over the rows that have a prediction, if any has; those of a way that was asked for are left out.
    pub fn of(rows: &[Row]) -> Option<Misfit> {
        let mut errors: Vec<(f64, &Row, f64)> = rows
            .iter()
            .filter_map(|r| {
                let predicted = r.predicted_ms.filter(|p| *p > 0.0 && r.ms > 0.0 && r.way.is_none())?;
                Some(((r.ms / predicted).ln().abs(), r, predicted))
            })
            .collect();
        errors.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (worst, row, predicted) = *errors.last()?;
        let what = (format!("{} {}{}", row.case, row.work, row.axes_in_words()), predicted, row.ms);
        Some(Misfit { rows: errors.len(), median: errors[errors.len() / 2].0.exp(), worst: worst.exp(), what })
    }
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, predicted, measured) = &self.what;
        write!(
            f,
            "The cost model is off by a factor of {} in the middle of {} rows, at worst by {}: {what}, predicted {} ms, \
             measured {} ms.",
            significant(self.median),
            self.rows,
            significant(self.worst),
            significant(*predicted),
            significant(*measured)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::row;
    use super::*;

    #[test]
    fn both_directions_count() {
        let of = |predicted: Option<f64>, ms: f64| Row { predicted_ms: predicted, ..row("op", "a", ms) };
        let found = Misfit::of(&[of(Some(1.0), 1.0), of(Some(4.0), 1.0), of(Some(1.0), 2.0), of(None, 9.0)]).unwrap();
        assert_eq!((found.rows, found.median), (3, 2f64.ln().exp()));
        assert!((found.worst - 4.0).abs() < 1e-12 && found.what.1 == 4.0, "{found:?}");
        assert_eq!(Misfit::of(&[of(None, 1.0)]), None);
    }
}
