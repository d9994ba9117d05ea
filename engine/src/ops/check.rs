//! The conformance runner: operator × case × backend, every output against the oracle.

use super::cases::{CaseBody, Conform, Values, collect};
pub use super::cases::{CaseRow, Given, Named, Sample, Timer, sample_case, time_cases};
use crate::backend::emu::{self, Recorder};
use crate::backend::{Device, DeviceKind};
use crate::error::{Error, Result};
use crate::tensor::DType;
use graft_kernels::Tier;
use graft_kernels::check::{Comparison, Tolerance, compare};
use graft_kernels::emu::Build;
use graft_kernels::launch::ElementType;
use graft_kernels::ways;
use std::collections::HashSet;
use std::fmt;

/// Verdict of one row of the conformance table.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// Every output within its bounds and bit-equal on a second run; the worst comparison.
    Ok(Comparison),
    /// The entry point and the choice of kernels accept the case: so many launches.
    Planned(usize),
    /// The output that failed, and how.
    Fail(String),
    /// Not run, and why.
    Skip(String),
}

/// What runs the cases.
#[derive(Clone, Debug, PartialEq)]
pub enum Subject {
    /// A device.
    Device(Device),
    /// A build of the emulator with a checker.
    Checked {
        /// Working type.
        element: DType,
        /// Which checker.
        build: Build,
        /// Order in which warps and copies advance.
        seed: u64,
        /// Every case; otherwise those that reach a kernel which no smaller case has reached.
        every: bool,
    },
    /// Entry points and choice of kernels alone, on the shapes of real models.
    Plan(DType),
}

impl fmt::Display for Subject {
    /// `cpu`, `emu bf16`, `asan f32`, `plan bf16`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Device(device) if device.is_host() => write!(f, "{}", device.kind()),
            Subject::Device(device) => write!(f, "{} {}", device.kind(), device.element()),
            Subject::Checked { element, build, .. } => write!(f, "{build} {element}"),
            Subject::Plan(element) => write!(f, "plan {element}"),
        }
    }
}

impl Subject {
    /// The type in which it computes.
    fn element(&self) -> DType {
        match self {
            Subject::Device(device) => device.element(),
            Subject::Checked { element, .. } | Subject::Plan(element) => *element,
        }
    }

    /// The compute capability of its GPU, real or emulated.
    fn arch(&self) -> u32 {
        match self {
            Subject::Device(device) => device.properties().map_or(0, |p| p.arch),
            Subject::Checked { .. } | Subject::Plan(_) => emu::properties().arch,
        }
    }

    fn on_host(&self) -> bool {
        matches!(self, Subject::Device(device) if device.is_host())
    }

    /// Which backend its rows count for.
    pub fn kind(&self) -> DeviceKind {
        match self {
            Subject::Device(device) => device.kind(),
            Subject::Checked { .. } => DeviceKind::Emu,
            Subject::Plan(_) => DeviceKind::Dry,
        }
    }
}

/// One row of the conformance table.
#[derive(Clone, Debug)]
pub struct Row {
    /// Operator.
    pub op: &'static str,
    /// Case.
    pub case: &'static str,
    /// What ran it, in words.
    pub backend: String,
    /// Which backend that is.
    pub kind: DeviceKind,
    /// Verdict.
    pub verdict: Verdict,
}

/// Runs the cases of the operators whose name contains `filter` (or is `NAME` for `=NAME`) on `subject`, in contract order: the tiny ones, or for
/// a plan the real ones. Operators without a kernel for the working type of a GPU are left out. On a GPU a case has a row
/// for each way that takes it, or for `way` alone.
///
/// Fresh buffers are poisoned with NaN, so an output that is not written completely fails.
///
/// # Errors
/// When a host entry point refuses a case: the contract and its cases disagree. On other subjects that is a failed row.
pub fn conformance(subject: &Subject, filter: &str, way: Option<&str>) -> Result<Vec<Row>> {
    let oracle = Device::oracle();
    oracle.set_poison(true);
    if let Subject::Device(device) = subject {
        device.set_poison(true);
    }
    let tier = if matches!(subject, Subject::Plan(_)) { Tier::Real } else { Tier::Tiny };
    let (mut rows, mut reached) = (Vec::new(), HashSet::new());
    for (op, run) in super::generated::CONFORMANCE {
        // `=name` is one operator, any other text a part of names.
        if !filter.strip_prefix('=').map_or(op.contains(filter), |exact| *op == exact) {
            continue;
        }
        let mut judge = |case: &CaseRow, body: CaseBody<'_>| {
            let known = case.info.elements.iter().any(|e| DType::from(*e) == subject.element());
            if case.tier != tier || !(subject.on_host() || known) {
                return Ok(());
            }
            for name in ways_of(subject, case, body).into_iter().filter(|name| way.is_none() || *name == way) {
                let mut judged = || verdict(subject, &oracle, case, &mut *body, &mut reached);
                let judged = match name {
                    Some(name) => ways::force(name, judged).0,
                    None => judged(),
                };
                let verdict = match judged {
                    Ok(Some(verdict)) => verdict,
                    Ok(None) => continue,
                    Err(e) if subject.on_host() => return Err(e),
                    Err(e) => Verdict::Fail(e.to_string()),
                };
                let backend = name.map_or(subject.to_string(), |name| format!("{subject} {name}"));
                rows.push(Row { op: case.info.name, case: case.name, backend, kind: subject.kind(), verdict });
            }
            Ok(())
        };
        run(&mut Conform::Judge(&mut judge))?;
    }
    if let Subject::Device(device) = subject {
        device.set_poison(false);
    }
    Ok(rows)
}

