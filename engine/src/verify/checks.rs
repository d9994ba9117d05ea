//! Results against expectations.
//!
//! A tolerance entry is `<tensor> (<dtype>)`; where it has both `max_abs` and `rel_l2`, both apply. `gradients` covers
//! every `grad.*`: |a − b| ≤ `rel_l2_per_tensor` · max(|b|, `denominator_floor`). A tensor without an entry takes ten
//! times the tightest f32 tolerance of its case. Integers are exact. No bound is tighter than the rounding of the type
//! that the expected values are stored in.

use super::case::{Case, Values};
use crate::autograd::Precision;
use crate::error::{Error, Result};
use crate::tensor::Tensor;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt;

/// Whether a comparison passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Within its tolerance.
    Pass,
    /// Not, and why.
    Fail(String),
    /// Not made, because something that is no part of the repository is missing, and what.
    Skip(String),
}

/// One comparison.
#[derive(Clone, Debug)]
pub struct Row {
    /// What was compared: a tensor, a scalar or a verdict.
    pub tensor: String,
    /// Largest absolute difference; NaN where nothing was compared.
    pub worst: f64,
    /// Relative RMS: L2 norm of the difference over the norm of the expectation.
    pub relative: f64,
    /// The bounds, in words.
    pub tolerance: String,
    /// Verdict.
    pub verdict: Verdict,
}

impl Row {
    /// A row for something that could not be compared.
    pub fn failure(tensor: &str, why: String) -> Row {
        Row {
            tensor: tensor.into(),
            worst: f64::NAN,
            relative: f64::NAN,
            tolerance: String::new(),
            verdict: Verdict::Fail(why),
        }
    }
}

/// Bounds of a comparison.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Bounds {
    max_abs: Option<f64>,
    /// On the L2 norm of the difference, relative to that of the expectation …
    relative: Option<f64>,
    /// … but to no less than this.
    floor: f64,
}

impl Bounds {
    fn read(entry: &Value) -> Option<Bounds> {
        let number = |key: &str| entry.get(key).and_then(Value::as_f64);
        if entry.get("exact").and_then(Value::as_bool) == Some(true) {
            return Some(Bounds { max_abs: Some(0.0), ..Bounds::default() });
        }
        let relative = number("rel_l2").or(number("rel")).or(number("rel_l2_per_tensor"));
        let bounds = Bounds { max_abs: number("max_abs"), relative, floor: number("denominator_floor").unwrap_or(0.0) };
        (bounds.max_abs.is_some() || bounds.relative.is_some()).then_some(bounds)
    }

    /// Ten times the tightest of several.
    fn loose(all: impl Iterator<Item = Bounds>) -> Option<Bounds> {
        let tightest = |a: Option<f64>, b: Option<f64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let found = all.reduce(|a, b| Bounds {
            max_abs: tightest(a.max_abs, b.max_abs),
            relative: tightest(a.relative, b.relative),
            floor: 0.0,
        })?;
        Some(Bounds {
            max_abs: found.max_abs.map(|v| 10.0 * v),
            relative: found.relative.map(|v| 10.0 * v),
            floor: 0.0,
        })
    }
}

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.max_abs, self.relative) {
            (Some(a), Some(r)) => write!(f, "abs {a:.1e}, rel {r:.1e}"),
            (Some(a), None) => write!(f, "abs {a:.1e}"),
            (None, Some(r)) => write!(f, "rel {r:.1e}"),
            (None, None) => f.write_str("exact"),
        }
    }
}

/// Collects the comparisons of one case.
pub struct Checks<'c> {
    case: &'c Case,
    precision: Precision,
    /// Put before the names in rows, where one case is computed several ways.
    label: String,
    rows: Vec<Row>,
    seen: BTreeSet<String>,
}

impl<'c> Checks<'c> {
    pub(super) fn new(case: &'c Case, precision: Precision) -> Self {
        Checks { case, precision, label: String::new(), rows: Vec::new(), seen: BTreeSet::new() }
    }

    /// Names the way in which the following results are computed.
    pub fn label(&mut self, label: &str) {
        self.label = format!("{label}: ");
    }

    /// Arithmetic to compute a tensor in: bf16 where that was asked for and the case has a tolerance for it.
    pub fn precision(&self, tensor: &str) -> Precision {
        let bf16 = self.precision == Precision::Bf16 && self.entry(tensor, "bf16").is_some();
        if bf16 { Precision::Bf16 } else { Precision::F32 }
    }

    fn entry(&self, tensor: &str, dtype: &str) -> Option<Bounds> {
        let group = if tensor.starts_with("grad.") { "gradients" } else { tensor };
        let keys = [format!("{tensor} ({dtype})"), format!("{group} ({dtype})")];
        keys.iter().find_map(|key| self.case.tolerance.get(key)).and_then(Bounds::read)
    }

