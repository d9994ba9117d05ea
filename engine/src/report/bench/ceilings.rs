//! What a device can do at best, and the time that follows from it: the cost model.
//!
//! ```text
//! time = max(FLOPs / product + exponentials / exp, bytes / copy) + a call with no work
//! ```
//! Every rate is measured in the same run. On a processor arithmetic and exponentials share their units, so their times
//! add up; bytes that fit the caches move at the rate of a copy that does. What the model leaves out is told by its
//! error, which is reported wherever it is used: mostly how well operators that are no products use the units.

use super::{CACHED, CALL, CEILING, COPY, EXPS, PRODUCT, Row};

/// Bytes of all tensors of a call up to which they stay in the caches.
const IN_CACHE: f64 = (8 << 20) as f64;

/// Ceilings of a device and working type.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ceilings {
    /// Bytes per millisecond of a copy through memory.
    pub copy: Option<f64>,
    /// Bytes per millisecond of a copy in the caches.
    pub cached: Option<f64>,
    /// Operations per millisecond.
    pub product: Option<f64>,
    /// Exponentials per millisecond.
    pub exps: Option<f64>,
    /// Milliseconds of a call with no work.
    pub call: Option<f64>,
}

/// What a call needs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Needs {
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes.
    pub bytes: f64,
    /// Exponentials.
    pub exps: f64,
}

impl Ceilings {
    /// Those that hold for `row`.
    pub fn of(rows: &[Row], row: &Row) -> Ceilings {
        let same = |r: &&Row| r.bench == CEILING && r.device == row.device && r.threads == row.threads;
        let most = |case: &str, typed: bool, amount: &dyn Fn(&Row) -> Option<f64>| {
            let of = rows.iter().filter(same).filter(|r| r.case == case && (!typed || r.element == row.element));
            of.filter_map(|r| Some(amount(r)? / r.ms)).max_by(f64::total_cmp)
        };
        Ceilings {
            copy: most(COPY, false, &|r| r.bytes),
            cached: most(CACHED, false, &|r| r.bytes),
            product: most(PRODUCT, true, &|r| r.flops),
            exps: most(EXPS, false, &|r| r.exps),
            call: most(CALL, false, &|_| Some(1.0)).map(|calls| 1.0 / calls),
        }
    }

    /// The larger share of the two ceilings that a row reaches, and which: its bound. None where nothing is known.
    pub fn share(&self, row: &Row) -> Option<(f64, &'static str)> {
        let of_copy = row.bytes.zip(self.copy).map(|(bytes, ceiling)| (bytes / row.ms / ceiling, COPY));
        let of_product = row.flops.zip(self.product).map(|(flops, ceiling)| (flops / row.ms / ceiling, PRODUCT));
        of_copy.into_iter().chain(of_product).max_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// Milliseconds that a call is predicted to take; none where a ceiling that it needs was not measured.
    pub fn predict(&self, needs: Needs) -> Option<f64> {
        let rate = if needs.bytes <= IN_CACHE { self.cached.or(self.copy)? } else { self.copy? };
        let exps = if needs.exps > 0.0 { needs.exps / self.exps? } else { 0.0 };
        let arithmetic = if needs.flops > 0.0 { needs.flops / self.product? } else { 0.0 };
        let time = (arithmetic + exps).max(needs.bytes / rate);
        (time > 0.0).then_some(time + self.call.unwrap_or(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::row;
    use super::*;

    fn ceilings() -> Vec<Row> {
        let of = |case: &str, flops: Option<f64>, bytes: Option<f64>, exps: Option<f64>| Row {
            flops,
            bytes,
            exps,
            ..row(CEILING, case, 1.0)
        };
        vec![
            of(COPY, None, Some(10e6), None),
            of(CACHED, None, Some(50e6), None),
            of(PRODUCT, Some(8e9), None, None),
            of(EXPS, None, None, Some(1e6)),
            Row { ms: 0.5, ..of(CALL, None, None, None) },
        ]
    }

    #[test]
    fn a_share_names_the_ceiling_that_is_nearer() {
        let measured = row("op", "gemm", 1.0);
        let mut rows = ceilings();
        rows.push(measured.clone());
        let (share, name) = Ceilings::of(&rows, &measured).share(&measured).unwrap();
        assert!((share - 0.5).abs() < 1e-12 && name == PRODUCT, "{share} {name}");
        let mut other = measured;
        other.device = "Y".into();
        assert_eq!(Ceilings::of(&rows, &other).share(&other), None);
    }

    #[test]
    fn predictions_by_hand() {
        let rows = ceilings();
        let c = Ceilings::of(&rows, &rows[0]);
        let of = |flops: f64, bytes: f64, exps: f64| c.predict(Needs { flops, bytes, exps });
        // 16 GFLOP at 8 a millisecond, and 3 M exponentials at one; half a millisecond for the call itself.
        assert_eq!(of(16e9, 1e6, 0.0), Some(2.5));
        assert_eq!(of(16e9, 1e6, 3e6), Some(5.5));
        // 5 MB stay in the caches, 100 MB do not.
        assert_eq!(of(0.0, 5e6, 0.0), Some(0.6));
        assert_eq!(of(0.0, 100e6, 0.0), Some(10.5));
        assert_eq!(of(0.0, 0.0, 0.0), None);
        let without = Ceilings { exps: None, ..c };
        assert_eq!(without.predict(Needs { flops: 1.0, bytes: 1.0, exps: 1.0 }), None);
    }
}
