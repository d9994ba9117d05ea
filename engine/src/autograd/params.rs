//! Parameters: named tensors that outlive a graph.

use crate::error::{Error, Result};
use crate::tensor::Tensor;
use std::sync::atomic::{AtomicU64, Ordering};

/// Index of a parameter in its store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParamId(u32);

impl ParamId {
    pub(super) const FIRST: ParamId = ParamId(0);
    pub(super) const LAST: ParamId = ParamId(u32::MAX);

    /// Position in the store.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A named tensor.
#[derive(Clone, Debug)]
pub struct Param {
    /// Name in checkpoints.
    pub name: String,
    /// Value.
    pub value: Tensor,
    /// Whether training changes it.
    pub trainable: bool,
}

/// The parameters of a model, in a fixed order.
#[derive(Debug)]
pub struct ParamStore {
    identity: u64,
    params: Vec<Param>,
}

impl Default for ParamStore {
    fn default() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        ParamStore { identity: NEXT.fetch_add(1, Ordering::Relaxed), params: Vec::new() }
    }
}

impl ParamStore {
    /// Number that tells this store from every other of the process.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    /// Adds a parameter.
    pub fn add(&mut self, name: impl Into<String>, value: Tensor, trainable: bool) -> ParamId {
        self.params.push(Param { name: name.into(), value, trainable });
        ParamId(self.params.len() as u32 - 1)
    }

    /// The parameter with an id of this store.
    pub fn get(&self, id: ParamId) -> &Param {
        &self.params[id.index()]
    }

    /// As [`ParamStore::get`], mutable.
    pub fn get_mut(&mut self, id: ParamId) -> &mut Param {
        &mut self.params[id.index()]
    }

    /// The parameter with a name.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.params.iter().position(|p| p.name == name).map(|i| ParamId(i as u32))
    }

    /// All parameters in order.
    pub fn iter(&self) -> impl Iterator<Item = (ParamId, &Param)> {
        self.params.iter().enumerate().map(|(i, p)| (ParamId(i as u32), p))
    }

    /// Number of parameters.
    pub fn len(&self) -> usize {
        self.params.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.params.is_empty()
    }

    /// Number of elements, all parameters together.
    pub fn elements(&self) -> usize {
        self.params.iter().map(|p| p.value.len()).sum()
    }

    /// Bytes of all parameters.
    pub fn bytes(&self) -> usize {
        self.params.iter().map(|p| p.value.bytes()).sum()
    }

    /// Replaces the value of a parameter.
    ///
    /// # Errors
    /// When the shape differs.
    pub fn set(&mut self, id: ParamId, value: Tensor) -> Result<()> {
        let param = &mut self.params[id.index()];
        if param.value.shape() != value.shape() {
            return Err(Error::failure(&param.name, "wrong shape").is(value.shape()).must(param.value.shape()));
        }
        param.value = value;
        Ok(())
    }

    /// Copies the values of `other`, which must have the same names and shapes in the same order.
    ///
    /// # Errors
    /// At the first parameter that differs.
    pub fn copy_from(&mut self, other: &ParamStore) -> Result<()> {
        for (mine, theirs) in self.params.iter_mut().zip(&other.params) {
            if mine.name != theirs.name || mine.value.shape() != theirs.value.shape() {
                return Err(Error::failure(&mine.name, "parameter sets differ").is(&theirs.name));
            }
            mine.value = theirs.value.copy()?;
        }
        Ok(())
    }
}