    /// Bounds of a tensor computed in `dtype`.
    fn bounds(&self, tensor: &str, dtypes: &[&str]) -> Option<Bounds> {
        let all = || self.case.tolerance.as_object().into_iter().flatten();
        // The rule of gradients is of another kind and says nothing about other tensors.
        let comparable = |key: &str| key.ends_with("(f32)") && !key.starts_with("gradients");
        let loose = |keep: &dyn Fn(&str) -> bool| {
            Bounds::loose(all().filter(|(k, _)| keep(k)).filter_map(|(_, v)| Bounds::read(v)))
        };
        dtypes
            .iter()
            .find_map(|dtype| self.entry(tensor, dtype))
            .or_else(|| loose(&comparable))
            .or_else(|| loose(&|_: &str| true))
    }

    /// Compares a tensor with the expected one of the same name.
    ///
    /// # Errors
    /// When the expected tensor cannot be read.
    pub fn tensor(&mut self, name: &str, got: &Tensor) -> Result<()> {
        let values: Vec<f64> = got.to_vec()?.into_iter().map(f64::from).collect();
        self.values(name, got.shape().dims(), &values)
    }

    /// As [`Checks::tensor`], for plain numbers; a tensor that the case does not expect is not compared.
    ///
    /// # Errors
    /// As [`Checks::tensor`].
    pub fn values(&mut self, name: &str, shape: &[usize], got: &[f64]) -> Result<()> {
        let Some(want) = self.case.expected(name)? else { return Ok(()) };
        let bounds = match (want.integer, self.precision(name)) {
            (true, _) => Some(Bounds { max_abs: Some(0.0), ..Bounds::default() }),
            (_, Precision::Bf16) => self.bounds(name, &["bf16"]),
            (_, Precision::F32) => self.bounds(name, &["f32", "float64"]),
        };
        self.compare(name, shape, got, &want, bounds);
        Ok(())
    }

    /// Compares numbers with expected ones that are no tensor (from a JSON file).
    pub fn list(&mut self, name: &str, got: &[f64], want: &[f64]) {
        let bounds = self.bounds(name, &["float64", "f32"]);
        let want = Values { shape: vec![want.len()], data: want.to_vec(), integer: false, rounding: 0.0 };
        self.compare(name, &[got.len()], got, &want, bounds);
    }

    /// Compares a tensor with one that must be another: what a wrong implementation would give.
    ///
    /// # Errors
    /// When the expected tensor cannot be read.
    pub fn differs(&mut self, name: &str, right: &str, got: &Tensor) -> Result<()> {
        let Some(wrong) = self.case.expected(name)? else { return Ok(()) };
        let got: Vec<f64> = got.to_vec()?.into_iter().map(f64::from).collect();
        let bounds = self.bounds(right, &["f32"]).unwrap_or_default();
        let (worst, relative, problem) = judge(&got, &wrong, bounds);
        let verdict = match problem {
            Some(_) => Verdict::Pass,
            None => Verdict::Fail(format!("{right} equals {name}, the result of the wrong weights")),
        };
        self.push(name, worst, relative, "must differ".into(), verdict);
        Ok(())
    }

    /// Records a verdict that is not a comparison of numbers.
    pub fn verdict(&mut self, what: &str, problem: Option<String>) {
        let verdict = problem.map_or(Verdict::Pass, Verdict::Fail);
        self.push(what, 0.0, 0.0, "verdict".into(), verdict);
    }

    /// Records that the whole case cannot be computed here, and why.
    pub fn skip(&mut self, why: String) {
        self.rows.push(Row { verdict: Verdict::Skip(why), ..Row::failure("case", String::new()) });
        self.seen.extend(self.case.expected_names().map(str::to_string));
    }

    fn compare(&mut self, name: &str, shape: &[usize], got: &[f64], want: &Values, bounds: Option<Bounds>) {
        let Some(bounds) = bounds else {
            self.rows.push(Row::failure(name, "the case states no tolerance".into()));
            self.seen.insert(name.to_string());
            return;
        };
        if shape != want.shape {
            let why = format!("shape is {shape:?}; must be {:?}", want.shape);
            return self.push(name, f64::NAN, f64::NAN, bounds.to_string(), Verdict::Fail(why));
        }
        let (worst, relative, problem) = judge(got, want, bounds);
        self.push(name, worst, relative, bounds.to_string(), problem.map_or(Verdict::Pass, Verdict::Fail));
    }

    fn push(&mut self, name: &str, worst: f64, relative: f64, tolerance: String, verdict: Verdict) {
        self.seen.insert(name.to_string());
        self.rows.push(Row { tensor: format!("{}{name}", self.label), worst, relative, tolerance, verdict });
    }

