//! A record of the operators that a piece of work calls, with their dims and times: for measurements.
//!
//! Only calls of one thread are seen, which is the one that runs a model; a call's time is the host's, so it means
//! something on the host alone.

use std::cell::RefCell;
use std::time::Instant;

/// One call of an operator.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Name of the operator.
    pub op: &'static str,
    /// Its dims by name.
    pub dims: Vec<(&'static str, usize)>,
    /// Seconds from the first check of its arguments to its last output.
    pub seconds: f64,
}

impl Call {
    /// A dim by name; 0 where the call had none.
    pub fn dim(&self, name: &str) -> usize {
        self.dims.iter().find(|(n, _)| *n == name).map_or(0, |(_, value)| *value)
    }
}

thread_local! {
    static CALLS: RefCell<Option<Vec<Call>>> = const { RefCell::new(None) };
}

/// Runs `work` and gives the calls that it made on this thread, in the order in which they ended.
pub fn watch<R>(work: impl FnOnce() -> R) -> (R, Vec<Call>) {
    let before = CALLS.replace(Some(Vec::new()));
    let result = work();
    let calls = CALLS.replace(before).unwrap_or_default();
    (result, calls)
}

/// Calls that ended so far in the innermost [`watch`] of this thread; 0 outside of one.
pub fn count() -> usize {
    CALLS.with_borrow(|calls| calls.as_ref().map_or(0, Vec::len))
}

/// The beginning of a call, where somebody watches.
pub(super) fn begin() -> Option<Instant> {
    CALLS.with_borrow(Option::is_some).then(Instant::now)
}

/// The end of a call that began at `begun`.
pub(super) fn end(begun: Instant, op: &'static str, dims: impl Iterator<Item = (&'static str, usize)>) {
    let seconds = begun.elapsed().as_secs_f64();
    CALLS.with_borrow_mut(|calls| {
        if let Some(calls) = calls {
            calls.push(Call { op, dims: dims.collect(), seconds });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autograd::{Graph, Precision, Var};
    use crate::backend::Device;
    use crate::ops::contracts::gemm;
    use crate::tensor::Tensor;

    #[test]
    fn calls_are_seen_with_their_dims_while_somebody_watches() {
        let device = Device::cpu();
        let of = |dims: &[usize]| Var::constant(Tensor::zeros(&device, dims).unwrap());
        let (x, w, g) = (of(&[2, 3, 8]), of(&[5, 8]), Graph::inference(Precision::F32));
        let product = || {
            g.gemm(&x, &w, None, None, None, None, gemm::Params { act: 0, gate_row: 0, bf16: false }).unwrap();
        };
        product();
        let ((), calls) = watch(|| {
            product();
            assert_eq!(count(), 1);
            product();
        });
        assert_eq!((calls.len(), count()), (2, 0));
        assert_eq!(calls[0].dims, [("B", 2), ("N", 3), ("K", 8), ("F", 5), ("C", 0)]);
        assert!(calls.iter().all(|c| c.op == "gemm" && c.seconds > 0.0));
        let cost = (gemm::INFO.cost)(&|name| calls[0].dim(name));
        assert_eq!(cost.flops, 2 * 2 * 3 * 8 * 5);
    }
}