/// The ways that take a case on the subject; one without a name where there is nothing to choose.
fn ways_of(subject: &Subject, case: &CaseRow, body: CaseBody<'_>) -> Vec<Option<&'static str>> {
    let element = subject.element();
    let mut names: Vec<Option<&'static str>> = Vec::new();
    let computes = |elements: &[ElementType]| elements.iter().any(|e| DType::from(*e) == element);
    let ways = if subject.on_host() { &[] } else { case.info.ways };
    for info in ways.iter().filter(|w| w.arch <= subject.arch() && computes(w.elements)) {
        if names.contains(&Some(info.name)) {
            continue;
        }
        let (_, device) = Recorder::open(element, false);
        let (planned, met) = ways::force(info.name, || collect(&device, element, Values::Unset, &mut *body));
        // A way that fails to launch is one: its row says so.
        if met || planned.is_err() {
            names.push(Some(info.name));
        }
    }
    if names.is_empty() { vec![None] } else { names }
}

/// The verdict on one case; none where the subject passes it by.
fn verdict(
    subject: &Subject,
    oracle: &Device,
    case: &CaseRow,
    body: CaseBody<'_>,
    reached: &mut HashSet<&'static str>,
) -> Result<Option<Verdict>> {
    let element = subject.element();
    let own = if element == DType::BF16 { case.info.tolerance_bf16 } else { case.info.tolerance };
    let rounded = element == DType::BF16 || (subject.on_host() && case.bf16);
    let tolerance = own.unwrap_or(if rounded { Tolerance::BF16 } else { Tolerance::F32 });
    Ok(Some(match subject {
        Subject::Device(device) => {
            let values = if device.is_host() { Values::Drawn } else { Values::Working };
            let want = collect(oracle, element, values, body)?;
            let first = collect(device, element, values, body)?;
            let second = collect(device, element, values, body)?;
            judge(&want, &first, Some(&second), tolerance)
        }
        Subject::Checked { build, seed, every, .. } => {
            let (recorder, device) = Recorder::open(element, true);
            device.set_poison(true);
            let mut found = collect(&device, element, Values::Working, body)?;
            let Some(recording) = recorder.finish() else {
                return Err(Error::failure(case.info.name, "launched no kernel"));
            };
            if recording.kernels.iter().filter(|k| reached.insert(k)).count() == 0 && !every {
                return Ok(None);
            }
            let outcome = recording.run(*build, *seed)?;
            if !outcome.good {
                return Ok(Some(Verdict::Fail(outcome.summary())));
            }
            if !outcome.report.is_empty() {
                return Ok(Some(Verdict::Fail(format!("reported: {}", outcome.summary()))));
            }
            for (named, buffer) in found.iter_mut().zip(&recording.reads) {
                named.values = named.dtype.decode(&outcome.buffers[*buffer]);
            }
            let want = collect(oracle, element, Values::Working, body)?;
            judge(&want, &found, None, tolerance)
        }
        Subject::Plan(_) => {
            let (recorder, device) = Recorder::open(element, false);
            collect(&device, element, Values::Unset, body)?;
            match recorder.finish() {
                Some(recording) => Verdict::Planned(recording.launches),
                None => Verdict::Fail("launched no kernel".into()),
            }
        }
    }))
}

fn judge(want: &[Named], first: &[Named], second: Option<&[Named]>, tolerance: Tolerance) -> Verdict {
    let mut worst: Option<Comparison> = None;
    for (i, (w, f)) in want.iter().zip(first).enumerate() {
        // What stays f32 under a narrower working type has its rounding all the same: inputs are exact on both sides.
        let result = compare(&f.values, &w.values, tolerance);
        if !result.pass {
            return Verdict::Fail(format!(
                "{}: worst {:.2} of its bound at element {}, rel rms {:.2e} (bound {:.0e})",
                w.name, result.worst, result.worst_index, result.rel_rms, tolerance.rms
            ));
        }
        let again = second.and_then(|s| s.get(i));
        if again.is_some_and(|s| f.values.iter().zip(&s.values).any(|(a, b)| a.to_bits() != b.to_bits())) {
            return Verdict::Fail(format!("{}: a second run gave other bits", w.name));
        }
        if worst.is_none_or(|held| result.worst > held.worst) {
            worst = Some(result);
        }
    }
    match worst {
        Some(result) if want.len() == first.len() => Verdict::Ok(result),
        _ => Verdict::Fail("outputs differ in number".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_output_is_a_failed_row() {
        let named = |values: &[f32]| [Named { name: "y".into(), dtype: DType::F32, values: values.to_vec() }];
        let (want, wrong, nan) = (named(&[1.0, 2.0]), named(&[1.0, 2.1]), named(&[1.0, f32::NAN]));
        assert!(matches!(judge(&want, &wrong, Some(&wrong), Tolerance::F32), Verdict::Fail(_)));
        assert!(matches!(judge(&want, &nan, None, Tolerance::F32), Verdict::Fail(_)));
        assert!(matches!(judge(&want, &want, Some(&wrong), Tolerance::F32), Verdict::Fail(_)));
        assert!(matches!(judge(&want, &want, Some(&want), Tolerance::F32), Verdict::Ok(_)));
    }
}
