//! Parameters: named tensors that outlive a graph.

use crate::error::{Error, Result};
use crate::tensor::Tensor;
use std::collections::BTreeMap;
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
    /// Whether it is the weight `[out, in]` of a linear layer, which can carry an [`Adapter`].
    pub linear: bool,
}

/// A low-rank addition to the weight of a linear layer, W + scale·B·A (LoRA, arXiv 2106.09685).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adapter {
    /// A `[R, in]`.
    pub a: ParamId,
    /// B `[out, R]`.
    pub b: ParamId,
    /// α/R.
    pub scale: f32,
}

/// The parameters of a model, in a fixed order.
#[derive(Debug)]
pub struct ParamStore {
    identity: u64,
    params: Vec<Param>,
    adapters: BTreeMap<ParamId, Adapter>,
}

impl Default for ParamStore {
    fn default() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let identity = NEXT.fetch_add(1, Ordering::Relaxed);
        ParamStore { identity, params: Vec::new(), adapters: BTreeMap::new() }
    }
}

impl ParamStore {
    /// Number that tells this store from every other of the process.
    pub fn identity(&self) -> u64 {
        self.identity
    }

    /// Adds a parameter.
    pub fn add(&mut self, name: impl Into<String>, value: Tensor, trainable: bool) -> ParamId {
        self.params.push(Param { name: name.into(), value, trainable, linear: false });
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

    /// The adapter of a linear layer, by its weight.
    pub fn adapter(&self, weight: ParamId) -> Option<Adapter> {
        self.adapters.get(&weight).copied()
    }

    /// All adapters with the weights that carry them, in the order of the weights.
    pub fn adapters(&self) -> impl Iterator<Item = (ParamId, Adapter)> + '_ {
        self.adapters.iter().map(|(weight, adapter)| (*weight, *adapter))
    }

    /// Gives a linear layer an adapter, whose parameters were added after all others.
    pub fn attach(&mut self, weight: ParamId, adapter: Adapter) {
        self.adapters.insert(weight, adapter);
    }

    /// Forgets all adapters and their parameters; the ids of all others stay.
    pub fn drop_adapters(&mut self) {
        if let Some(first) = self.adapters.values().map(|a| a.a.index().min(a.b.index())).min() {
            self.params.truncate(first);
        }
        self.adapters.clear();
    }

    /// A store of its own with the same parameters under the same ids; values are shared until one of the two writes.
    pub fn duplicate(&self) -> ParamStore {
        ParamStore { params: self.params.clone(), adapters: self.adapters.clone(), ..ParamStore::default() }
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