    /// The rows, with one for the error that ended the case and one for every expected tensor that nobody computed.
    pub(super) fn finish(mut self, result: Result<()>) -> Vec<Row> {
        if let Err(e) = result {
            self.rows.push(Row::failure("run", e.to_string()));
        }
        for name in self.case.expected_names().filter(|name| !self.seen.contains(*name)) {
            self.rows.push(Row::failure(name, "expected, but nothing computes it".into()));
        }
        if self.rows.is_empty() {
            self.rows.push(Row::failure("case", "nothing was compared".into()));
        }
        self.rows
    }
}

/// Worst difference, relative RMS, and what is wrong where something is.
fn judge(got: &[f64], want: &Values, bounds: Bounds) -> (f64, f64, Option<String>) {
    if got.len() != want.data.len() {
        return (f64::NAN, f64::NAN, Some(format!("{} values; must be {}", got.len(), want.data.len())));
    }
    let (mut worst, mut at, mut square, mut norm, mut largest) = (0.0f64, 0, 0.0, 0.0, 0.0f64);
    for (i, (g, w)) in got.iter().zip(&want.data).enumerate() {
        let difference = if g == w { 0.0 } else { (g - w).abs() };
        // A NaN must win over every number.
        if !(difference <= worst) {
            (worst, at) = (difference, i);
        }
        square += difference * difference;
        norm += w * w;
        largest = largest.max(w.abs());
    }
    let (distance, norm): (f64, f64) = (f64::sqrt(square), f64::sqrt(norm));
    let relative = if distance == 0.0 { 0.0 } else { distance / norm };
    let relative_bound = bounds.relative.map(|r| r.max(2.0 * want.rounding) * norm.max(bounds.floor));
    let absolute_bound = bounds.max_abs.map(|a| a.max(2.0 * want.rounding * largest));
    let problem = if absolute_bound.is_some_and(|bound| !(worst <= bound)) {
        Some(format!("element {at} is {}; must be {}", got[at], want.data[at]))
    } else if relative_bound.is_some_and(|bound| !(distance <= bound)) {
        Some(format!("difference of norm {distance:.3e}; expectation has norm {norm:.3e}"))
    } else if absolute_bound.is_none() && relative_bound.is_none() && !(worst <= 0.0) {
        Some(format!("element {at} is {}; must be {}", got[at], want.data[at]))
    } else {
        None
    };
    (worst, relative, problem)
}

/// A failure that names the case's field.
pub(super) fn unknown(what: &str, is: &str, known: &[&str]) -> Error {
    Error::failure(what, format!("unknown {what}")).is(is).must(format!("one of {}", known.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(data: &[f64]) -> Values {
        Values { shape: vec![data.len()], data: data.to_vec(), integer: false, rounding: 0.0 }
    }

    #[test]
    fn both_bounds_apply_and_nan_fails() {
        let want = values(&[3.0, 4.0]);
        let both = Bounds { max_abs: Some(0.1), relative: Some(0.01), floor: 0.0 };
        let problem = |got: &[f64], bounds| judge(got, &want, bounds).2;
        assert_eq!(problem(&[3.0, 4.04], both), None);
        assert!(problem(&[3.0, 4.09], both).unwrap().contains("norm"));
        assert!(problem(&[3.0, 4.11], Bounds { relative: None, ..both }).unwrap().contains("element 1 is 4.11"));
        assert!(problem(&[f64::NAN, 4.0], both).is_some());
        assert!(problem(&[3.0, f64::NAN], Bounds { max_abs: None, ..both }).is_some());
        assert!(problem(&[3.0], both).unwrap().contains("1 values"));
    }

    #[test]
    fn the_floor_and_the_stored_rounding_widen() {
        let bounds = Bounds { max_abs: None, relative: Some(0.1), floor: 1.0 };
        assert_eq!(judge(&[0.09], &values(&[0.0]), bounds).2, None);
        assert!(judge(&[0.11], &values(&[0.0]), bounds).2.is_some());
        let stored = Values { rounding: 1e-7, ..values(&[1.0]) };
        let tight = Bounds { max_abs: Some(1e-12), relative: Some(1e-12), floor: 0.0 };
        assert_eq!(judge(&[1.0 + 1e-7], &stored, tight).2, None);
        assert!(judge(&[1.0 + 1e-7], &values(&[1.0]), tight).2.is_some());
    }

    #[test]
    fn ten_times_the_tightest() {
        let a = Bounds { max_abs: Some(1.0), relative: None, floor: 0.5 };
        let b = Bounds { max_abs: Some(0.5), relative: Some(2.0), floor: 0.0 };
        assert_eq!(
            Bounds::loose([a, b].into_iter()),
            Some(Bounds { max_abs: Some(5.0), relative: Some(20.0), floor: 0.0 })
        );
        assert_eq!(Bounds::loose(std::iter::empty()), None);
    }
}
