//! Index tensors that follow from a rule, made once: what is uploaded in every pass stops the queue and cannot be part
//! of a captured graph.

use crate::error::Result;
use crate::tensor::{Device, Tensor};
use std::sync::{Mutex, PoisonError};

/// Tensors kept; the oldest makes room.
const KEPT: usize = 64;

/// Row of a table for place `i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The same for all.
    Same(usize),
    /// `i` itself.
    Each,
    /// `i / n`: rows in groups of `n`.
    Groups(usize),
    /// `i mod n`: n rows in turn.
    Turns(usize),
}

impl Rule {
    fn row(self, i: usize) -> usize {
        match self {
            Rule::Same(row) => row,
            Rule::Each => i,
            Rule::Groups(n) => i / n.max(1),
            Rule::Turns(n) => i % n.max(1),
        }
    }
}

/// Index tensors by rule and length, `[len]` i32.
#[derive(Debug, Default)]
pub struct Rows(Mutex<Vec<(Rule, Tensor)>>);

impl Rows {
    /// The rows of a rule on a device; the same tensor for the same question.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn of(&self, device: &Device, rule: Rule, len: usize) -> Result<Tensor> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |(r, t): &&(Rule, Tensor)| *r == rule && t.dim(0) == len && t.device() == device;
        if let Some((_, rows)) = kept.iter().find(known) {
            return Ok(rows.clone());
        }
        let values: Vec<i32> = (0..len).map(|i| i32::try_from(rule.row(i)).unwrap_or(i32::MAX)).collect();
        let rows = Tensor::from_i32(device, &[len], &values)?;
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push((rule, rows.clone()));
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_what_they_say_and_old_ones_make_room() {
        let (rows, device) = (Rows::default(), Device::cpu());
        let of = |rule, len| rows.of(&device, rule, len).unwrap().i32s().unwrap().to_vec();
        assert_eq!(of(Rule::Same(3), 2), [3, 3]);
        assert_eq!(of(Rule::Each, 3), [0, 1, 2]);
        assert_eq!(of(Rule::Groups(2), 5), [0, 0, 1, 1, 2]);
        assert_eq!(of(Rule::Turns(2), 3), [0, 1, 0]);
        for row in 0..2 * KEPT {
            assert_eq!(of(Rule::Same(row), 1), [row as i32]);
        }
        assert_eq!(rows.0.lock().unwrap().len(), KEPT);
    }
}
